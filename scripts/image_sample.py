"""Draw images from a trained model, as an .npz file and a picture."""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import SampleConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/image_sample.py",
    "python scripts/image_sample.py --model_path runs/cifar10 --num_samples 16 --sampler unipc --sample_steps 10",
)


def create_parser() -> Parser:
    return Parser(SampleConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.sample import run_sampling

    return partial(run_sampling, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
