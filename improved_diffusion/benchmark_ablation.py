"""Which optimisations pay: the fast path in turns with one that does without a single of them."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch as th

from improved_diffusion.benchmark import NAMES, Settings, stepping, training_loop
from improved_diffusion.cpu import keep_memory
from improved_diffusion.nn import PointwiseConv1d, PointwiseConv2d, update_ema
from improved_diffusion.plain import usual_memory
from improved_diffusion.timing import Contender, interleave, ratios, spread
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import QKVAttention, ResBlock, Upsample


def measure_ablation(settings: Settings) -> dict[str, Any]:
    """For every optimisation, the factor that training steps lose without it."""
    rows = []
    for precision in settings.precisions:
        fast = stepping(settings, training_loop(settings, precision))
        for name, create in _without(settings, precision).items():
            # In pairs, because each contender has weights, moments and averages of its own to hold in memory.
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
        "note": "the fast path as it is, in turns with the same less one optimisation; a gain above 1 pays",
        "rows": rows,
    }


def _without(settings: Settings, precision: str) -> dict[str, Callable[[], Contender]]:
    """For each optimisation, what makes a contender without it."""
    loop = partial(training_loop, settings, precision)
    step = partial(stepping, settings)
    found = {
        "a microbatch for each core in a pass": lambda: step(_with_small_passes(loop())),
        "attention arranged for CPUs": lambda: step(loop(plain=[QKVAttention])),
        "pointwise convolutions": lambda: step(loop(plain=[PointwiseConv1d, PointwiseConv2d])),
        "scale and shift in the normalisation": lambda: step(loop(plain=[ResBlock])),
        "optimizer and average in blocks": lambda: step(_with_torch_optimizer(loop())),
    }
    if keep_memory():
        found["freed memory kept"] = lambda: Contender(step(loop()).run, prepare=usual_memory)
    if precision == "bf16":
        return {"16 bits": lambda: step(training_loop(settings, "fp32")), **found}
    return {
        **found,
        "fused attention from 128 positions on": lambda: step(_with_products(loop())),
        "upsampling folded into convolution": lambda: step(loop(plain=[Upsample])),
    }


def _with_small_passes(loop: TrainLoop) -> TrainLoop:
    """A pass for each microbatch, as with one core."""
    loop.microbatch = max(1, loop.microbatch // loop.num_workers)
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
        self, gradient: Sequence[th.Tensor], averages: Sequence[tuple[Sequence[th.Tensor], float]]
    ) -> None:
        for p, value in zip(self.params, gradient):
            p.grad = value.to(p.dtype)
        self.adamw.step()
        for tensors, decay in averages:
            update_ema(tensors, self.params, decay)


def _with_products(loop: TrainLoop) -> TrainLoop:
    """Attention by products of matrices at every length, as it is at short ones."""
    for model in loop.gradients.copies.models:
        for module in model.modules():
            if isinstance(module, QKVAttention):
                module.fused_length = math.inf
    return loop
