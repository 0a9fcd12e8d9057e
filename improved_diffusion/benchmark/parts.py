"""Where the time of a training step goes, on one core: convolutions, attention, normalisation, optimizer, data."""

import os
import statistics
from typing import Any

import torch as th
from torch.autograd.profiler import profile

from improved_diffusion.benchmark.settings import NAMES, Settings, random_images, training_loop
from improved_diffusion.benchmark.timing import ratios, seconds_of, spread
from improved_diffusion.cpu.machine import keep_memory
from improved_diffusion.data.batch_stream import BatchStream
from improved_diffusion.train_util import TrainLoop

# The parts that operations belong to. The first of these texts that occurs in an operation's name decides.
OPERATIONS = {
    "conv": "convolution",
    "pointwise": "convolution",  # that with a kernel of size 1
    "baddbmm": "convolution",  # that with a kernel of size 1, in 16 bits
    "bmm": "attention",
    "softmax": "attention",
    "scaleddotproduct": "attention",
    "attention": "attention",
    "linear": "convolution",  # that with a kernel of size 1, in 16 bits and channels_last
    "addmm": "convolution",
    "groupnorm": "normalisation and activation",
    "normact": "normalisation and activation",
    "silu": "normalisation and activation",
}
PARTS = (
    "convolution, forward",
    "convolution, backward",
    "attention",
    "normalisation and activation",
    "other operations",
)
BACKWARD = "autograd::engine::evaluate_function: "


def measure_parts(settings: Settings) -> dict[str, Any]:
    """The parts of a step on the fast path in the precision of `settings`, on one core."""
    precision = settings.compute.precision
    images = settings.read_images()
    stream = BatchStream(images, settings.batch_size)
    loop = training_loop(settings, precision, workers=1, layered=True)
    keep_memory()
    rounds = [_time_parts(settings, loop, stream) for _ in range(1 + settings.rounds)][1:]
    steps = [sum(seconds.values()) for seconds in rounds]
    rounds = [{**seconds, "whole step": step} for seconds, step in zip(rounds, steps)]
    return {
        "title": f"Parts of a step of {settings.batch_size} images in {NAMES[precision]}, on one core",
        "note": "operations in forward and backward passes, by PyTorch's profiler; each layer is one operation here, "
        "which takes a little longer than one for each block; copies and additions, also those of attention, are "
        "among the other operations",
        "rows": [
            {
                "part": part,
                "ms_per_step": spread([seconds[part] for seconds in rounds], 1e3),
                "percent": 100 * statistics.median(ratios([seconds[part] for seconds in rounds], steps)),
            }
            for part in rounds[0]
        ],
    }


def _time_parts(settings: Settings, loop: TrainLoop, stream: BatchStream) -> dict[str, float]:
    """The seconds of each part of one step. "rest" is what remains of the whole."""
    batch, _ = next(stream)
    microbatches = settings.batch_size / settings.microbatch
    step = seconds_of(lambda: loop.run_step(batch, {}))
    seconds = {part: microbatches * value for part, value in _profile(settings, loop).items()}
    gradients = loop.gradients
    weights = list(gradients.copies.models[0].parameters())
    gradients.values = [th.full_like(p, 1e-3) for p in weights]
    gradients.more = [th.full_like(p, 1e-3) for p in weights if microbatches > 1]
    averages = [(average, 0.9999) for average in loop.ema_params.values()]
    seconds["gradient norm"] = seconds_of(gradients.norm)
    seconds["AdamW and moving average"] = seconds_of(
        lambda: loop.opt.step(gradients.values, averages, gradients.copies.in_16_bits, more=gradients.more)
    )
    gradients.clear()
    rest = step - sum(seconds.values())
    return {
        **seconds,
        "rest: draws, sums of gradients, Python": rest,
        "data": seconds_of(lambda: next(stream)),
    }


def _profile(settings: Settings, loop: TrainLoop) -> dict[str, float]:
    """The seconds that each of `PARTS` takes in the passes of a microbatch."""
    images = random_images(settings, settings.microbatch)
    timesteps = th.arange(settings.microbatch) % loop.diffusion.num_timesteps
    model = loop.gradients.copies.models[0]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler would print every start and end
    threads = th.get_num_threads()
    th.set_num_threads(1)
    try:
        with profile() as profiler:
            loss = loop.diffusion.training_losses(model, images, timesteps)["loss"].mean()
            th.autograd.grad(loss, list(model.parameters()))
    finally:
        th.set_num_threads(threads)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.function_events:
        if event.cpu_parent is None:  # the others are inside these
            seconds[_part(event.name)] += event.time_range.elapsed_us() / 1e6
    return seconds


def _part(operation: str) -> str:
    plain_name = operation.lower().replace("_", "")
    part = next((part for name, part in OPERATIONS.items() if name in plain_name), "other operations")
    if part == "convolution":
        part += ", backward" if operation.startswith(BACKWARD) else ", forward"
    return part
