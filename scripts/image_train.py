"""Train a diffusion model on images. `--help` explains every flag; the README tells what to expect."""

import os

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion.flags import (
    Parser,
)
from improved_diffusion.jobs.train import create_training_parser, run_training
from improved_diffusion.script_util import (
    model_defaults,
    run_script,
)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def create_parser() -> Parser:
    return create_training_parser(__doc__, model_defaults())


def main() -> int:
    flags, given = create_parser().parse_flags()
    return run_training(flags, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
