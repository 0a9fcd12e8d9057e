"""Measure the bits per dimension of a trained model on images.

The results so far are written after every batch: nll.json (the mean), bpd.npz (every image) and vb_terms.npz,
mse_terms.npz, xstart_mse_terms.npz (means at every timestep, the noisiest first).
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import NllConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/image_nll.py --data_dir datasets/cifar_test --num_samples 100",
    "python scripts/image_nll.py --model_path runs/cifar10 --data_dir photos --timestep_respacing 100",
)


def create_parser() -> Parser:
    return Parser(NllConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.nll import run_nll

    return partial(run_nll, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
