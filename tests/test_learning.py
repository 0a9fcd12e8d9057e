"""Training really learns: the loss falls, and what is drawn afterwards looks like the data."""

import csv

import numpy as np
from conftest import TINY_FLAGS
from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def test_train_then_sample(tmp_path, run_script):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for i in range(32):
            pixels = np.clip(np.array(colour) + rng.integers(-15, 16, 3), 0, 255).astype(np.uint8)
            Image.fromarray(np.broadcast_to(pixels, (8, 8, 3)).copy()).save(data / f"{name}_{i}.png")
    run = tmp_path / "run"
    model = [*TINY_FLAGS, "--diffusion_steps", "200", "--class_cond", "True"]
    training = ["--batch_size", "16", "--microbatch", "16", "--lr", "2e-3", "--total_steps", "400"]
    run_script("image_train.py", *model, *training, "--data_dir", data, "--log_dir", run, check=0)

    with open(run / "progress.csv", newline="") as file:
        loss = [float(row["loss"]) for row in csv.DictReader(file)]
    assert loss[0] > 0.8
    assert np.mean(loss[-5:]) < 0.15

    out = tmp_path / "out"
    options = ["--num_samples", "16", "--timestep_respacing", "50", "--class_label", "red,blue"]
    run_script("image_sample.py", "--model_path", run, *options, "--log_dir", out, check=0)
    with np.load(out / "samples_16x8x8x3.npz") as arrays:
        images, labels = arrays["arr_0"].astype(float), arrays["arr_1"]
    assert labels.tolist() == [1, 0] * 8  # classes are numbered by name: blue, red
    means = images.mean(axis=(1, 2))
    for label, colour in ((0, COLOURS["blue"]), (1, COLOURS["red"])):
        assert np.abs(means[labels == label].mean(axis=0) - colour).max() < 30
        assert np.abs(images[labels == label] - means[labels == label][:, None, None]).mean() < 25
