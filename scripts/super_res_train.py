"""Train a model that enlarges images from --small_size to --large_size.

It learns from the images of --data_dir, fitted to --large_size, each with a copy that is shrunk to --small_size. The
same command with the same --log_dir, given again, continues the run.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import SuperResTrainConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/super_res_train.py --large_size 32 --small_size 8 --log_dir runs/enlarge",
    "python scripts/super_res_train.py --data_dir photos --large_size 64 --small_size 16 --log_dir runs/photos",
)


def create_parser() -> Parser:
    return Parser(SuperResTrainConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.train import run_training

    return partial(run_training, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
