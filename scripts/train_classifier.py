"""Train a small classifier, in minutes, for image_eval.py --classifier.

It tells what share of drawn images is of the class that was asked for.
"""

from collections.abc import Callable
from functools import partial

from improved_diffusion.config import ClassifierConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

EXAMPLES = (
    "python scripts/train_classifier.py --data_dir datasets/cifar_train --test_dir datasets/cifar_test",
    "python scripts/train_classifier.py --data_dir photos --image_size 64 --output photos.pt",
)


def create_parser() -> Parser:
    return Parser(ClassifierConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, _ = create_parser().parse_flags()
    from improved_diffusion.jobs.classifier import run_classifier_training

    return partial(run_classifier_training, config)


if __name__ == "__main__":
    run_script(main)
