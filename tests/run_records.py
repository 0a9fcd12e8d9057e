"""The records of a run, as a training leaves them, for the tests of what is made of them."""

import csv
import json

import numpy as np
from PIL import Image

QUARTILES = [f"{base}{suffix}" for base in ("loss", "mse") for suffix in ("", "_q0", "_q1", "_q2", "_q3")]
COLUMNS = ["step", "samples", *QUARTILES, "grad_norm", "param_norm", "lr", "images_per_sec", "elapsed"]


def write_rows(run_dir, rows, name="progress.csv"):
    with open(run_dir / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def numbers(count, interval=10):
    """Rows of a plausible run, in which one quartile in seven has no value."""
    rng = np.random.default_rng(0)
    for index in range(1, count + 1):
        step = index * interval
        losses = (0.03 + np.exp(-step / 100) * rng.uniform(0.8, 1.2, len(QUARTILES))).tolist()
        cells = [
            value if index % 7 or not name.endswith("q3") else "" for name, value in zip(QUARTILES, losses)
        ]
        yield [step, 8 * step, *cells, 0.1 + 1 / step, 100.5, 1e-4, 19.25, 0.5 * step]


def make_run(path):
    """A complete run directory: 60 rows, two checkpoints, a preview; returns `path`."""
    (path / "samples").mkdir(parents=True)
    write_rows(path, [COLUMNS, *numbers(60)])
    checkpoints = [
        ["step", "samples", "saved_at", "elapsed", "seconds", "megabytes", "files"],
        [300, 2400, "2025-01-02T03:04:05+01:00", 150.0, 0.5, 120.25, "model000300.pt opt000300.pt"],
        [600, 4800, "2025-01-02T04:04:05+01:00", 300.0, 0.5, 120.25, "model000600.pt opt000600.pt"],
    ]
    write_rows(path, checkpoints, "checkpoints.csv")
    arguments = {
        "total_steps": 1200,
        "lr": 1e-4,
        "diffusion_steps": 1000,
        "data_dir": "=1+1",
        "class_cond": True,
    }
    (path / "args.json").write_text(json.dumps(arguments))
    info = {
        "defaults": {**arguments, "total_steps": 30000, "class_cond": False, "data_dir": ""},
        "data": {"source": "/data/cifar_train", "images": 50000, "classes": {"cat": 25000, "dog": 25000}},
        "machine": {"processor": "Some CPU", "cores": 4, "threads": 2, "memory_gb": 7.5, "python": "3.12"},
        "model": {"parameters": 1234567},
        "started": "2025-01-02T02:00:00",
        "sessions": [
            {"started": "2025-01-02T02:00:00", "step": 0},
            {"started": "2025-01-02T03:30:00", "step": 300},
        ],
        "command": "python image_train.py",
    }
    (path / "run.json").write_text(json.dumps(info))
    Image.new("RGB", (80, 60), "red").save(path / "samples" / "step_000300.png")
    return path


def evaluation(path, distance, warnings=(), **more):
    metrics = {"kernel_distance[net.pt]": distance, "kernel_distance_std[net.pt]": 0.01}
    facts = {"features": "net.pt", "images": 500, "reference_images": 60, "images_path": path}
    return {**facts, "metrics": metrics, "warnings": list(warnings), **more}
