"""Checkpoints of openai/improved-diffusion: bare .pt files in the formats of its time, described by flags."""

from collections import OrderedDict

import numpy as np
import pytest
import torch as th
from conftest import TINY, TINY_FLAGS

from improved_diffusion.config import ModelAndDiffusion
from improved_diffusion.jobs.runs import load_trained
from improved_diffusion.script_util import create_model_and_diffusion

NAME = "cifar10_uncond_50M_500K.pt"
DRAW = ["--num_samples", 2, "--batch_size", 2, "--timestep_respacing", "3"]


def upstream_file(path, dtype=th.float32, zipped=False, **changes):
    """Write weights as improved-diffusion saved them; `zipped` is the format of torch 1.6 and later."""
    model, _ = create_model_and_diffusion(**TINY, **changes)
    generator = th.Generator().manual_seed(0)
    weights = OrderedDict(
        (name, (0.1 * th.randn(value.shape, generator=generator)).to(dtype))
        for name, value in model.state_dict().items()
    )
    th.save(weights, path, _use_new_zipfile_serialization=zipped)
    assert path.read_bytes().startswith(b"PK") == zipped
    return weights


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [th.float32, th.float16])
def test_weights_of_any_format_become_float32(tmp_path, dtype, zipped):
    weights = upstream_file(tmp_path / NAME, dtype, zipped)
    model = load_trained(str(tmp_path / NAME), ModelAndDiffusion(**TINY), given=set(TINY)).model
    assert model.state_dict().keys() == weights.keys()
    for name, value in model.state_dict().items():
        assert value.dtype == th.float32
        assert th.equal(value, weights[name].float())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (NAME, {}),
        ("model500000.pt", {"learn_sigma": True}),
        ("ema_0.9999_500000.pt", {"class_cond": True}),
    ],
)
def test_images_are_drawn_with_the_flags_of_the_command(tmp_path, call_script, name, changes):
    upstream_file(tmp_path / name, **changes)
    flags = [part for flag, value in changes.items() for part in (f"--{flag}", value)]
    command = ["image_sample.py", "--model_path", tmp_path / name, *DRAW, *TINY_FLAGS, *flags]
    done = call_script(*command, "--log_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no arguments are stored with it" in done.stdout
    with np.load(tmp_path / "out" / "samples_2x8x8x3.npz") as samples:
        assert samples["arr_0"].shape == (2, 8, 8, 3)


def test_other_flags_than_its_own_are_named(tmp_path, call_script):
    upstream_file(tmp_path / NAME, learn_sigma=True)
    done = call_script("image_sample.py", "--model_path", tmp_path / NAME, *DRAW, *TINY_FLAGS)
    assert done.returncode == 2
    assert (
        "they need --learn_sigma True" in done.stderr and "give the flags it was trained with" in done.stderr
    )


def test_such_a_checkpoint_converts_to_diffusers(tmp_path, call_script):
    pytest.importorskip("safetensors")
    upstream_file(tmp_path / NAME, th.float16)
    done = call_script(
        "convert_checkpoint.py",
        "--model_path",
        tmp_path / NAME,
        "--to_diffusers",
        tmp_path / "out",
        *TINY_FLAGS,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_index.json").exists()
