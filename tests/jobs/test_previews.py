"""Pictures in training: always the same noise, no trace in the training, no reason to end it."""

import os
import sys
import types

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_FLAGS
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion.jobs.previews import COUNT, create_preview, draw_preview, preview_labels
from improved_diffusion.run import checkpoint
from improved_diffusion.sample_util import Subject
from improved_diffusion.script_util import create_model_and_diffusion

CELL = 80  # pixels of an 8-pixel image and its margin, eight times enlarged


@pytest.fixture(scope="module")
def diffusion():
    return create_model_and_diffusion(**TINY, diffusion_steps=30)[1]


def model(x, timesteps, y=None, low_res=None):
    prediction = 0.9 * x
    if y is not None:
        prediction = prediction - y.view(-1, 1, 1, 1) / 10
    if low_res is not None:
        prediction = prediction + low_res.mean((1, 2, 3), keepdim=True)
    return prediction


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_the_same_picture_every_time_and_no_trace(tmp_path, diffusion):
    subject = Subject(image_size=8, seed=3)
    state = th.random.get_rng_state()
    draw_preview(model, diffusion, subject, str(tmp_path / "a.png"))
    assert th.equal(th.random.get_rng_state(), state)
    th.manual_seed(1)
    draw_preview(model, diffusion, subject, str(tmp_path / "b.png"))
    draw_preview(model, diffusion, Subject(image_size=8, seed=4), str(tmp_path / "c.png"))
    a, b, c = (read(tmp_path / f"{name}.png") for name in "abc")
    assert a.shape == (4 * CELL + 16, 4 * CELL + 16, 3) and COUNT == 16
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_row_for_each_class(tmp_path, diffusion):
    assert preview_labels(3).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(preview_labels(1000)) == 40
    seen = []

    def watched(x, timesteps, y):
        seen.append(y.tolist())
        return model(x, timesteps, y)

    subject = Subject(image_size=8, labels=preview_labels(6))
    draw_preview(watched, diffusion, subject, str(tmp_path / "a.png"))
    assert read(tmp_path / "a.png").shape[:2] == (6 * CELL + 16, 4 * CELL + 16)
    assert seen[0] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 and seen[-1] == [4] * 4 + [5] * 4


def test_what_is_enlarged_is_shown_beside(tmp_path, diffusion):
    low_res = th.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    draw_preview(model, diffusion, Subject(8, low_res=low_res), str(tmp_path / "a.png"))
    picture = read(tmp_path / "a.png")
    assert picture.shape[:2] == (2 * CELL + 16, 8 * CELL + 16)  # rows of four pairs
    places = [(row, 2 * column) for row in range(2) for column in range(4)][:6]
    shown = [int(picture[40 + CELL * row, 40 + CELL * column, 0]) for row, column in places]
    assert shown == [0, 51, 102, 153, 204, 255]


def test_a_picture_that_fails_leaves_no_file_and_no_folder(tmp_path, diffusion):
    def broken(x, timesteps):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        create_preview(diffusion, Subject(8), str(tmp_path))(broken, 7)
    assert os.listdir(tmp_path / "samples") == []
    with pytest.raises(OSError):
        create_preview(diffusion, Subject(8), str(tmp_path / "gone"))(model, 7)
    assert not (tmp_path / "gone").exists()


FLAGS = ["--save_interval", "3", "--log_interval", "1", "--diffusion_steps", "20", "--dropout", "0.1"]


def weights(folder):
    found = checkpoint.find(str(folder))
    return [found.load("model"), found.load("0.9999")]


def test_a_training_draws_and_is_not_disturbed(tmp_path, call_script):
    def train(*args):
        done = call_script("image_train.py", "--data_dir", "builtin", *TINY_FLAGS, *FLAGS, *args)
        assert done.returncode == 0, done.stderr

    # Every second step, and the last one, which is odd.
    drawn = ["step_000002.png", "step_000004.png", "step_000005.png"]
    for name, interval in (("with", 2), ("without", 0)):
        train("--total_steps", 5, "--sample_interval", interval, "--log_dir", tmp_path / name)
    assert sorted(os.listdir(tmp_path / "with" / "samples")) == drawn
    assert not (tmp_path / "without" / "samples").exists()
    for a, b in zip(weights(tmp_path / "with"), weights(tmp_path / "without")):
        assert all(th.equal(a[name], b[name]) for name in a)
    assert len(load_workbook(tmp_path / "with" / "results.xlsx")["Samples"]._images) == 3

    # Steps 4 and 5 are drawn once more, with the same result, by a run that goes on from step 3.
    before = [(tmp_path / "with" / "samples" / name).read_bytes() for name in drawn]
    for name in os.listdir(tmp_path / "with"):
        if "000005" in name:
            (tmp_path / "with" / name).unlink()
    (tmp_path / "with" / "samples" / ".tmp-1234-step_000004.png").write_text("left by a killed process")
    train("--total_steps", 5, "--sample_interval", 2, "--log_dir", tmp_path / "with")
    assert sorted(os.listdir(tmp_path / "with" / "samples")) == drawn
    assert [(tmp_path / "with" / "samples" / name).read_bytes() for name in drawn] == before

    # A run that has reached its last step without a picture of it makes up for it.
    train("--total_steps", 5, "--sample_interval", 2, "--log_dir", tmp_path / "without")
    assert os.listdir(tmp_path / "without" / "samples") == drawn[-1:]
    assert (tmp_path / "without" / "samples" / drawn[-1]).read_bytes() == before[-1]


def test_classes_and_super_resolution(tmp_path, call_script):
    size = [
        "--num_channels",
        "32",
        "--num_res_blocks",
        "1",
        "--channel_mult",
        "1",
        "--attention_resolutions",
        "8",
    ]
    flags = ["--data_dir", "builtin", *size, *FLAGS, "--class_cond", "True", "--class_dropout", "0.1"]
    flags += ["--total_steps", "1", "--sample_interval", "1"]
    for script, extra, pixels in (
        ("image_train.py", ["--image_size", "8"], (10 * CELL + 16, 4 * CELL + 16)),
        ("super_res_train.py", ["--large_size", "8", "--small_size", "4"], (4 * CELL + 16, 8 * CELL + 16)),
    ):
        done = call_script(script, *flags, *extra, "--log_dir", tmp_path / script)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stdout
        assert read(tmp_path / script / "samples" / "step_000001.png").shape[:2] == pixels


def test_tensorboard_shows_the_pictures_beside_the_numbers(tmp_path, call_script, monkeypatch):
    numbers, pictures = set(), []

    class Writer:
        def __init__(self, dir, purge_step):
            pass

        def add_scalar(self, key, value, step):
            numbers.add(key)

        def add_image(self, key, pixels, step, dataformats):
            pictures.append((key, step, pixels.tolist(), dataformats))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    flags = (
        "--total_steps",
        2,
        "--sample_interval",
        1,
        "--tensorboard",
        "True",
        "--log_dir",
        tmp_path / "run",
    )
    done = call_script("image_train.py", "--data_dir", "builtin", *TINY_FLAGS, *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    (key,) = {key for key, *_ in pictures}
    # Of two kinds of data with one name, TensorBoard shows only one.
    assert key not in numbers and "samples" in numbers
    expected = [read(tmp_path / "run" / "samples" / f"step_00000{step}.png").tolist() for step in (1, 2)]
    assert pictures == [(key, 1, expected[0], "HWC"), (key, 2, expected[1], "HWC")]
