"""Train a diffusion model on images.

The same command with the same --log_dir continues the run.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import TrainConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/image_train.py --log_dir runs/cifar10",
    "python scripts/image_train.py --data_dir photos --image_size 64 --batch_size 16 --log_dir runs/photos",
)


def create_parser() -> Parser:
    return Parser(TrainConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.train import run_training

    return partial(run_training, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
