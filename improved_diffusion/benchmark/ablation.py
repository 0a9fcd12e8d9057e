"""What each optimisation gains: the fast path in turns with the same path without one of them."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch as th

from improved_diffusion import kernels
from improved_diffusion.benchmark.plain import usual_memory
from improved_diffusion.benchmark.settings import NAMES, Settings, stepping, training_loop
from improved_diffusion.benchmark.timing import Contender, interleave, ratios, spread
from improved_diffusion.cpu.gradients import Passes
from improved_diffusion.cpu.machine import keep_memory
from improved_diffusion.cpu.workers import Workers
from improved_diffusion.nn import Conv2d, PointwiseConv1d, PointwiseConv2d, update_ema
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import QKVAttention, ResBlock


def measure_ablation(settings: Settings) -> dict[str, Any]:
    """For every optimisation, the factor by which training steps are slower without it."""
    rows = []
    for precision in settings.precisions:
        fast = stepping(settings, training_loop(settings, precision))
        for name, create in _without(settings, precision).items():
            # In pairs, because each contender holds its own weights, moments and averages in memory.
            seconds = interleave({"with": fast, "without": create()}, settings.rounds)
            rows.append(
                {
                    "precision": NAMES[precision],
                    "optimisation": name,
                    "ms_with": 1e3 * statistics.median(seconds["with"]),
                    "ms_without": 1e3 * statistics.median(seconds["without"]),
                    "gain": spread(ratios(seconds["without"], seconds["with"])),
                }
            )
    return {
        "title": f"What each optimisation gains, in steps of {settings.batch_size} images",
        "note": "the fast path in turns with the same path without one optimisation; above 1 the optimisation helps; "
        "without what is part of blocks, blocks are not one operation either",
        "rows": rows,
    }


def _without(settings: Settings, precision: str) -> dict[str, Callable[[], Contender]]:
    """For each optimisation, a function that makes a contender without it."""
    loop = partial(training_loop, settings, precision)
    step = partial(stepping, settings)
    found = {
        "a pass for each core": lambda: step(_in_one_pass(loop())),
        "blocks as one operation": lambda: step(loop(layered=True)),
        "attention as one operation": lambda: step(loop(plain=[QKVAttention])),
        "normalisation and activation as one operation": lambda: step(loop(plain=[ResBlock])),
        "one operation for AdamW and averages": lambda: step(_with_torch_optimizer(loop())),
    }
    if kernels.generation() is not None:
        found["convolutions by minimal filtering"] = lambda: step(loop(plain=[Conv2d]))
        found["compiled kernels"] = lambda: _without_kernels(loop, step)
    else:
        found["pointwise convolutions"] = lambda: step(loop(plain=[PointwiseConv1d, PointwiseConv2d]))
    if keep_memory():
        found["freed memory kept"] = lambda: Contender(step(loop()).run, prepare=usual_memory)
    if precision == "bf16":
        return {"16 bits": lambda: step(training_loop(settings, "fp32")), **found}
    return found


def _without_kernels(loop: Callable[[], TrainLoop], step: Callable[[TrainLoop], Contender]) -> Contender:
    """A contender that is built and run with the kernels switched off."""

    def run_without(run: Callable[[], object]) -> object:
        with kernels.switched("0"):
            return run()

    contender = run_without(lambda: step(loop()))
    return Contender(partial(run_without, contender.run))


def _in_one_pass(loop: TrainLoop) -> TrainLoop:
    """Passes on all cores together, which take a microbatch for each."""
    cores = loop.num_workers
    loop.passes = Passes(1, cores, loop.microbatch * cores)
    loop.workers = loop.gradients.workers = Workers(1, cores)
    return loop


def _with_torch_optimizer(loop: TrainLoop) -> TrainLoop:
    """PyTorch's AdamW on all parameters, then the moving average of all."""
    loop.opt = _TorchOptimizer(loop.params)
    return loop


class _TorchOptimizer:
    def __init__(self, params: Sequence[th.Tensor]):
        self.params = params
        self.adamw = th.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)

    def step(
        self,
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]],
        copies: Sequence[th.Tensor | None],
        factor: float,
        more: Sequence[th.Tensor],
    ) -> None:
        assert factor == 1, "the benchmark does not clip"
        for p, value in zip(self.params, gradient):
            p.grad = value.to(p.dtype)
        for p, value in zip(self.params, more):
            p.grad += value
        self.adamw.step()
        for tensors, decay in averages:
            update_ema(tensors, self.params, decay)
        for copy, p in zip(copies, self.params):
            if copy is not None:
                copy.copy_(p.detach())
