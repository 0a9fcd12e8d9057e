"""publish_model.py: a small folder that can be drawn from and exported, and says nothing of the machine."""

import json
import re
import shutil

import numpy as np
import pytest
import torch as th
from conftest import read_json
from openpyxl import load_workbook

from improved_diffusion.convert.publish import without_folders
from improved_diffusion.results.export import export
from improved_diffusion.run import checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of a few steps, with two averages and a preview."""
    return tmp_path_factory.mktemp("somewhere") / "run"


@pytest.fixture
def trained(run_dir, train):
    if not run_dir.exists():
        flags = ("--total_steps", 4, "--save_interval", 2, "--sample_interval", 2, "--log_interval", 2)
        train(*flags, "--ema_rate", "0.5,0.9", "--log_dir", run_dir)
    return run_dir


def publish(call_script, *flags):
    return call_script("publish_model.py", *flags)


def cells(path):
    book = load_workbook(path)
    return {sheet.title: [[cell.value for cell in row] for row in sheet.iter_rows()] for sheet in book}


def test_guidance_needs_class_dropout(trained, tmp_path, call_script):
    flags = ["--model_path", trained, "--log_dir", tmp_path / "small", "--guidance_scale", 2]
    done = call_script("publish_model.py", *flags, check=2)
    assert "--guidance_scale" in done.stderr and "was trained without class_dropout" in done.stderr
    assert not (tmp_path / "small").exists()


def test_it_draws_what_the_run_draws(trained, tmp_path, call_script):
    done = publish(call_script, "--model_path", trained, "--log_dir", tmp_path / "small")
    assert done.returncode == 0 and str(tmp_path / "small") in done.stdout
    (weights,) = (tmp_path / "small").glob("*.pt")
    assert weights.name == "ema_0.9_000004.pt"
    assert 2 * weights.stat().st_size < 1.2 * (trained / weights.name).stat().st_size
    assert all(tensor.dtype == th.float16 for tensor in checkpoint.load_tensors(str(weights)).values())
    drawn = []
    for model in (trained, tmp_path / "small"):
        out = tmp_path / f"drawn-{model.name}"
        flags = ("--num_samples", 2, "--sample_steps", 3, "--precision", "fp32")
        assert call_script("image_sample.py", "--model_path", model, *flags, "--log_dir", out).returncode == 0
        with np.load(next(out.glob("*.npz"))) as arrays:
            drawn.append(arrays["arr_0"].astype(int))
    assert abs(drawn[0] - drawn[1]).mean() < 1


def test_its_workbook_is_that_of_the_run(trained, tmp_path, call_script):
    publish(call_script, "--model_path", trained, "--ema_rate", "0.5", "--log_dir", tmp_path / trained.name)
    ours = cells(export(str(tmp_path / trained.name), str(tmp_path / "ours.xlsx")))
    theirs = cells(export(str(trained), str(tmp_path / "theirs.xlsx")))
    assert list(ours) == list(theirs) and "Samples" in ours
    for sheet in ("Metrics", "Checkpoints", "Smoothed", "Samples", "Explained"):
        assert ours[sheet] == theirs[sheet]


def test_it_says_nothing_of_the_machine(trained, tmp_path, call_script):
    publish(call_script, "--model_path", trained, "--log_dir", tmp_path / "small")
    for path in (tmp_path / "small").rglob("*"):
        if path.suffix in (".json", ".csv"):
            text = path.read_text(encoding="utf-8")
            assert str(trained.parent) not in text, path
    assert read_json(tmp_path / "small" / "args.json")["log_dir"] == "run"


@pytest.mark.parametrize(
    "text, shortened",
    [
        ("/home/me/data/cifar", "cifar"),
        ("python a.py --log_dir /home/me/runs/x --lr 1e-4", "python a.py --log_dir x --lr 1e-4"),
        ("'/home/me/my run'", "'my run'"),
        (r"C:\Users\me\runs\x", "x"),
        ("12.5 images/s, 3/4 of it", "12.5 images/s, 3/4 of it"),
        ("gs://bucket/run", "gs://bucket/run"),
    ],
)
def test_paths_are_shortened(text, shortened):
    assert without_folders({"a": [text, 3, None, True]}) == {"a": [shortened, 3, None, True]}


def test_it_cannot_be_trained_further(trained, tmp_path, call_script, train):
    publish(call_script, "--model_path", trained, "--log_dir", tmp_path / "small")
    done = train("--log_dir", tmp_path / "small", "--total_steps", 9, check=2)
    assert len(done.stderr.splitlines()) == 1 and "records no file" in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--log_dir", "new"], "--model_path is missing"),
        (["--model_path", "RUN"], "--log_dir is missing"),
        (["--model_path", "nowhere", "--log_dir", "new"], "--model_path nowhere"),
        (["--model_path", "RUN", "--log_dir", "RUN"], "already exists"),
        (
            ["--model_path", "RUN", "--log_dir", "new", "--guidance_scale", "2"],
            "--guidance_scale: .* without class_dropout",
        ),
        (["--model_path", "RUN", "--log_dir", "new", "--guidance_interval", "1,2"], "needs --guidance_scale"),
        (["--model_path", "RUN", "--log_dir", "new", "--ema_rate", "0.7"], "--ema_rate 0.7: .* 0.5, 0.9"),
    ],
)
def test_mistakes(trained, tmp_path, call_script, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    done = publish(call_script, *(trained if flag == "RUN" else flag for flag in flags))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "new").exists()


def test_a_damaged_record_is_named(trained, tmp_path, call_script):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "run.json").write_text(json.dumps({})[:-1])
    done = publish(call_script, "--model_path", copy, "--log_dir", tmp_path / "new")
    assert done.returncode == 2 and "run.json" in done.stderr and not (tmp_path / "new").exists()
