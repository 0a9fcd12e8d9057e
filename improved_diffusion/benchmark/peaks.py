"""How fast a processor multiplies matrices, and how much arithmetic a model needs."""

import functools
from typing import Any

import torch as th

from improved_diffusion.benchmark.plain import make_plain
from improved_diffusion.benchmark.settings import NAMES, Settings, build, random_images
from improved_diffusion.benchmark.timing import Contender, interleave, spread
from improved_diffusion.cpu.workers import DTYPES, Workers

SIDE = 1024  # of the matrices
GFLOP = 2 * SIDE**3 / 1e9  # per product: a multiplication and an addition for each of SIDE^3 pairs


def measure_peaks(settings: Settings) -> dict[str, Any]:
    """The rates of matrix products, on one core and on all."""
    rows = [
        {
            "precision": NAMES[precision],
            "cores": cores,
            "gflop_per_second": spread(rates),
            "best": max(rates),
        }
        for (precision, cores), rates in matrix_rates(tuple(settings.cores), settings.rounds).items()
    ]
    note = f"{SIDE} x {SIDE}, one product at a time on every core"
    return {"title": "Products of matrices", "note": note, "rows": rows}


@functools.cache
def matrix_rates(cores: tuple[int, ...], rounds: int) -> dict[tuple[str, int], list[float]]:
    """For each precision and each number of `cores`, the GFLOP/s of matrix products in every round."""
    contenders = {(name, count): Contender(_products(name, count)) for name in DTYPES for count in cores}
    seconds = interleave(contenders, rounds)
    return {(name, count): [count * GFLOP / s for s in seconds[name, count]] for name, count in contenders}


def _products(precision: str, cores: int):
    workers = Workers(cores)
    matrices = [th.ones(3, SIDE, SIDE, dtype=DTYPES[precision]) for _ in range(cores)]
    tasks = [functools.partial(th.mm, a, b, out=product) for a, b, product in matrices]
    return lambda: workers.run(tasks)


def count_arithmetic(settings: Settings) -> tuple[float, float]:
    """The GFLOP per image of a forward pass, and of forward and backward passes together.

    They are counted on the plain path. Arithmetic that the fast path saves raises its rate.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads PyTorch's compiler, which takes a second

    model = make_plain(build(settings)[0])
    with FlopCounterMode(display=False) as counter:
        result = model(random_images(settings, 1), th.zeros(1))
        forward = counter.get_total_flops()
        result.sum().backward()
        return forward / 1e9, counter.get_total_flops() / 1e9
