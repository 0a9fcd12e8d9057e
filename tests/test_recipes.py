"""--recipe: what it sets, what overrides it, and that a run keeps what it was started with."""

import re

import numpy as np
import pytest
from conftest import TINY_FLAGS, read_json

from improved_diffusion.config import TrainConfig
from improved_diffusion.flags import Parser, declared, defaults
from improved_diffusion.recipes import RECIPES


def parse(text):
    return Parser(TrainConfig, "test").parse_flags(text.split())[0]


# How improved-diffusion learns, and what the README's command leaves out.
AS_UPSTREAM = {
    "recipe": "",
    "prediction": "epsilon",
    "loss_weighting": "none",
    "schedule_sampler": "uniform",
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "ema_rate": "0.9999",
    "ema_lengths": "",
    "lr_warmup_steps": 0,
    "lr_anneal_steps": 0,
    "lr_decay": "none",
    "hours": 0.0,
    "class_cond": False,
    "class_dropout": 0.0,
    "guidance_scale": 1.0,
    "random_flip": False,
    "heldout_share": 0.0,
    "init_from": "",
    "total_steps": 30000,
    "seed": 0,
    "patch_size": 1,
    "dropout": 0.0,
    "learn_sigma": False,
    "use_kl": False,
    "predict_xstart": False,
    "use_scale_shift_norm": True,
    "sync_interval": 1,
}


def test_without_a_recipe_all_defaults_stay():
    assert parse("").to_dict() == defaults(TrainConfig)
    assert AS_UPSTREAM.items() <= defaults(TrainConfig).items()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_is_not_given(name):
    config = parse(f"--recipe {name} --lr 3e-4")
    assert config.to_dict() == {**defaults(TrainConfig), **RECIPES[name], "recipe": name, "lr": 3e-4}


def test_without_classes_none_are_withheld():
    config = parse("--recipe cifar10 --class_cond False")
    assert (config.class_cond, config.class_dropout, config.guidance_scale) == (False, 0, 1)
    assert parse("--recipe cifar10 --class_dropout 0").guidance_scale == 1


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--lr_anneal_steps 500", "lr_decay", "none"),
        ("--predict_xstart True", "prediction", "epsilon"),
        ("--use_kl True", "loss_weighting", "none"),
    ],
)
def test_a_flag_overrides_what_it_contradicts(flag, name, value):
    assert getattr(parse(f"--recipe small {flag}"), name) == value
    assert getattr(parse(f"--recipe small {flag.split()[0]} 0"), name) == RECIPES["small"][name]


def test_images_without_classes_need_another_recipe(tmp_path, call_script):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((9, 8, 8, 3), dtype=np.uint8))
    flags = ["--data_dir", tmp_path / "images.npz", *TINY_FLAGS, "--recipe", "cifar10"]
    done = call_script("image_train.py", *flags, "--log_dir", tmp_path / "run", check=2)
    assert "--class_cond False trains without classes, and so does --recipe small" in done.stderr


def test_guidance_needs_class_dropout(capsys):
    with pytest.raises(SystemExit):
        parse("--guidance_scale 2")
    assert "--guidance_scale 2.0: needs --class_dropout" in capsys.readouterr().err
    assert parse("--guidance_scale 2 --class_cond True --class_dropout 0.1").guidance_scale == 2


def test_a_model_is_drawn_with_the_guidance_of_its_training(tmp_path, call_script):
    """In the previews as by image_sample.py."""
    run = ["--data_dir", "builtin", *TINY_FLAGS, "--class_cond", "True", "--class_dropout", 0.1]
    run += ["--total_steps", 8, "--lr", 0.03]
    for scale in (1, 5):
        flags = ["--guidance_scale", scale, "--log_dir", tmp_path / str(scale)]
        call_script("image_train.py", *run, *flags, check=0)
    plain, guided = ((tmp_path / scale / "samples" / "step_000008.png").read_bytes() for scale in "15")
    assert plain != guided

    def draw(scale, *flags):
        out = tmp_path / "-".join(["drawn", scale, *flags])
        flags = ["--model_path", tmp_path / scale, "--num_samples", 2, *flags, "--log_dir", out]
        said = call_script("image_sample.py", *flags, check=0).stdout
        return (out / "grid.png").read_bytes(), "steps each, guidance 5, into" in said

    guided, said = draw("5")
    assert said and draw("5", "--guidance_scale", "1")[0] == draw("1")[0] != guided
    assert draw("1", "--guidance_scale", "5")[0] == guided


def test_help_says_what_a_recipe_sets():
    text = declared(TrainConfig)["recipe"].help
    for name, value in RECIPES["cifar10"].items():
        assert f"--{name} {value}" in text


def test_a_run_keeps_the_recipe_that_it_was_started_with(tmp_path, call_script, monkeypatch):
    run = ["--data_dir", "builtin", *TINY_FLAGS, "--sample_interval", 0, "--log_dir", tmp_path / "run"]
    run += ["--lr_warmup_steps", 1, "--batch_size", 2, "--microbatch", 2]
    call_script("image_train.py", *run, "--recipe", "small", "--total_steps", 2, check=0)
    stored = read_json(tmp_path / "run" / "args.json")
    assert (stored["recipe"], stored["prediction"], stored["lr"]) == ("small", "v", 1.6e-3)
    # Another version of the recipe does not change the run.
    monkeypatch.setitem(RECIPES, "small", {**RECIPES["small"], "lr": 1e-2, "prediction": "edm"})
    call_script("image_train.py", *run, "--recipe", "small", "--total_steps", 3, check=0)
    assert read_json(tmp_path / "run" / "args.json") == {**stored, "total_steps": 3}
    done = call_script("image_train.py", *run, "--recipe", "cifar10", check=2)
    assert re.search(
        r"--recipe cifar10: the run to resume was started with 'small'; leave the flag out", done.stderr
    )


def test_a_run_without_a_recipe_cannot_be_given_one(tmp_path, call_script):
    run = ["--data_dir", "builtin", *TINY_FLAGS, "--sample_interval", 0, "--log_dir", tmp_path / "run"]
    run += ["--lr_warmup_steps", 1]
    call_script("image_train.py", *run, "--total_steps", 1, check=0)
    done = call_script("image_train.py", *run, "--recipe", "small", "--total_steps", 2, check=2)
    assert "--recipe small" in done.stderr
