"""Fair timing: contenders take turns in one process; results are medians and spreads."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch as th

from improved_diffusion.cpu.machine import keep_memory


@dataclass(frozen=True)
class Contender:
    """A function to time, `run`, and one that prepares the process before its turn.

    :ivar threads: PyTorch's threads in this thread for its turn; 0: as the turn before has left them. A training step
        sets them to 1.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = keep_memory
    threads: int = 0


def seconds_of(run: Callable[[], object]) -> float:
    """How long `run` takes."""
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Time all `contenders` in turns, so that a disturbance of the machine affects all of them.

    A turn runs its contender twice and counts the second run. The first run finds caches and memory as the previous
    contender left them. An additional first round for warming up does not count.

    :return: for each contender its seconds in every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, contender in contenders.items():
            contender.prepare()
            if contender.threads:
                th.set_num_threads(contender.threads)
            contender.run()
            seconds[name].append(seconds_of(contender.run))
    return {name: values[1:] for name, values in seconds.items()}


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """The median of `values` times `scale`, and the range of the middle 80% of them."""
    ordered = sorted(scale * value for value in values)
    tenth = round(0.1 * (len(ordered) - 1))
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth]}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio in each round. A disturbance of the machine changes ratios the least."""
    return [above / below for above, below in zip(numerators, denominators)]
