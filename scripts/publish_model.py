"""Make a small copy of a trained model for others: the moving average of its weights in 16 bits, at most a fifth of
a checkpoint, with arguments, metrics and pictures. Draw from it as from a run: image_sample.py --model_path FOLDER.
"""

from collections.abc import Callable
from functools import partial

from improved_diffusion.config import PublishConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

EXAMPLES = ("python scripts/publish_model.py --model_path runs/cifar10 --log_dir models/mine",)


def create_parser() -> Parser:
    return Parser(PublishConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, _ = create_parser().parse_flags()
    from improved_diffusion.convert.publish import run_publishing

    return partial(run_publishing, config)


if __name__ == "__main__":
    run_script(main)
