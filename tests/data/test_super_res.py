"""Super-resolution: what the model is shown in training and sampling, and how the scripts tell models apart."""

import re

import numpy as np
import pytest
import torch as th
from conftest import TINY, read_json, save_trained
from PIL import Image

from improved_diffusion.data.batch_stream import BatchStream
from improved_diffusion.data.builtin_images import CLASS_NAMES, draw_builtin
from improved_diffusion.image_datasets import read_images
from improved_diffusion.low_res import LowResStream, shrink
from improved_diffusion.run import checkpoint
from improved_diffusion.sample_util import from_uint8, to_uint8
from improved_diffusion.unet import SuperResModel

SIZES = ["--large_size", "8", "--small_size", "3"]
MODEL = [part for name, value in TINY.items() if name != "image_size" for part in (f"--{name}", value)]
TRAINING = [*SIZES, *MODEL, "--data_dir", "builtin", "--diffusion_steps", "20", "--class_cond", "True"]


def test_shrinking_averages_areas():
    image = th.arange(16.0).view(1, 1, 4, 4)
    assert shrink(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert th.equal(shrink(image, 4), image)
    uneven = shrink(th.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8), 3)
    assert uneven[0, 0, 0].tolist() == pytest.approx([1.0, 3.5, 6.0])  # pixels 0-2, 2-5, 5-7


def test_training_shows_each_image_its_small_self():
    images = read_images("builtin", 8)
    stream = LowResStream(BatchStream(images, 5, class_cond=True), 3)
    plain = BatchStream(images, 5, class_cond=True)
    for _ in range(2):
        batch, cond = next(stream)
        expected, classes = next(plain)
        assert th.equal(batch, expected) and th.equal(cond["y"], classes["y"])
        assert cond["low_res"].shape == (5, 3, 3, 3)
        assert th.equal(cond["low_res"], shrink(batch, 3))
    assert stream.samples == 10
    stream.seek(5)
    assert th.equal(next(stream)[0], batch)


@pytest.fixture
def run(tmp_path, call_script):
    """A run of six steps, trained in two sessions."""
    for steps in (4, 6):
        flags = [*TRAINING, "--total_steps", steps, "--log_dir", tmp_path / "run"]
        done = call_script("super_res_train.py", *flags)
        assert done.returncode == 0, done.stderr
    assert "resumed step 4" in done.stdout
    assert f"super_res_sample.py --base_samples IMAGES --model_path {tmp_path / 'run'}" in done.stdout
    return tmp_path / "run"


def load(out):
    with np.load(next(out.glob("samples_*.npz"))) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_train_resume_and_enlarge(run, tmp_path, call_script):
    state = checkpoint.find(str(run)).state
    assert state["arguments"]["large_size"] == 8 and state["arguments"]["small_size"] == 3
    assert "image_size" not in read_json(run / "args.json")

    flags = ["--num_samples", 5, "--batch_size", 2, "--save_png", "True", "--log_dir", tmp_path / "out"]
    done = call_script("super_res_sample.py", "--model_path", run, "--data_dir", "builtin", *flags)
    assert done.returncode == 0, done.stderr
    images, labels = load(tmp_path / "out")
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4]
    for name in ("grid.png", "low_res.png", "000004.png"):
        assert (tmp_path / "out" / name).exists()


def test_all_ways_to_give_the_same_images(tmp_path, call_script):
    """Images shrunk by the script, an .npz of small ones, and a folder of them: the same is shown."""
    folder = save_trained(
        tmp_path, large_size=8, small_size=4, class_cond=True, num_classes=10, class_names=CLASS_NAMES
    )
    large, labels = draw_builtin(3, 8)
    small = to_uint8(shrink(from_uint8(large), 4))
    np.savez(tmp_path / "large.npz", large, labels)
    np.savez(tmp_path / "small.npz", small, labels)
    (tmp_path / "small").mkdir()
    for image, label in zip(small, labels):
        Image.fromarray(image).save(tmp_path / "small" / f"{CLASS_NAMES[label]}_0.png")
    results = {}
    for source, batch in (("large.npz", 3), ("small.npz", 2), ("small", 1)):
        flag = "--data_dir" if source == "large.npz" else "--base_samples"
        options = ["--sampler", "ddpm", "--batch_size", batch, "--log_dir", tmp_path / f"from-{source}"]
        options += ["--precision", "fp32"]  # where images of other batches agree to one grey level
        done = call_script("super_res_sample.py", "--model_path", folder, flag, tmp_path / source, *options)
        assert done.returncode == 0, done.stderr
        images, given = load(tmp_path / f"from-{source}")
        assert given.tolist() == [0, 1, 2]
        results[source] = images.astype(int)
    # Small images are rounded to whole numbers where they are stored.
    assert np.abs(results["large.npz"] - results["small.npz"]).max() <= 3
    assert np.abs(results["small"] - results["small.npz"]).max() <= 1


def test_the_model_is_given_the_image_to_enlarge(tmp_path, monkeypatch, call_script):
    folder = save_trained(tmp_path, large_size=8, small_size=4)
    small = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", small)
    shown = []

    def forward(self, x, timesteps, low_res):
        shown.append(low_res)
        return th.zeros_like(x)

    monkeypatch.setattr(SuperResModel, "forward", forward)
    flags = ["--base_samples", tmp_path / "small.npz", "--batch_size", 4, "--timestep_respacing", "1"]
    options = ["--model_path", folder, "--log_dir", tmp_path / "out"]
    assert call_script("super_res_sample.py", *flags, *options).returncode == 0
    assert np.array_equal(to_uint8(th.cat(shown) + 1e-3), small)


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("super_res_train.py", [*TRAINING, "--small_size", "8"], "--small_size 8.*--large_size 8"),
        ("super_res_train.py", [*TRAINING, "--large_size", "9"], "--large_size 9"),
        ("super_res_train.py", [*TRAINING, "--image_size", "8"], "--image_size"),
        ("super_res_train.py", ["--resume_checkpoint", "PLAIN"], "PLAIN: is not a super-resolution model"),
        ("image_train.py", ["--resume_checkpoint", "SUPER"], "SUPER: is a super-resolution model"),
        ("image_sample.py", ["--model_path", "SUPER"], "is a super-resolution model"),
        ("super_res_sample.py", ["--model_path", "PLAIN", "--data_dir", "builtin"], "not a super-resolution"),
        ("super_res_sample.py", ["--model_path", "SUPER"], "either --base_samples.*or --data_dir"),
        ("super_res_sample.py", ["--data_dir", "builtin"], "--model_path is missing"),
        (
            "super_res_sample.py",
            ["--model_path", "SUPER", "--data_dir", "builtin", "--base_samples", "x.npz"],
            "either --base_samples",
        ),
        (
            "super_res_sample.py",
            ["--model_path", "SUPER", "--base_samples", "absent.npz"],
            "--base_samples .*absent.npz does not exist",
        ),
        (
            "super_res_sample.py",
            ["--model_path", "SUPER", "--data_dir", "builtin", "--class_label", "cat"],
            "trained without classes",
        ),
    ],
)
def test_mistakes(tmp_path, call_script, script, flags, message):
    sizes = {"PLAIN": {}, "SUPER": {"large_size": 8, "small_size": 4}}
    for name in sizes.keys() & set(flags):
        save_trained(tmp_path / name, **sizes[name])
    flags = [tmp_path / flag if flag in sizes else flag for flag in flags]
    done = call_script(script, *flags, "--log_dir", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
