"""The same command gives the same bits: whatever process, number of workers or place of the data."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from conftest import SCRIPTS, TINY_FLAGS
from PIL import Image
from training_process import assert_same_run, rows, run_training

from improved_diffusion.run import checkpoint

STEPS = 8
FLAGS = ["--class_cond", "True", "--dropout", "0.2", "--random_flip", "True", "--lr", "1e-3"]
FLAGS += ["--batch_size", "8", "--microbatch", "3", "--ema_rate", "0.9,0.99", "--seed", "5"]
FLAGS += ["--diffusion_steps", "3", "--schedule_sampler", "loss-second-moment"]
FLAGS += ["--total_steps", str(STEPS), "--log_interval", "2", "--save_interval", "5", "--precision", "fp32"]
STREAMED = ["--cache_limit_gb", "0"]
RUNS = {
    "in memory": [],
    "a copy of the folder": [],
    "streamed by the main process": [*STREAMED, "--data_workers", "0"],
    "streamed by a worker": [*STREAMED, "--data_workers", "1"],
    "streamed by two workers": [*STREAMED, "--data_workers", "2"],
    "other seed": ["--seed", "6"],
}
SAME = [name for name in RUNS if name not in ("in memory", "other seed")]


def make_pictures(folder):
    """Twenty, fewer than are shown, so that the order in a second epoch counts too."""
    folder.mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 9 + index % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'abc'[index % 3]}_{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """The directory of a finished run for each of `RUNS`."""
    root = tmp_path_factory.mktemp("repeatable")
    for name, flags in RUNS.items():
        data = make_pictures(root / "copy") if name == "a copy of the folder" else pictures
        run_training(root / name, "--data_dir", data, *FLAGS, *flags)
    return {name: root / name for name in RUNS}


def file_checksums(run):
    return {name: entry["sha256"] for name, entry in checkpoint.find(str(run)).state["files"].items()}


@pytest.mark.parametrize("name", SAME)
def test_the_same_bits_wherever_the_data_come_from(runs, name):
    assert_same_run(runs["in memory"], runs[name], STEPS)
    assert len(file_checksums(runs[name])) == 4, "weights, two averages, optimizer"
    assert file_checksums(runs[name]) == file_checksums(runs["in memory"])


def test_the_same_bits_in_another_process(runs, pictures, tmp_path):
    """In one that orders Python's sets differently, and where nothing was imported beforehand."""
    command = [sys.executable, str(SCRIPTS / "image_train.py"), *TINY_FLAGS, *FLAGS]
    command += ["--data_dir", str(pictures), "--log_dir", str(tmp_path / "run")]
    hashes = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hashes}, check=True, timeout=300)
    assert_same_run(runs["in memory"], tmp_path / "run", STEPS)


def test_the_runs_compared_are_worth_comparing(runs):
    """They have trained, and the sampler has left its uniform beginning."""
    metrics = rows(runs["in memory"])
    assert [row["step"] for row in metrics] == ["2", "4", "6", "8"]
    assert len({row["loss"] for row in metrics}) == 4
    assert checkpoint.find(str(runs["in memory"])).state["schedule_sampler"]["counts"] == [10, 10, 10]


def test_another_seed_is_another_run(runs):
    one, other = (checkpoint.find(str(runs[name])) for name in ("in memory", "other seed"))
    for kind in ("model", "0.9", "0.99"):
        pairs = zip(one.load(kind).values(), other.load(kind).values(), strict=True)
        assert any(not th.equal(a, b) for a, b in pairs)
    metrics = zip(rows(runs["in memory"]), rows(runs["other seed"]), strict=True)
    assert all(a["loss"] != b["loss"] for a, b in metrics)
