"""Training in 16 bits learns what it learns in 32."""

import csv

import numpy as np
import pytest
import torch as th
from conftest import TINY

from improved_diffusion import logger
from improved_diffusion.image_datasets import BatchStream, read_images
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.train_util import TrainLoop


def train(folder, precision):
    """The mean squared error of each ten steps."""
    logger.configure(str(folder))
    th.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**TINY)
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=BatchStream(read_images("builtin", TINY["image_size"]), 8),
        batch_size=8,
        lr=1e-3,
        total_steps=120,
        precision=precision,
    ).run_loop()
    with open(folder / "progress.csv", newline="") as file:
        return np.array([float(row["mse"]) for row in csv.DictReader(file)])


def test_both_learn_the_same(tmp_path):
    exact = train(tmp_path / "fp32", "fp32")
    fast = train(tmp_path / "bf16", "bf16")
    assert len(exact) == len(fast) == 12
    assert exact[-6:].mean() < 0.3 * exact[0]
    assert not np.array_equal(exact, fast)
    # Both are shown the same images, noise and timesteps. Rounding moves this mean by up to 0.6%.
    assert fast[-6:].mean() == pytest.approx(exact[-6:].mean(), rel=0.02)
