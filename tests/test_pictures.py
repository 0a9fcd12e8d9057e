"""What is drawn becomes files: grids in order, animations, and what is finished when somebody interrupts."""

import os
import signal

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.pictures import image_grid, save_animation, save_samples


def test_grid_shows_every_image_in_order():
    images = np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(5)])
    grid = np.asarray(image_grid(images))
    assert grid.shape == (2 * 10 * 8 + 16, 3 * 10 * 8 + 16, 3)  # 3 columns, 2 rows, enlarged 8 times
    for i in range(5):
        row, column = divmod(i, 3)
        assert (grid[row * 80 + 50, column * 80 + 50] == 20 * i).all()
    assert np.asarray(image_grid(np.zeros((1, 100, 60, 3), np.uint8))).shape == (104, 64, 3)


def test_grid_gives_each_class_a_row():
    images = np.stack([np.full((64, 64, 3), 20 * i, np.uint8) for i in range(5)])
    grid = np.asarray(image_grid(images, np.array([7, 2, 7, 2, 2])))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    shown = [[int(grid[30 + 66 * row, 30 + 66 * column, 0]) for column in range(3)] for row in range(2)]
    assert shown == [[0, 40, 255], [20, 60, 80]]  # the classes in the order in which they were asked for


def batches(count, frames=1, signals=None):
    """Batches of 2 images of 8 pixels, whose frame f of image i is of the grey 40 i + f; then maybe a signal."""
    for start in range(0, count, 2):
        batch = [
            [np.full((8, 8, 3), 40 * i + f, np.uint8) for f in range(frames)] for i in (start, start + 1)
        ]
        yield np.array(batch)
    if signals is not None:
        os.kill(os.getpid(), signals)
        raise AssertionError("the signal had no effect")


def load(folder):
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_last_frames_are_the_images(tmp_path):
    labels = np.array([3, 1, 3, 1])
    assert save_samples(batches(4, frames=3), str(tmp_path), labels=labels, save_png=True) == 0
    saved = load(tmp_path)
    assert saved["arr_0"][:, 0, 0, 0].tolist() == [2, 42, 82, 122]
    assert saved["arr_1"].tolist() == [3, 1, 3, 1]
    assert sorted(os.listdir(tmp_path)) == [
        *(f"{i:06d}.png" for i in range(4)),
        "grid.png",
        "samples_4x8x8x3.npz",
    ]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_finished_batches_survive_an_interrupt(tmp_path, request, name, code):
    number = getattr(signal, name)
    # A shell has processes in the background ignore SIGINT; this one is to be in the foreground.
    at_start = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, at_start))
    before = signal.getsignal(number)
    assert save_samples(batches(4, signals=number), str(tmp_path)) == code
    assert load(tmp_path)["arr_0"].shape == (4, 8, 8, 3)
    assert (tmp_path / "grid.png").exists()
    assert signal.getsignal(number) is before
    (tmp_path / "none").mkdir()
    assert save_samples(batches(0, signals=number), str(tmp_path / "none")) == code
    assert os.listdir(tmp_path / "none") == []


@pytest.mark.parametrize("moment", ["concatenate", "savez"])
def test_a_signal_while_the_files_are_written_does_not_cost_them(tmp_path, monkeypatch, moment):
    real = getattr(np, moment)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(np, moment, interrupted)
    assert save_samples(batches(4), str(tmp_path)) == 0
    assert load(tmp_path)["arr_0"].shape == (4, 8, 8, 3) and (tmp_path / "grid.png").exists()


def test_animation_shows_the_frames_in_order_and_rests_on_the_last(tmp_path):
    frames = np.stack(
        [np.stack([np.full((8, 8, 3), 60 * f + 20 * i, np.uint8) for f in range(4)]) for i in range(2)]
    )
    path = save_animation(frames, str(tmp_path))
    assert path == str(tmp_path / "trajectory.webp")
    with Image.open(path) as animation:
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        shown, durations = [], []
        for frame in range(4):
            animation.seek(frame)
            animation.load()
            shown.append(np.asarray(animation.convert("RGB"))[50, 50])
            durations.append(animation.info["duration"])
    assert np.abs(np.array(shown, int)[:, 0] - [0, 60, 120, 180]).max() < 8
    assert durations == [750, 750, 750, 2500]


def test_animation_without_webp(tmp_path, monkeypatch):
    monkeypatch.setattr("improved_diffusion.pictures.features.check", lambda name: False)
    path = save_animation(np.arange(2 * 3 * 192, dtype=np.uint8).reshape(2, 3, 8, 8, 3), str(tmp_path))
    assert path.endswith("trajectory.gif")
    with Image.open(path) as animation:
        assert animation.format == "GIF" and animation.n_frames == 3


def test_an_animation_shows_the_first_images_only(tmp_path):
    big = np.zeros((3, 2, 600, 600, 3), np.uint8)  # two of these are a million pixels
    save_samples(iter([big, big]), str(tmp_path), save_trajectory=True)
    with Image.open(tmp_path / "trajectory.webp") as animation:
        assert animation.size == (2 * 602 + 2, 602 + 2)
