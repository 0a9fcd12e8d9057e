"""The speed of training: the fast path against the plain one, and the whole command against its bare step."""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch as th

from improved_diffusion import logger
from improved_diffusion.benchmark.peaks import count_arithmetic, matrix_rates
from improved_diffusion.benchmark.plain import PlainTraining, usual_memory
from improved_diffusion.benchmark.settings import (
    NAMES,
    Settings,
    build,
    random_images,
    stepping,
    training_loop,
)
from improved_diffusion.benchmark.timing import Contender, interleave, ratios, seconds_of, spread
from improved_diffusion.config import RunFlags
from improved_diffusion.cpu.machine import keep_memory
from improved_diffusion.data.batch_stream import BatchStream
from improved_diffusion.train_util import TrainLoop

LOG_INTERVAL = RunFlags().log_interval
MEASURED_INTERVAL = 2  # in the measurement, to have as many steps with a row of metrics as without
WARM_UP = 4


def measure_training(settings: Settings) -> dict[str, Any]:
    """Whole optimizer steps: forward, backward, norm, AdamW, moving average."""
    workers = settings.compute.workers
    plain = PlainTraining(*build(settings), settings.microbatch)
    batch = random_images(settings, settings.batch_size)
    contenders = {"plain": Contender(lambda: plain.step(batch), usual_memory, workers)}
    for precision in settings.precisions:
        contenders[precision] = stepping(settings, training_loop(settings, precision))
    seconds = interleave(contenders, settings.rounds)

    gflop = settings.batch_size * count_arithmetic(settings)[1]
    matrix_rate = matrix_rates(tuple(settings.cores), settings.rounds)
    rows = []
    for name, values in seconds.items():
        precision = "fp32" if name == "plain" else name
        median = statistics.median(values)
        rows.append(
            {
                "path": f"{'plain' if name == 'plain' else 'fast'} {NAMES[precision]}",
                "ms_per_step": spread(values, 1e3),
                "images_per_second": settings.batch_size / median,
                "times_plain": spread(ratios(seconds["plain"], values)),
                "gflop_per_second": gflop / median,
                "percent_of_matrix_rate": 100 * gflop / median / max(matrix_rate[precision, workers]),
            }
        )
    note = (
        f"{gflop / settings.batch_size:.2f} GFLOP per image, forward and backward, counted on the plain path; the last "
        f"column divides by the best rate of matrix products on {workers} core(s) in the same precision, which "
        "convolutions may exceed"
    )
    return {
        "title": f"Training: steps of {settings.batch_size} images on {workers} core(s)",
        "note": note,
        "rows": rows,
    }


def measure_command(settings: Settings) -> dict[str, Any]:
    """What training costs beyond gradients, AdamW and the moving average: data, noise, norm, metrics."""
    bare, whole = _time_command(settings)
    # Step n, counted from 1, writes a row when the interval divides n.
    slower = ratios(whole, bare)
    without, with_row = slower[::MEASURED_INTERVAL], slower[1::MEASURED_INTERVAL]
    share = 1 / LOG_INTERVAL
    average = (1 - share) * statistics.median(without) + share * statistics.median(with_row)
    overhead = 100 * (average - 1)
    return {
        "title": f"The whole training command in {NAMES[settings.compute.precision]}, and its bare step",
        "note": f"with a row of metrics every {LOG_INTERVAL} steps, {overhead:.1f}% more than its bare "
        "step; checkpoints and previews, every 1000 steps, are not counted",
        "overhead_percent": overhead,
        "rows": [
            {"step": "gradients, AdamW, average", "ms_per_step": spread(bare, 1e3)},
            {
                "step": "whole: data, noise, norm too",
                "ms_per_step": spread(whole[::MEASURED_INTERVAL], 1e3),
                "times_bare": spread(without),
            },
            {
                "step": "whole, and a row of metrics",
                "ms_per_step": spread(whole[1::MEASURED_INTERVAL], 1e3),
                "times_bare": spread(with_row),
            },
        ],
    }


def _time_command(settings: Settings) -> tuple[list[float], list[float]]:
    """The seconds of bare steps and of those of a training loop that runs in turns with them."""
    images = settings.read_images()
    timed = WARM_UP + MEASURED_INTERVAL * settings.rounds
    turns = _Turns(BatchStream(images, settings.batch_size))
    loop = training_loop(
        settings,
        settings.compute.precision,
        data=turns,
        total_steps=timed + 1,  # the last, with a checkpoint, is not timed
        log_interval=MEASURED_INTERVAL,
    )
    turns.bare_step = _bare_step(loop)
    keep_memory()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        logger.configure(folder)
        try:
            if loop.run_loop() is not None:
                raise KeyboardInterrupt  # the loop has caught it, in order to save first
        finally:
            logger.close()
    return turns.bare[WARM_UP:], turns.whole[WARM_UP:]


def _bare_step(loop: TrainLoop) -> Callable[[], None]:
    """A step that computes the gradient of the last step of `loop` again, with the same draws, and updates the
    weights and averages by it."""
    compute, latest = loop.compute_gradient, []

    def remember(drawn):
        latest[:] = [drawn]
        return compute(drawn)

    def step() -> None:
        compute(*latest)
        averages = [(average, float(rate)) for rate, average in loop.ema_params.items()]
        gradients = loop.gradients
        loop.opt.step(gradients.values, averages, gradients.copies.in_16_bits, more=gradients.more)
        loop.gradients.clear()

    loop.compute_gradient = remember
    return step


class _Turns:
    """Data for a training loop that times its steps, and a bare one between every two of them."""

    def __init__(self, stream: Iterator):
        self.stream = stream
        self.bare_step: Callable[[], object]
        self.whole: list[float] = []
        self.bare: list[float] = []
        self.began: float | None = None

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        if self.began is not None:
            self.whole.append(time.perf_counter() - self.began)
            self.bare.append(seconds_of(self.bare_step))
        self.began = time.perf_counter()
        return next(self.stream)
