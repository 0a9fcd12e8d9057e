"""A thousand steps in 16 bits on two cores learn what they learn in 32 bits on one."""

import csv

import numpy as np
import pytest
import torch as th
from conftest import TINY

from improved_diffusion import logger
from improved_diffusion.image_datasets import BatchStream, read_images
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.train_util import TrainLoop


def train(folder, precision, num_workers):
    """The mean squared error of each ten steps."""
    logger.configure(str(folder))
    th.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**TINY)
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=BatchStream(read_images("builtin", TINY["image_size"]), 8),
        batch_size=8,
        microbatch=4,
        lr=1e-3,
        total_steps=1000,
        precision=precision,
        num_workers=num_workers,
    ).run_loop()
    with open(folder / "progress.csv", newline="") as file:
        return np.array([float(row["mse"]) for row in csv.DictReader(file)])


def test_a_thousand_steps(tmp_path):
    exact = train(tmp_path / "fp32", "fp32", 1)
    fast = train(tmp_path / "bf16", "bf16", 2)
    assert len(exact) == len(fast) == 100
    assert exact[-30:].mean() < 0.3 * exact[0]
    assert not np.array_equal(exact, fast)
    assert fast[-30:].mean() == pytest.approx(exact[-30:].mean(), rel=0.01)
