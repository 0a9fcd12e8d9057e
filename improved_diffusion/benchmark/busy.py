"""What is left of the speed of training and sampling while other programs compute on the same cores."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch as th

from improved_diffusion.benchmark.sampling import BATCH
from improved_diffusion.benchmark.settings import NAMES, Settings, build, random_images, training_loop
from improved_diffusion.benchmark.timing import ratios, seconds_of, spread
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.cpu.machine import keep_memory

ROUNDS = 5
SECONDS = 2.0  # of each measurement; the system moves programs between cores several times a second
SETTLE = 0.5  # seconds in which a process starts to compute
COMPUTE = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"


def measure_busy(settings: Settings) -> dict[str, Any]:
    """Training steps and forward passes, alone and beside processes that compute without a pause."""
    precision, cores = settings.compute.precision, settings.compute.workers
    loop = training_loop(settings, precision)
    batch = random_images(settings, settings.batch_size)
    model = fast_model(build(settings)[0].eval(), precision, cores)
    images, timesteps = random_images(settings, BATCH), th.full((BATCH,), 500.0)
    work = {
        "training": (settings.batch_size, lambda: loop.run_step(batch, {})),
        "sampling": (BATCH, partial(model, images, timesteps)),
    }
    keep_memory()
    rows = []
    for name, (count, run) in work.items():
        run()  # the first compiles
        seconds: dict[int, list[float]] = {others: [] for others in (0, 1, 2 * cores)}
        for _ in range(min(settings.rounds, ROUNDS)):
            for others, values in seconds.items():
                with busy_processes(others):
                    values.append(_mean_seconds(run))
        rows += [
            {
                "work": name,
                "busy_processes": others,
                "images_per_second": count / statistics.median(values),
                "percent_of_idle": spread(ratios(seconds[0], values), 100),
            }
            for others, values in seconds.items()
        ]
    return {
        "title": f"Beside busy processes, in {NAMES[precision]} on {cores} core(s)",
        "note": "training steps and forward passes while other processes compute without a pause; if the system "
        "divides the cores evenly, one process on two cores leaves 67%, four leave 33%",
        "rows": rows,
    }


def _mean_seconds(run: Callable[[], object]) -> float:
    """How long `run` takes, the mean of as many calls as last `SECONDS`."""
    taken: list[float] = []
    while sum(taken) < SECONDS:
        taken.append(seconds_of(run))
    return statistics.fmean(taken)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes that compute without a pause, within the block; they also end when this process does."""
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", COMPUTE, str(os.getpid())]) for _ in range(count)
    ]
    try:
        if count:
            time.sleep(SETTLE)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
