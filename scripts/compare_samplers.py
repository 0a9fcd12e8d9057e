"""Compare samplers on your model: how close to real images each comes in how many steps, how well it solves the ODE,
how long it takes, and what it draws from the same noise.

Each sampler takes the --timestep_spacing that suits it, unless that flag or --samplers says otherwise. All images are
kept in --log_dir, so the same command continues an interrupted comparison. The tables and the picture are updated
whenever the images of a sampler, number of steps and seed are complete.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import ComparingConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/compare_samplers.py --reference datasets/cifar_train --log_dir samples/comparison",
    "python scripts/compare_samplers.py --reference photos --samplers unipc,heun --baseline False",
)


def create_parser() -> Parser:
    return Parser(ComparingConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.comparison.job import run_comparison

    return partial(run_comparison, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
