"""Measure how fast this machine trains and samples, compared with the plain way of openai/improved-diffusion, in a
few minutes. The default model is that of the README's CIFAR-10 command.

Everything that is compared runs in turns in one process. A number is the median of --rounds measurements; brackets
hold the range of the middle 80%. Run nothing else meanwhile.
"""

from collections.abc import Callable
from functools import partial

from improved_diffusion.config import BenchmarkConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

EXAMPLES = (
    "python scripts/benchmark.py --json speed.json",
    "python scripts/benchmark.py --only training --num_channels 128 --rounds 5",
)


def create_parser() -> Parser:
    return Parser(BenchmarkConfig, __doc__, EXAMPLES)


def main() -> Callable[[], int | None]:
    config, _ = create_parser().parse_flags()
    from improved_diffusion.benchmark.job import run_benchmark

    return partial(run_benchmark, config)


if __name__ == "__main__":
    run_script(main)
