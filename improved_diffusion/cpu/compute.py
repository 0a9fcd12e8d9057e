"""The choice of precision and number of cores on this machine."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from improved_diffusion import kernels
from improved_diffusion.cpu.machine import has_bf16, usable_cores
from improved_diffusion.cpu.workers import DTYPES, Workers
from improved_diffusion.unet import AttentionBlock, ResBlock

PRECISIONS = ("auto", *DTYPES)
# "auto" takes bfloat16 if layers of a UNet are at least this many times as fast in it, because it costs some accuracy.
WORTHWHILE = 1.15
ROUNDS = 4
# Seconds. PyTorch on ARM64 computes some convolutions in bfloat16 without the instructions for it: a round may take a
# second. Then one round says enough.
TOO_LONG = 0.25


@dataclass(frozen=True)
class Compute:
    """What was chosen.

    :ivar precision: "fp32" or "bf16". :ivar workers: the number of cores.
    """

    precision: str
    workers: int

    def __str__(self) -> str:
        bits = {"fp32": "float32", "bf16": "bfloat16, weights in float32"}[self.precision]
        cores = "1 core" if self.workers == 1 else f"{self.workers} cores"
        generation = kernels.generation()
        compiled = (
            f"with kernels compiled for {generation}"
            if generation
            else f"without compiled kernels, so training takes 1.7 to 2.8 times as long ({kernels.why_none()})"
        )
        return f"{bits}, on {cores}, {compiled}"


def choose(precision: str = "auto", num_workers: str = "auto") -> Compute:
    """Choose the precision and the number of cores.

    :param precision: ``"fp32"``, ``"bf16"``, or ``"auto"``: the one in which this processor is faster.
    :param num_workers: a number of cores, or ``"auto"``: as many as PyTorch has threads. If it is larger than the
        number of usable cores, a warning is printed and that number is taken, because threads that share a core wait
        for each other.
    :raises ValueError: an argument is none of these.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision}: use one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bf16" if bf16_pays() else "fp32"
    if num_workers == "auto":
        return Compute(precision, max(1, min(th.get_num_threads(), usable_cores())))
    if not (num_workers.isdecimal() and 1 <= int(num_workers) <= 1024):
        raise ValueError(f"num_workers {num_workers}: use auto, or a number of cores from 1 to 1024")
    if int(num_workers) > usable_cores():
        print(
            f"WARNING: num_workers {num_workers}: this process may use only {usable_cores()} cores, and uses these"
        )
    return Compute(precision, min(int(num_workers), usable_cores()))


def bf16_pays() -> bool:
    """Whether bfloat16 makes training faster on this processor."""
    return bf16_speedup() >= WORTHWHILE


@functools.cache
def bf16_speedup() -> float:
    """How many times as fast layers of a UNet are in bfloat16 as in float32, forward and backward, on one core.

    It is measured, mostly in a fifth of a second, because a processor's list of instructions says little about its
    speed. For processors without instructions for bfloat16 it is 0, without a measurement.
    """
    if not has_bf16():
        return 0.0
    return Workers(1).run([_time_both])[0]


def _time_both() -> float:
    # The time of this thread, if its clock is fine enough, so that other programs do not count.
    fine = time.get_clock_info("thread_time").resolution < 1e-5
    clock = time.thread_time if fine else time.perf_counter
    times: dict[th.dtype, list[float]] = {dtype: [] for dtype in DTYPES.values()}
    layers = {dtype: _layers(dtype) for dtype in times}
    for _ in range(1 + ROUNDS):
        for dtype, compute in layers.items():
            before = clock()
            compute()
            times[dtype].append(clock() - before)
        first_fp32, first_bf16 = (times[DTYPES[name]][0] for name in ("fp32", "bf16"))
        if first_bf16 > max(TOO_LONG, 10 * first_fp32):
            return first_fp32 / first_bf16
    # The first round is left out, because oneDNN compiles its kernels in it. The fastest of the others was disturbed
    # least.
    fp32, bf16 = (min(times[DTYPES[name]][1:]) for name in ("fp32", "bf16"))
    return fp32 / bf16


def _layers(dtype: th.dtype) -> Callable[[], None]:
    """Evaluates a residual block and an attention block of 64 and 128 channels, on 4 images, and their gradients."""
    with th.random.fork_rng(devices=[]):  # the global random state must not change
        block, attention = ResBlock(128, 64, 0, out_channels=64), AttentionBlock(128, num_heads=4)
    embedding = th.zeros(4, 64, dtype=dtype)
    inputs = []
    for layer, side in ((block, 32), (attention, 16)):
        layer.to(dtype=dtype)
        # Ones, because the values do not matter.
        inputs.append(th.ones(4, 128, side, side, dtype=dtype, requires_grad=True))
        if kernels.generation() is not None:
            layer.to(memory_format=th.channels_last)
            inputs[-1] = inputs[-1].detach().to(memory_format=th.channels_last).requires_grad_()

    def compute() -> None:
        (block(inputs[0], embedding).sum() + attention(inputs[1]).sum()).backward()

    return compute
