"""Training really learns: the loss falls, and what is drawn afterwards looks like the data."""

import csv

import numpy as np
from conftest import TINY_FLAGS
from PIL import Image

TOP, BOTTOM = (200, 60, 40), (30, 90, 210)  # a red sky over a blue sea


def test_train_then_sample(tmp_path, call_script):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(64):
        pixels = np.empty((8, 8, 3))
        pixels[:4], pixels[4:] = TOP, BOTTOM
        pixels += rng.normal(0, 12, 3)  # each picture has a tint of its own
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data / f"{i}.png")
    run = tmp_path / "run"
    training = ["--batch_size", "16", "--microbatch", "16", "--lr", "2e-3", "--total_steps", "400"]
    flags = [*TINY_FLAGS, "--diffusion_steps", "200", *training]
    call_script("image_train.py", *flags, "--data_dir", data, "--log_dir", run, check=0)

    with open(run / "progress.csv", newline="") as file:
        loss = [float(row["loss"]) for row in csv.DictReader(file)]
    assert loss[0] > 0.5
    assert np.mean(loss[-5:]) < 0.1

    out = tmp_path / "out"
    options = ["--num_samples", "16", "--timestep_respacing", "50", "--log_dir", out]
    call_script("image_sample.py", "--model_path", run, *options, check=0)
    with np.load(out / "samples_16x8x8x3.npz") as arrays:
        images = arrays["arr_0"].astype(float)
    for half, colour in ((images[:, :4], TOP), (images[:, 4:], BOTTOM)):
        means = half.mean(axis=(1, 2))
        assert np.abs(means.mean(axis=0) - colour).max() < 50  # an untrained model's are off by 100
        assert np.abs(half - means[:, None, None]).mean() < 25
