"""Convert a trained model for diffusers (UNet2DModel and scheduler), or a model of diffusers into a run to draw
from or to train further. What the other side cannot express is refused by name.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import ConvertConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/convert_checkpoint.py --model_path runs/cifar10 --to_diffusers converted",
    "python scripts/convert_checkpoint.py --from_diffusers ddpm-cifar10-32 --log_dir runs/ddpm",
)


def create_parser() -> Parser:
    return Parser(ConvertConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, given = create_parser().parse_flags()
    from improved_diffusion.jobs.convert import run_conversion

    return partial(run_conversion, config, given, PROJECT)


if __name__ == "__main__":
    run_script(main)
