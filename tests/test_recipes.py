"""--recipe: what it sets, what overrides it, and that a run keeps what it was started with."""

import pytest
from conftest import TINY_FLAGS, read_json

from improved_diffusion.config import TrainConfig
from improved_diffusion.flags import Parser, declared, defaults
from improved_diffusion.recipes import RECIPES


def parse(text):
    return Parser(TrainConfig, "test").parse_flags(text.split())[0]


def test_without_a_recipe_all_defaults_stay():
    assert parse("").to_dict() == defaults(TrainConfig)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_is_not_given(name):
    config = parse(f"--recipe {name} --lr 3e-4")
    assert config.to_dict() == {**defaults(TrainConfig), **RECIPES[name], "recipe": name, "lr": 3e-4}


def test_without_classes_none_are_withheld():
    config = parse("--recipe cifar10 --class_cond False")
    assert (config.class_cond, config.class_dropout) == (False, 0)


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
    assert "--recipe cifar10: the run to resume was started with 'small'" in done.stderr


def test_a_run_without_a_recipe_cannot_be_given_one(tmp_path, call_script):
    run = ["--data_dir", "builtin", *TINY_FLAGS, "--sample_interval", 0, "--log_dir", tmp_path / "run"]
    run += ["--lr_warmup_steps", 1]
    call_script("image_train.py", *run, "--total_steps", 1, check=0)
    done = call_script("image_train.py", *run, "--recipe", "small", "--total_steps", 2, check=2)
    assert "--recipe small" in done.stderr
