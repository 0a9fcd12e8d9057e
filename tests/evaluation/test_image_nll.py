"""image_nll.py: the right bound of the right images, whatever the batch, and every mistake in one line."""

import re

import numpy as np
import pytest
import torch as th
from conftest import TINY_FLAGS, read_json, save_trained
from PIL import Image

from improved_diffusion.data.builtin_images import CLASS_NAMES, draw_builtin
from improved_diffusion.evaluation.bits_per_dim import choose_images
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.run.checkpoint import find
from improved_diffusion.sample_util import per_image_noise
from improved_diffusion.script_util import (
    create_model_and_diffusion,
)

COUNT = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_trained(tmp_path_factory.mktemp("model"), learn_sigma=True)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A class-conditional model of the built-in shapes."""
    folder = tmp_path_factory.mktemp("classified")
    return save_trained(folder, class_cond=True, num_classes=10, class_names=CLASS_NAMES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven of the built-in shapes, with their classes in the names of the files: crescent, cross, ..."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(draw_builtin(COUNT + 1, 8)[0][1:], start=1):
        Image.fromarray(image).save(folder / f"{CLASS_NAMES[number]}_1.png")
    return folder


@pytest.fixture
def measure(call_script):
    def run(model, data, out, *flags):
        options = ["--model_path", model, "--data_dir", data, "--log_dir", out]
        done = call_script("image_nll.py", *options, *flags)
        assert done.returncode == 0, done.stderr
        with np.load(out / "bpd.npz") as arrays:
            return read_json(out / "nll.json"), dict(arrays)

    return run


def terms(out, name):
    with np.load(out / f"{name}_terms.npz") as arrays:
        return arrays["arr_0"]


def test_it_is_the_bound_of_the_diffusion(model, pictures, tmp_path, measure):
    result, arrays = measure(model, pictures, tmp_path, "--batch_size", 3, "--seed", 5)
    source = find(str(model))
    net, diffusion = create_model_and_diffusion(**source.state["arguments"])
    net.load_state_dict(source.load("0.99"))
    chosen = choose_images(COUNT, COUNT)
    names = sorted(path.name for path in pictures.iterdir())
    x = np.stack([np.asarray(Image.open(pictures / names[number])) for number in chosen])
    x = th.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    expected = GaussianDiffusion.calc_bpd_loop(
        diffusion, net.eval(), x, randn_like=per_image_noise(5, chosen.tolist())
    )
    assert arrays["total_bpd"] == pytest.approx(expected["total_bpd"].numpy(), rel=1e-4)
    assert arrays["prior_bpd"] == pytest.approx(expected["prior_bpd"].numpy(), rel=1e-4)
    for name in ("vb", "mse", "xstart_mse"):
        # Terms near zero are mostly rounding errors, which differ from processor to processor.
        assert terms(tmp_path, name) == pytest.approx(expected[name].mean(dim=0).numpy(), rel=1e-3, abs=1e-9)
    total = arrays["total_bpd"]
    assert result["bits_per_dim"] == pytest.approx(total.mean())
    assert result["standard_error"] == pytest.approx(np.std(total, ddof=1) / np.sqrt(COUNT))
    assert terms(tmp_path, "vb").sum() + result["prior_bits_per_dim"] == pytest.approx(total.mean(), rel=1e-5)
    assert result["images"] == COUNT and result["model_path"] == source.path("0.99")


def test_neither_the_batch_nor_other_images_change_an_images_bound(model, tmp_path, measure):
    whole = measure(model, "builtin", tmp_path, "--num_samples", 5, "--batch_size", 5)[1]["total_bpd"]
    parts = measure(model, "builtin", tmp_path, "--num_samples", 3, "--batch_size", 2)[1]["total_bpd"]
    assert parts == pytest.approx(whole[:3], rel=1e-4)
    other = measure(model, "builtin", tmp_path, "--num_samples", 3, "--seed", 1)[1]["total_bpd"]
    assert np.abs(other - parts).min() > 1e-3


def test_respacing(model, pictures, tmp_path, measure):
    result, _ = measure(model, pictures, tmp_path, "--timestep_respacing", "7")
    assert result["steps"] == 7 and result["timestep_respacing"] == "7"
    assert terms(tmp_path, "vb").shape == (7,)


def test_classes_are_recognized_by_name(classified, pictures, tmp_path, measure):
    _, named = measure(classified, pictures, tmp_path / "named")
    # The same pictures as an .npz, in the same order, with the numbers that the model has for their classes.
    files = sorted(pictures.iterdir())
    images = np.stack([np.asarray(Image.open(path)) for path in files])
    labels = [CLASS_NAMES.index(path.name.split("_")[0]) for path in files]
    np.savez(tmp_path / "numbered.npz", images, labels)
    _, numbered = measure(classified, tmp_path / "numbered.npz", tmp_path / "out")
    assert np.array_equal(named["total_bpd"], numbered["total_bpd"])
    np.savez(tmp_path / "shifted.npz", images, [label - 1 for label in labels])
    _, shifted = measure(classified, tmp_path / "shifted.npz", tmp_path / "shifted")
    assert not np.array_equal(named["total_bpd"], shifted["total_bpd"])


def test_a_choice_of_images_stands_for_the_set():
    chosen = choose_images(1000, 10_000)
    assert len(set(chosen)) == 1000 and chosen.max() < 10_000
    assert np.bincount(chosen % 10).min() > 70 and np.bincount(chosen // 1000).min() > 70
    assert np.array_equal(chosen[:10], choose_images(10, 10_000))
    assert sorted(choose_images(5, 5)) == [0, 1, 2, 3, 4]


def test_ctrl_c_leaves_what_was_measured(model, tmp_path, monkeypatch, call_script):
    loop, calls = GaussianDiffusion.calc_bpd_loop, []

    def stop_in_the_third_batch(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loop(*args, **kwargs)

    monkeypatch.setattr(GaussianDiffusion, "calc_bpd_loop", stop_in_the_third_batch)
    flags = ["--model_path", model, "--data_dir", "builtin", "--num_samples", 9, "--batch_size", 2]
    done = call_script("image_nll.py", *flags, "--log_dir", tmp_path)
    assert done.returncode == 130
    result = read_json(tmp_path / "nll.json")
    assert result["images"] == 4 and result["num_samples"] == 9
    assert f"{result['bits_per_dim']:.4f} bits/dim" in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_dir", ""], "--data_dir is missing"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--num_channels", "64"], "--num_channels 64: contradicts the checkpoint"),
        (["--timestep_respacing", "21"], "--timestep_respacing"),
        (["--model_path", "SUPER"], "is a super-resolution model"),
        (["--model_path", "CLASSIFIED", "--data_dir", "PLAIN"], "these images have none"),
        (["--model_path", "CLASSIFIED", "--data_dir", "STRANGE"], "class 'cat', but the model knows circle"),
    ],
)
def test_mistakes(model, classified, tmp_path, call_script, flags, message):
    for name, file in (("PLAIN", "picture.png"), ("STRANGE", "cat_1.png")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / file)
    if "SUPER" in flags:
        save_trained(tmp_path, large_size=8, small_size=4)
    paths = {name: tmp_path / name for name in ("PLAIN", "STRANGE")}
    paths |= {"SUPER": tmp_path, "CLASSIFIED": classified}
    flags = [paths.get(flag, flag) for flag in flags]
    out = tmp_path / "out"
    done = call_script(
        "image_nll.py", "--model_path", model, "--data_dir", "builtin", "--log_dir", out, *flags
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1
    assert not out.exists()


def test_weights_without_arguments(model, tmp_path, measure):
    lonely = tmp_path / "somebody.pt"
    lonely.write_bytes((model / "model000004.pt").read_bytes())
    flags = [*TINY_FLAGS, "--learn_sigma", "True", "--diffusion_steps", "20", "--num_samples", "2"]
    described = measure(lonely, "builtin", tmp_path, *flags)[1]["total_bpd"]
    assert np.array_equal(
        described, measure(model, "builtin", tmp_path, "--num_samples", "2")[1]["total_bpd"]
    )
