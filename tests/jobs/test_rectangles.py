"""Images that are not square: read, trained on, drawn, measured, and the sizes that are impossible."""

import re

import numpy as np
import pytest
import torch as th
from conftest import TINY_FLAGS, read_json, save_trained
from PIL import Image

from improved_diffusion.config import ModelFlags, levels_of
from improved_diffusion.data.builtin_images import draw_builtin
from improved_diffusion.data.decode import fit_image
from improved_diffusion.image_datasets import describe, read_images
from improved_diffusion.jobs.edit import read_mask

HEIGHT, WIDTH = 8, 12
RECTANGLE = [*TINY_FLAGS, "--image_width", str(WIDTH)]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(8, 12), (16, 24), (9, 30), (40, 20)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("shape", [(8, 12), (9, 12), (30, 31), (300, 20), (5, 5), (8, 900)])
def test_images_cover_the_rectangle(shape):
    assert fit_image(Image.new("RGB", shape[::-1]), (HEIGHT, WIDTH)).shape == (HEIGHT, WIDTH, 3)


def test_the_centre_is_kept():
    pixels = np.zeros((HEIGHT, 36, 3), np.uint8)
    pixels[:, 12:24] = 255
    assert (fit_image(Image.fromarray(pixels), (HEIGHT, WIDTH)) == 255).all()


def test_sets_of_rectangles(photos, tmp_path):
    size = (HEIGHT, WIDTH)
    images = read_images(str(photos), size, progress=False)
    assert images.get(np.arange(4)).shape == (4, *size, 3)
    assert "scaled and cropped to 12x8" in describe(images)
    again = read_images(str(photos), size, progress=False)
    assert "from the cache" in describe(again)
    assert np.array_equal(again.get(np.arange(4)), images.get(np.arange(4)))
    square = read_images(str(photos), HEIGHT, progress=False)
    assert square.get(np.arange(4)).shape == (4, HEIGHT, HEIGHT, 3)
    np.savez(tmp_path / "a.npz", np.zeros((3, HEIGHT, WIDTH, 3), np.uint8))
    assert "all 12x8" in describe(read_images(str(tmp_path / "a.npz"), size))
    drawn, _ = draw_builtin(3, (32, 48))
    assert drawn.shape == (3, 32, 48, 3)


def test_from_training_to_metrics(call_script, photos, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    training = ["--data_dir", photos, *RECTANGLE, "--log_dir", run, "--diffusion_steps", "10"]
    training += ["--batch_size", "4", "--heldout_dir", photos, "--num_workers", "1", "--random_flip", "True"]
    call_script("image_train.py", *training, "--total_steps", "2", "--sample_interval", "2", check=0)
    assert Image.open(run / "samples" / "step_000002.png").size == (
        5 * (WIDTH * 4 + 10),
        5 * (HEIGHT * 4 + 10),
    )
    done = call_script("image_train.py", *training[:-2], "--image_width", "16", check=2)
    assert re.search(
        r"--image_width 16: the run to resume was started with 12; leave the flag out", done.stderr
    )

    drawing = ["--model_path", run, "--log_dir", out, "--num_samples", "4", "--sample_steps", "2"]
    call_script("image_sample.py", *drawing, "--save_png", "True", check=0)
    samples = out / f"samples_4x{HEIGHT}x{WIDTH}x3.npz"
    assert Image.open(out / "000000.png").size == (WIDTH, HEIGHT)
    between = [
        "--model_path",
        run,
        "--log_dir",
        tmp_path / "between",
        "--interpolate",
        "True",
        "--sample_steps",
        "2",
    ]
    call_script("image_sample.py", *between, "--num_samples", "3", check=0)

    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    editing = ["--model_path", run, "--log_dir", tmp_path / "edited", "--sample_steps", "2"]
    editing += ["--init_image", photos / "0.png", "--mask", tmp_path / "mask.png", "--mask_rounds", "2"]
    call_script("image_sample.py", *editing, check=0)
    with np.load(tmp_path / "edited" / f"samples_1x{HEIGHT}x{WIDTH}x3.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][0, :, :5], np.asarray(Image.open(photos / "0.png"))[:, :5])

    measuring = ["--samples", samples, "--reference", photos, "--features", "pixel"]
    done = call_script("image_eval.py", *measuring, check=0)
    assert " of 12x8 pixels" in " ".join(done.stdout.split())
    assert read_json(out / f"{samples.stem}.evaluation.json")["image_size"] == [HEIGHT, WIDTH]
    measuring = [
        "--model_path",
        run,
        "--data_dir",
        photos,
        "--num_samples",
        "2",
        "--log_dir",
        tmp_path / "nll",
    ]
    call_script("image_nll.py", *measuring, check=0)


def test_a_mask_of_the_sides_swapped(tmp_path):
    Image.fromarray(np.eye(WIDTH, HEIGHT, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=re.escape("mask.png: is 8x12 pixels, and the images are 12x8;")):
        read_mask(str(tmp_path / "mask.png"), (HEIGHT, WIDTH))


def test_levels_divide_both_sides():
    assert levels_of(ModelFlags(image_size=32, image_width=48)) == levels_of(ModelFlags(image_size=32))
    for flags, message in [
        (
            {"image_size": 32, "image_width": 50},
            "--image_width 50: the 4 levels of the model need a multiple of 8; try 48",
        ),
        (
            {"image_size": 32, "image_width": 20, "patch_size": 2},
            "--image_width 20: the 3 levels of the model need a multiple of 8; try 16",
        ),
        ({"image_size": 30, "image_width": 32, "channel_mult": "1,2"}, None),
        (
            {"image_size": 256, "image_width": 1024, "attention_resolutions": "128"},
            "--image_width 1024: attention at 512x128",
        ),
    ]:
        if message is None:
            levels_of(ModelFlags(**flags))
        else:
            with pytest.raises(ValueError, match=message):
                levels_of(ModelFlags(**flags))


def test_there_and_back_with_diffusers(call_script, tmp_path):
    run = save_trained(tmp_path / "run", image_width=WIDTH, diffusion_steps=1000)
    there, back = tmp_path / "there", tmp_path / "back"
    call_script("convert_checkpoint.py", "--model_path", run, "--to_diffusers", there, check=0)
    assert read_json(there / "unet" / "config.json")["sample_size"] == [HEIGHT, WIDTH]
    call_script("convert_checkpoint.py", "--from_diffusers", there, "--log_dir", back, check=0)
    arguments = read_json(next(back.glob("state*.json")))["arguments"]
    assert (arguments["image_size"], arguments["image_width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("layout", [th.contiguous_format, th.channels_last])
def test_the_model_treats_both_sides_alike(layout):
    """A transposed image, with transposed kernels, gives the transposed result."""
    from improved_diffusion.script_util import create_model

    flags = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    model = create_model(**flags, image_width=12, attention_resolutions="4")
    th.manual_seed(0)
    for p in model.parameters():
        th.nn.init.normal_(p, std=0.05)
    x, t = th.randn(2, 3, 8, 12), th.tensor([3, 500])
    with th.no_grad():
        wide = model(x.contiguous(memory_format=layout), t)
        for p in model.parameters():
            if p.dim() == 4:
                p.copy_(p.transpose(2, 3).contiguous())
        high = model(x.transpose(2, 3).contiguous(memory_format=layout), t)
    assert wide.shape == x.shape and th.allclose(wide, high.transpose(2, 3), atol=1e-4)
