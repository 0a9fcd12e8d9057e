"""Fair timing: contenders take turns in one process, and medians and spreads tell what came of it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from improved_diffusion.cpu.machine import keep_memory


@dataclass(frozen=True)
class Contender:
    """Something to be timed, `run`, and what has to be set up for the process before its turn."""

    run: Callable[[], object]
    prepare: Callable[[], object] = keep_memory


def seconds_of(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Time all `contenders` in turns: a machine that is disturbed, or warms up, is so for all of them.

    A turn runs its contender twice and counts the second: the first finds caches and memory as the one before has
    left them. An additional first round, in which kernels are compiled, does not count.

    :return: for each contender its seconds in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, contender in contenders.items():
            contender.prepare()
            contender.run()
            seconds[name].append(seconds_of(contender.run))
    return {name: values[1:] for name, values in seconds.items()}


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """The median of `values` times `scale`, and between what the middle 80% of them lie."""
    ordered = sorted(scale * value for value in values)
    tenth = round(0.1 * (len(ordered) - 1))
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth]}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio in each round, which is what a disturbed machine changes least."""
    return [above / below for above, below in zip(numerators, denominators)]
