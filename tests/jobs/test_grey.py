"""Images with one channel, from the files to the metrics; and where the number of channels comes from."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from conftest import TINY_FLAGS, read_json, save_trained
from PIL import Image

import improved_diffusion
from improved_diffusion.config import TrainConfig
from improved_diffusion.data.decode import to_grey
from improved_diffusion.image_datasets import describe, load_data, read_images
from improved_diffusion.jobs.runs import merge_for_resume
from improved_diffusion.script_util import create_model_and_diffusion

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE), dtype=np.uint8)


def save_folder(folder, mode="L", count=12):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(PIXELS[i]).convert(mode).save(folder / f"{'ab'[i % 2]}_{i:02d}.png")
    return folder


@pytest.fixture
def grey(tmp_path):
    return save_folder(tmp_path / "grey")


def test_channels_are_found_in_the_data(grey, tmp_path):
    quiet = {"log": lambda line: None, "progress": False}
    images = read_images(str(grey), SIZE, channels=0, **quiet)
    assert images.channels == 1 and "as one channel of grey" in describe(images)
    assert np.array_equal(np.sort(images.get(np.arange(12)), axis=0), np.sort(PIXELS[..., None], axis=0))
    streamed = read_images(str(grey), SIZE, channels=0, cache_limit_gb=0, **quiet)
    assert not streamed.in_memory and streamed.channels == 1
    assert np.array_equal(streamed.get(np.arange(12)), images.get(np.arange(12)))
    assert read_images(str(grey), SIZE, **quiet).get(np.arange(2)).shape == (2, SIZE, SIZE, 3)

    mixed = save_folder(tmp_path / "mixed")
    Image.new("RGB", (SIZE, SIZE), "red").save(mixed / "a_red.png")
    assert read_images(str(mixed), SIZE, channels=0, **quiet).channels == 3
    assert read_images(str(mixed), SIZE, channels=1, **quiet).get(np.arange(1)).shape == (1, SIZE, SIZE, 1)
    assert read_images("builtin", SIZE, channels=0).channels == 3
    for shape, channels in (((4, SIZE, SIZE, 1), 1), ((4, SIZE, SIZE, 3), 3)):
        np.savez(tmp_path / "a.npz", np.zeros(shape, np.uint8))
        assert read_images(str(tmp_path / "a.npz"), SIZE, channels=0).channels == channels
    x, _ = next(load_data(data_dir=str(grey), batch_size=3, image_size=SIZE, channels=1))
    assert x.shape == (3, 1, SIZE, SIZE)


@pytest.mark.parametrize("mode", ["1", "LA", "I;16", "F"])
def test_other_modes_of_grey(mode, tmp_path):
    (tmp_path / "grey").mkdir()
    image = Image.fromarray((PIXELS[0].astype(np.uint16) * 257) if mode == "I;16" else PIXELS[0])
    image = image if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "grey" / ("a.tif" if mode == "F" else "a.png"))
    images = read_images(str(tmp_path / "grey"), SIZE, channels=0, progress=False)
    assert images.channels == 1 and images.get(np.arange(1)).shape == (1, SIZE, SIZE, 1)


def test_grey_of_colours_is_that_of_pillow():
    pixels = np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    assert np.array_equal(to_grey(pixels)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    same = np.repeat(PIXELS[0][..., None], 3, axis=2)
    assert np.array_equal(to_grey(same)[..., 0], PIXELS[0])


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_model_of_one_channel(learn_sigma):
    tiny = dict(zip(TINY_FLAGS[::2], TINY_FLAGS[1::2]))
    flags = {name[2:]: int(value) if value.isdecimal() else value for name, value in tiny.items()}
    flags["attention_resolutions"] = str(flags["attention_resolutions"])
    model, diffusion = create_model_and_diffusion(**flags, channels=1, learn_sigma=learn_sigma)
    x = th.randn(2, 1, SIZE, SIZE)
    assert model(x, th.tensor([0, 5])).shape == (2, 2 if learn_sigma else 1, SIZE, SIZE)
    assert diffusion.training_losses(model, x, th.tensor([0, 5]))["loss"].shape == (2,)


def test_from_training_to_metrics(call_script, grey, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    training = ["--data_dir", grey, *TINY_FLAGS, "--log_dir", run, "--diffusion_steps", "10"]
    training += ["--batch_size", "4", "--heldout_dir", grey, "--num_workers", "1", "--class_cond", "True"]
    saving = ["--save_interval", "2", "--sample_interval", "2"]
    done = call_script("image_train.py", *training, *saving, "--total_steps", "2", check=0)
    assert "as one channel of grey" in done.stdout
    assert read_json(run / "args.json")["channels"] == 1
    assert (run / "samples" / "step_000002.png").exists()
    assert (run / "checkpoints.csv").read_text().count("\n") == 2

    # Its checkpoint fixes the channels, whatever is read now.
    call_script("image_train.py", *training, *saving, "--total_steps", "4", check=0)
    done = call_script("image_train.py", *training, "--total_steps", "4", "--channels", "3", check=2)
    assert re.search(r"--channels 3: the run to resume was started with 1; leave the flag out", done.stderr)
    done = call_script("image_sample.py", "--model_path", run, "--channels", "3", "--log_dir", out, check=2)
    assert "--channels 3: contradicts the checkpoint, which was trained with 1" in done.stderr

    drawing = ["--model_path", run, "--log_dir", out, "--num_samples", "6", "--sample_steps", "2"]
    call_script("image_sample.py", *drawing, "--save_png", "True", "--save_trajectory", "True", check=0)
    with np.load(out / f"samples_6x{SIZE}x{SIZE}x1.npz") as arrays:
        drawn = arrays["arr_0"]
    assert np.array_equal(np.asarray(Image.open(out / "000000.png")), drawn[0, ..., 0])
    assert Image.open(out / "grid.png").mode == "RGB"

    edited = [*drawing[:3], tmp_path / "edited", *drawing[4:], "--init_image", grey, "--strength", "0.3"]
    call_script("image_sample.py", *edited, check=0)
    assert (tmp_path / "edited" / f"samples_6x{SIZE}x{SIZE}x1.npz").exists()

    samples = out / f"samples_6x{SIZE}x{SIZE}x1.npz"
    measuring = ["--samples", samples, "--reference", grey, "--features", "pixel"]
    call_script("image_eval.py", *measuring, check=0)
    measuring = ["--model_path", run, "--data_dir", grey, "--num_samples", "2", "--log_dir", tmp_path / "nll"]
    done = call_script("image_nll.py", *measuring, check=0)
    assert "bits/dim" in done.stdout
    call_script("publish_model.py", "--model_path", run, "--log_dir", tmp_path / "published", check=0)
    published = ["--model_path", tmp_path / "published", "--log_dir", tmp_path / "again", *drawing[4:]]
    call_script("image_sample.py", *published, check=0)
    assert (tmp_path / "again" / f"samples_6x{SIZE}x{SIZE}x1.npz").exists()


def test_a_share_withheld_and_python(call_script, grey, tmp_path):
    run = tmp_path / "run"
    training = ["--data_dir", grey, *TINY_FLAGS, "--log_dir", run, "--diffusion_steps", "10"]
    training += ["--batch_size", "4", "--heldout_share", "0.3", "--num_workers", "1", "--total_steps", "1"]
    call_script("image_train.py", *training, "--sample_interval", "0", check=0)
    model = improved_diffusion.load(run, num_workers="1")
    images = model.sample(3, steps=2, progress=False)
    assert images.shape == (3, SIZE, SIZE, 1) and images.pil()[0].mode == "L"
    images.save(tmp_path / "grid.png")
    images.save(tmp_path / "images.npz")
    measured = improved_diffusion.evaluate(images.repeat(2, axis=0), str(grey), features="pixel")
    assert measured["image_size"] == SIZE


def test_a_model_of_an_older_version_is_one_of_colours(call_script, tmp_path):
    for stored in ({"image_size": SIZE}, {"image_size": SIZE, "channels": 0}):
        source = SimpleNamespace(state={"arguments": stored}, folder="run")
        assert merge_for_resume(TrainConfig(), set(), source).channels == 3
    done = call_script("image_sample.py", "--channels", "1", "--log_dir", tmp_path / "out", check=2)
    assert "--channels 1: contradicts the checkpoint, which was trained with 3" in done.stderr


def test_weights_without_flags(call_script, tmp_path):
    run = save_trained(tmp_path / "run", channels=1)
    (run / "state000004.json").unlink()
    flags = [*TINY_FLAGS, "--diffusion_steps", "20", "--log_dir", tmp_path / "out", "--num_samples", "2"]
    path = next(run.glob("ema*.pt"))
    done = call_script("image_sample.py", "--model_path", path, *flags, check=2)
    assert "they need --channels 1" in done.stderr
    call_script("image_sample.py", "--model_path", path, *flags, "--channels", "1", check=0)


def test_wrong_numbers_of_channels(call_script):
    done = call_script("image_train.py", "--channels", "2", check=2)
    assert "--channels 2: use 1, 3, or 0 for those of the data" in done.stderr


def test_comparisons_of_grey_models(call_script, grey, tmp_path):
    runs = [save_trained(tmp_path / name, channels=1) for name in ("a", "b")]
    fast = ["--precision", "fp32", "--num_workers", "1", "--num_samples", "4"]
    solvers = ["--samplers", "ddim", "--steps", "2", "--baseline", "False", "--features", "pixel"]
    solvers += ["--model_path", runs[0], "--log_dir", tmp_path / "samplers", "--reference", grey]
    call_script("compare_samplers.py", *solvers, *fast, check=0)
    for run in runs:
        (run / "progress.csv").write_text("step,loss\n4,0.5\n")
    runs = [*runs, "--sample_steps", "2", "--log_dir", tmp_path / "runs"]
    call_script("compare_runs.py", *runs, *fast, check=0)
    for picture in (tmp_path / "samplers" / "comparison.png", tmp_path / "runs" / "runs.png"):
        with Image.open(picture) as opened:
            pixels = np.asarray(opened).astype(int)
        # What a model of one channel has drawn is neither white nor coloured.
        assert opened.mode == "RGB" and ((pixels.max(2) == pixels.min(2)) & (pixels.max(2) < 250)).sum() > 999


def test_super_resolution_of_grey_images(call_script, grey, tmp_path):
    flags = ["--large_size", "8", "--small_size", "4", *TINY_FLAGS[2:], "--diffusion_steps", "10"]
    training = ["--data_dir", grey, "--log_dir", tmp_path / "run", "--batch_size", "4", "--num_workers", "1"]
    call_script("super_res_train.py", *flags, *training, "--total_steps", "1", check=0)
    drawing = ["--model_path", tmp_path / "run", "--data_dir", grey, "--log_dir", tmp_path / "out"]
    call_script("super_res_sample.py", *drawing, "--sample_steps", "2", "--num_samples", "3", check=0)
    assert (tmp_path / "out" / "samples_3x8x8x1.npz").exists()


def test_there_and_back_with_diffusers(call_script, tmp_path):
    run = save_trained(tmp_path / "run", channels=1, diffusion_steps=1000)
    there, back = tmp_path / "there", tmp_path / "back"
    call_script("convert_checkpoint.py", "--model_path", run, "--to_diffusers", there, check=0)
    config = read_json(there / "unet" / "config.json")
    assert (config["in_channels"], config["out_channels"]) == (1, 1)
    call_script("convert_checkpoint.py", "--from_diffusers", there, "--log_dir", back, check=0)
    assert read_json(next(back.glob("state*.json")))["arguments"]["channels"] == 1
