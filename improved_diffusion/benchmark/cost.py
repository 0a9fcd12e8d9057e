"""What training costs in memory and time, in processes of their own that run the training command."""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from improved_diffusion.benchmark.settings import NAMES, Settings
from improved_diffusion.benchmark.timing import spread
from improved_diffusion.config import TrainConfig
from improved_diffusion.jobs.train import run_training

STEPS = 6
LOG_INTERVAL = 3  # so that the last row holds no work that is done only once
ROUNDS = 3  # of the table of costs: each of its processes takes some seconds to start
LARGEST_MICROBATCH = 16
VARIED = {
    "batch_size": (4, 8, 16, 32),
    "microbatch": (1, 2, 4, 8, LARGEST_MICROBATCH),
    "num_channels": (32, 64, 128),
    "image_size": (32, 64),
}


def measure_memory(settings: Settings) -> dict[str, Any]:
    """The peak memory of the training command at this configuration."""
    done = train(settings, {"sample_interval": STEPS})
    return {
        "title": "Memory of training",
        "note": f"the largest resident size of the only process of a training command, in millions of bytes, from its "
        f"start, over reading the images ({settings.data_dir}) and {STEPS} steps, to a preview, a checkpoint and "
        "the workbook",
        "rows": [
            {
                "precision": NAMES[settings.compute.precision],
                "cores": settings.compute.workers,
                "peak_megabytes": done["peak_megabytes"],
            }
        ],
    }


def measure_cost(settings: Settings) -> dict[str, Any]:
    """How speed and memory depend on the configuration: one flag varied at a time, on one core and on all."""
    cases = [(changes, cores) for changes in variations(settings) for cores in settings.cores]
    results: list[list[dict[str, Any]]] = [[] for _ in cases]
    for _ in range(min(settings.rounds, ROUNDS)):
        for (changes, cores), done in zip(cases, results):
            done.append(train(settings, {**changes, "num_workers": str(cores), "sample_interval": 0}))
    return {
        "title": f"How the cost of training grows, in {NAMES[settings.compute.precision]}",
        "note": f"training commands without previews, in turns; the last {LOG_INTERVAL} of {STEPS} steps are timed",
        "rows": [
            {
                "flags": " ".join(f"--{name} {value}" for name, value in changes.items()),
                "cores": cores,
                "images_per_second": spread([one["images_per_second"] for one in done]),
                "peak_megabytes": done[0]["peak_megabytes"]
                and statistics.median(one["peak_megabytes"] for one in done),
            }
            for (changes, cores), done in zip(cases, results)
        ],
    }


def variations(settings: Settings) -> list[dict[str, int]]:
    """Flags to change, from one row of the table to the next."""
    enough = max(settings.batch_size, LARGEST_MICROBATCH * settings.compute.workers)
    return [
        {"batch_size": enough, name: value} if name == "microbatch" else {name: value}
        for name, values in VARIED.items()
        for value in values
    ]


def train(settings: Settings, changes: dict[str, Any]) -> dict[str, float | None]:
    """Run a training command of a few steps in a process of its own.

    :param changes: flags that differ from those of `settings`.
    :return: images_per_second, and peak_megabytes (None where the system does not report it).
    :raises ValueError: it failed; the message holds the last line that it printed.
    """
    flags = {
        **settings.model,
        "batch_size": settings.batch_size,
        "microbatch": settings.microbatch,
        "data_dir": settings.data_dir,
        "precision": settings.compute.precision,
        "num_workers": str(settings.compute.workers),
        "total_steps": STEPS,
        "log_interval": LOG_INTERVAL,
        **changes,
    }
    command = [sys.executable, "-m", "improved_diffusion.benchmark.cost"]
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps({**flags, "log_dir": folder})
        process = subprocess.run(command, input=given, capture_output=True, text=True)
    lines = (process.stdout + process.stderr).strip().splitlines()
    if process.returncode:
        raise ValueError(
            f"training with {changes} ended with code {process.returncode}: {lines[-1] if lines else ''}"
        )
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    """Train with the flags that are given as JSON on stdin, and print what it cost as the last line."""
    given = json.load(sys.stdin)
    run_training(TrainConfig(**given), set(given), "")
    with open(os.path.join(given["log_dir"], "progress.csv"), encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    print(
        json.dumps({"images_per_second": float(last["images_per_sec"]), "peak_megabytes": peak_megabytes()})
    )


def peak_megabytes() -> float | None:
    """The largest resident size of this process so far, in 10^6 bytes; None where the system does not report it."""
    try:
        # Unlike getrusage, this does not start at the size of the parent process.
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    main()
