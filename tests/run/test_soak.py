"""The soak's own eyes: a single bit that differs at the end of two runs is seen, and so is a file that it damaged."""

import random
import shutil

import pytest
from conftest import ROOT
from soak import FEATURES, TEXTS, contents, features_of_case, is_intact, spoil
from training_process import run_training

from improved_diffusion.run import checkpoint

FLAGS = ["--total_steps", 2, "--save_interval", 2, "--log_interval", 1, "--batch_size", 2]
FLAGS += ["--ema_lengths", "0.1", "--sample_interval", 2, "--diffusion_steps", 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    run_training(run, *FLAGS)
    return run


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def differing(one, other):
    a, b = contents(one), contents(other)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_equal_runs_are_equal(trained, copied):
    assert differing(trained, copied) == set()
    assert len(contents(trained)) > 15


@pytest.mark.parametrize("kind", ["model", "opt", "0.9999", "power_0.1"])
def test_a_bit_of_a_tensor_is_seen(trained, copied, kind):
    saved = checkpoint.find(str(copied))
    tensors = {k: saved.load(k) for k in map(checkpoint.kind_of, saved.state["files"])}
    changed = next(iter(tensors["opt"]["state"].values()))["exp_avg"] if kind == "opt" else tensors[kind]
    changed = changed if kind == "opt" else next(iter(changed.values()))
    changed.view(-1)[0] = changed.view(-1)[0].nextafter(changed.new_tensor(9.0))
    state = {key: value for key, value in saved.state.items() if key not in ("files", "sha256")}
    checkpoint.save(str(copied), saved.step, tensors, state)
    assert differing(trained, copied) == {checkpoint.member_name(kind, saved.step)}


def test_a_digit_of_a_row_and_a_lost_picture_are_seen(trained, copied):
    table = copied / "progress.csv"
    header, first, last = table.read_text().splitlines()
    cells = last.split(",")
    cells[2] += "1"
    table.write_text("\n".join([header, first, ",".join(cells), ""]))
    (copied / "samples" / "step_000002.png").unlink()
    assert differing(trained, copied) == {"row 2", "step_000002.png"}


def test_a_run_still_says_what_the_soak_expects():
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "improved_diffusion").rglob("*.py")
    )
    assert [text for text in TEXTS if text not in sources] == []


@pytest.mark.parametrize("seed", range(10))
def test_what_is_damaged_is_not_intact(copied, seed):
    assert is_intact(copied, 2)
    spoil(copied / "model000002.pt", random.Random(seed))
    assert not is_intact(copied, 2)


@pytest.mark.parametrize("seed", [0, 5])
def test_no_feature_is_left_to_chance(seed):
    for first in (0, len(FEATURES)):
        cases = [features_of_case(seed, number) for number in range(first, first + len(FEATURES))]
        assert {name for case in cases for name in case} == set(FEATURES)
        assert all(1 <= len(set(case)) == len(case) <= 3 for case in cases)
