"""Every objective of the paper really trains: its own loss falls, and so do the bits per dimension."""

import csv

import numpy as np
import pytest
from conftest import read_json
from PIL import Image

MODEL = "--image_size 4 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 4"
TRAINING = "--diffusion_steps 40 --batch_size 16 --microbatch 16 --lr 2e-3 --ema_rate 0.9"
OBJECTIVES = {
    "simple": "",
    "hybrid": "--learn_sigma True",
    "vlb": "--learn_sigma True --use_kl True --schedule_sampler loss-second-moment",
    "xstart": "--predict_xstart True",
    "v": "--prediction v",
    "edm": "--prediction edm --learn_sigma True",
    "log-normal": "--prediction v --schedule_sampler log-normal --loss_weighting edm",
}


@pytest.fixture(scope="module")
def tinted(tmp_path_factory):
    """A folder of pictures in two halves, each picture with a tint of its own."""
    folder = tmp_path_factory.mktemp("tinted")
    rng = np.random.default_rng(0)
    for number in range(64):
        pixels = np.empty((4, 4, 3))
        pixels[:2], pixels[2:] = (200, 60, 40), (30, 90, 210)
        pixels += rng.normal(0, 12, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_objective_and_the_bits_per_dim(name, tinted, tmp_path, call_script):
    run = tmp_path / "run"
    bits = {}
    # The second part resumes the first, and with it, for "vlb", the history of the schedule sampler.
    for steps in (10, 80):
        flags = [*f"{MODEL} {TRAINING} {OBJECTIVES[name]}".split(), "--total_steps", steps]
        done = call_script("image_train.py", "--data_dir", tinted, "--log_dir", run, *flags)
        assert done.returncode == 0, done.stderr
        model = run / f"model{steps:06d}.pt"
        out = tmp_path / f"nll{steps}"
        flags = ["--num_samples", 32, "--batch_size", 32, "--log_dir", out]
        done = call_script("image_nll.py", "--model_path", model, "--data_dir", tinted, *flags)
        assert done.returncode == 0, done.stderr
        bits[steps] = read_json(out / "nll.json")["bits_per_dim"]

    with open(run / "progress.csv", newline="") as file:
        loss = [float(row["loss"]) for row in csv.DictReader(file)]
    assert np.mean(loss[-3:]) < 0.5 * loss[0]
    assert bits[80] < bits[10] - 0.5
