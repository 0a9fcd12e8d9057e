"""Enlarge images with a super-resolution model.

The images come from --base_samples, or from --data_dir, whose images are shrunk first as in training.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import SuperResSampleConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/super_res_sample.py --model_path runs/enlarge --base_samples samples/small.npz",
    "python scripts/super_res_sample.py --model_path runs/enlarge --data_dir photos --num_samples 8",
)


def create_parser() -> Parser:
    return Parser(SuperResSampleConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.enlarge import run_enlarging

    return partial(run_enlarging, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
