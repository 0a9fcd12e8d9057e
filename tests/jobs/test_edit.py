"""--init_image and --mask of image_sample.py: what comes out, and what people get wrong."""

import re

import numpy as np
import pytest
from conftest import save_trained
from PIL import Image

from improved_diffusion.samplers import SAMPLERS

SIZE = 8  # of the tiny model's images


@pytest.fixture
def model(tmp_path):
    return save_trained(tmp_path / "model", class_cond=True, num_classes=3, class_names=["a", "b", "c"])


@pytest.fixture
def photos(tmp_path):
    """Two images, one of them not of the model's size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / "1.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "2.png")
    return folder


@pytest.fixture
def mask(tmp_path):
    """White on the right."""
    return save_mask(tmp_path / "mask.png", np.arange(SIZE)[None] * np.ones((SIZE, 1)) >= SIZE / 2)


def save_mask(path, white):
    Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def sample(call_script, model, tmp_path):
    def run(*args, check=0, out="out"):
        args = ("--model_path", model, "--log_dir", tmp_path / out, "--sample_steps", "4", *args)
        done = call_script("image_sample.py", *args, check=check)
        if check:
            assert not (tmp_path / out).exists() and done.stderr.count("\n") == 1
            return done.stderr
        (npz,) = (tmp_path / out).glob("*.npz")
        with np.load(npz) as arrays:
            return done.stdout, arrays["arr_0"], arrays["arr_1"]

    return run


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_folder_makes_as_many_images(sample, photos, sampler, tmp_path):
    output, drawn, labels = sample("--init_image", photos, "--sampler", sampler, "--strength", "0.5")
    assert drawn.shape == (2, SIZE, SIZE, 3) and labels.tolist() == [0, 1]
    assert "2 images from" in output and "drawing 2 images" in output
    assert (tmp_path / "out" / "originals.png").exists()
    assert not np.array_equal(drawn[0], pixels(photos / "1.png"))


def test_less_strength_changes_less_in_fewer_steps(sample, photos):
    changed = []
    for strength in ("0.1", "0.4", "1"):
        output, drawn, _ = sample(
            "--init_image", photos / "1.png", "--strength", strength, "--eta", "0", out=strength
        )
        steps = int(re.search(r"in (\d+) steps", output)[1])
        changed.append((np.abs(drawn[0].astype(int) - pixels(photos / "1.png")).mean(), steps))
    assert changed == sorted(changed) and changed[0][1] < changed[2][1] == 4


def test_one_file_and_many_variants(sample, photos):
    _, drawn, labels = sample("--init_image", photos / "2.png", "--num_samples", "5", "--class_label", "c")
    assert drawn.shape == (5, SIZE, SIZE, 3) and labels.tolist() == [2] * 5
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "flags", ["", "--sampler ddpm", "--sampler sde_dpmpp_2m", "--timestep_respacing 5", "--strength 0.5"]
)
def test_the_black_part_is_kept(sample, photos, mask, flags, call_script, model, tmp_path):
    args = ["--init_image", photos / "1.png", "--mask", mask, "--mask_rounds", "2", "--num_samples", "3"]
    args += flags.split()
    if "respacing" in flags:
        args = ["--model_path", model, "--log_dir", tmp_path / "out", *args]
        call_script("image_sample.py", *args, check=0)
        with np.load(next((tmp_path / "out").glob("*.npz"))) as arrays:
            drawn = arrays["arr_0"]
    else:
        _, drawn, _ = sample(*args)
    original = pixels(photos / "1.png")
    half = SIZE // 2
    assert all(np.array_equal(image[:, :half], original[:, :half]) for image in drawn)
    assert all((image[:, half:] != original[:, half:]).any() for image in drawn)


def test_an_npz_file_and_an_animation(sample, photos, tmp_path):
    np.savez(tmp_path / "a.npz", np.stack([pixels(photos / "1.png")] * 3))
    _, drawn, _ = sample("--init_image", tmp_path / "a.npz", "--save_trajectory", "True")
    assert len(drawn) == 3 and list((tmp_path / "out").glob("trajectory.*"))


def test_mistakes(sample, photos, mask, tmp_path):
    def fails(message, *args):
        error = sample(*args, check=2)
        assert re.search(message, error), error

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    one = photos / "1.png"
    fails("--init_image .*empty holds no usable image .it is empty", "--init_image", tmp_path / "empty")
    fails("--init_image .*none.png: missing or not readable", "--init_image", tmp_path / "none.png")
    fails("--init_image .*text.png: empty or not an image", "--init_image", tmp_path / "text.png")
    fails("--init_image .*notes.txt is neither a folder nor", "--init_image", tmp_path / "notes.txt")
    fails("--init_image .*nowhere does not exist", "--init_image", tmp_path / "nowhere")
    fails("--strength 0.5: needs --init_image", "--strength", "0.5")
    fails("--strength 1.5: must be at least 0.001 and at most 1", "--init_image", one, "--strength", "1.5")
    fails("--strength 0.0: must be at least", "--init_image", one, "--strength", "0")
    fails("--mask .*: needs --init_image", "--mask", mask)
    fails("--mask_rounds 3: needs --mask", "--init_image", one, "--mask_rounds", "3")
    fails(
        "--class_label 'd': no such class; this model knows a, b, c",
        "--init_image",
        one,
        "--class_label",
        "d",
    )
    fails("--interpolate True: contradicts --init_image", "--init_image", one, "--interpolate", "True")

    large = save_mask(tmp_path / "large.png", np.eye(2 * SIZE) > 0)
    fails("--mask .*large.png: is 16x16 pixels, and the images are 8x8", "--init_image", one, "--mask", large)
    for colour, value in (("white", True), ("black", False)):
        plain = save_mask(tmp_path / "plain.png", np.full((SIZE, SIZE), value))
        fails(f"--mask .*plain.png: is {colour} everywhere", "--init_image", one, "--mask", plain)
    fails("--mask .*none.png: missing or not readable", "--init_image", one, "--mask", tmp_path / "none.png")
    for flags in (["--sampler", "unipc"], ["--sampler", "ddim"], ["--eta", "0"]):
        fails(
            "--mask .*: needs a sampler that adds noise: ddpm, or",
            "--init_image",
            one,
            "--mask",
            mask,
            *flags,
        )
