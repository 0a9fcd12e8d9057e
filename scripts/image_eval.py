"""Measure how close images, such as image_sample.py draws, are to real ones: FID, KID, Inception Score, precision and
recall.

The features come from the Inception network that the papers use, which is downloaded once. Metrics from another
network, or from the pixels, have names of their own.

With --run_dir, the workbook draws the results over the training step. Step and weights are read from the path of the
samples, so name the file or its folder like the weights that drew it: ema_0.9999_030000.npz.
"""

from collections.abc import Callable
from functools import partial

from improved_diffusion.config import EvalConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

EXAMPLES = (
    "python scripts/image_eval.py --samples samples/drawn.npz --reference datasets/cifar_train",
    "python scripts/image_eval.py --samples samples/drawn.npz --reference photos --features pixel",
)


def create_parser() -> Parser:
    return Parser(EvalConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, _ = create_parser().parse_flags()
    from improved_diffusion.jobs.evaluate import run_evaluation

    return partial(run_evaluation, config)


if __name__ == "__main__":
    run_script(main)
