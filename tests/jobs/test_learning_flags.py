"""Flags that say how a model learns and is guided, from training to drawing."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_FLAGS, read_json, save_trained
from openpyxl import load_workbook
from PIL import Image
from training_process import run_training

from improved_diffusion import train_util
from improved_diffusion.config import TrainConfig
from improved_diffusion.evaluation.heldout import columns, withhold
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs import runs
from improved_diffusion.jobs.train import _heldout, _preview
from improved_diffusion.run import averages, checkpoint, pace
from improved_diffusion.script_util import create_model_and_diffusion

MODEL = "--image_size 16 --patch_size 2 --class_cond True --class_dropout 0.1 --diffusion_steps 50"
LEARNING = "--prediction v --schedule_sampler log-normal --sigma_mean -1 --sigma_std 1.4 --uniform_share 0.2"
LEARNING += " --loss_weighting edm --lr 1e-3 --lr_warmup_steps 4 --lr_decay linear --lr_decay_share 0.5"
LEARNING += " --ema_lengths 0.05,0.1 --batch_size 8 --microbatch 8"
RUNNING = "--total_steps 16 --save_interval 4 --log_interval 1 --sample_interval 0 --heldout_dir builtin"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning") / "run"
    run_training(folder, *f"{MODEL} {LEARNING} {RUNNING}".split())
    return folder


def draw(call_script, run, out, *flags):
    flags = ["--num_samples", 4, "--sample_steps", 3, "--precision", "fp32", *flags]
    done = call_script("image_sample.py", "--model_path", run, "--log_dir", out, *flags)
    assert done.returncode == 0, done.stderr
    return np.load(next(Path(out).glob("*.npz")))["arr_0"].astype(int)


def test_what_the_flags_say_is_recorded_and_done(run):
    arguments = read_json(run / "args.json")
    assert (arguments["prediction"], arguments["loss_weighting"], arguments["patch_size"]) == ("v", "edm", 2)
    with open(run / "progress.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    rise, fall = [2.5e-4, 5e-4, 7.5e-4], [1e-3 * left / 8 for left in range(8, 0, -1)]
    assert rates == pytest.approx([*rise, *[1e-3] * 5, *fall])
    newest = checkpoint.find(str(run))
    assert newest.power_lengths == ["0.05", "0.1"]
    assert newest.load("model")["input_blocks.0.0.weight"].shape == (32, 3 * 2 * 2, 3, 3)


def test_the_held_out_loss_falls(run):
    with open(run / "checkpoints.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["4", "8", "12", "16"]
    assert set(columns()) - set(table[0]) == set()
    losses = [float(row["heldout_loss"]) for row in table]
    assert losses[-1] < losses[0]
    sheet = load_workbook(run / "results.xlsx")["Checkpoints"]
    assert "best" in str([cell.value for row in sheet.iter_rows() for cell in row])


def test_an_average_of_any_length_is_drawn_with(run, tmp_path, call_script):
    pictures = draw(call_script, run, tmp_path / "made", "--ema_length", 0.15)
    kept = draw(call_script, run / "power_0.1_000016.pt", tmp_path / "kept")
    again = draw(call_script, run, tmp_path / "again", "--ema_length", 0.1)
    assert (pictures != kept).any()
    # What is kept is made of itself, up to rounding.
    assert np.abs(again - kept).max() <= 1
    weights, distance = averages.reconstruct(averages.with_averages(str(run)), 0.15, 16)
    assert distance < 0.3 and weights.keys() == checkpoint.find(str(run)).load("model").keys()


def test_an_average_of_any_length_is_published(run, tmp_path, call_script):
    flags = ["--model_path", run, "--log_dir", tmp_path / "small", "--ema_length", 0.15]
    assert call_script("publish_model.py", *flags).returncode == 0
    published = draw(call_script, tmp_path / "small", tmp_path / "published")
    drawn = draw(call_script, run, tmp_path / "drawn", "--ema_length", 0.15)
    assert np.abs(published - drawn).max() <= 16, "the weights have 16 bits"


def test_guidance_in_an_interval(run, tmp_path, call_script):
    plain = draw(call_script, run, tmp_path / "plain")
    everywhere = draw(call_script, run, tmp_path / "everywhere", "--guidance_scale", 3)
    within = ["--guidance_scale", 3, "--guidance_interval"]
    all_of_it = draw(call_script, run, tmp_path / "all", *within, "0,1000")
    nowhere = draw(call_script, run, tmp_path / "nowhere", *within, "1,1.0001")  # between two steps
    assert (plain != everywhere).any()
    np.testing.assert_array_equal(all_of_it, everywhere)
    np.testing.assert_array_equal(nowhere, plain)


def test_autoguidance_by_an_earlier_checkpoint(run, tmp_path, call_script):
    plain = draw(call_script, run, tmp_path / "plain")
    early = ["--autoguidance_path", run / "model000004.pt"]
    guided = draw(call_script, run, tmp_path / "guided", *early, "--autoguidance_scale", 3)
    not_at_all = draw(call_script, run, tmp_path / "not", *early, "--autoguidance_scale", 1)
    assert (guided != plain).any()
    np.testing.assert_array_equal(not_at_all, plain)


def test_without_a_number_every_class_fills_its_row(run, tmp_path, call_script):
    flags = ["--model_path", run, "--sample_steps", 2, "--log_dir", tmp_path / "drawn"]
    call_script("image_sample.py", *flags, check=0)
    with np.load(tmp_path / "drawn" / "samples_70x16x16x3.npz") as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [7] * 10


def test_a_model_is_published_with_its_guidance(run, tmp_path, call_script):
    flags = ["--model_path", run, "--log_dir", tmp_path / "model", "--guidance_scale", 3]
    call_script("publish_model.py", *flags, "--guidance_interval", "0.1,9", check=0)
    drawn = draw(call_script, tmp_path / "model", tmp_path / "published")
    guided = draw(
        call_script, run, tmp_path / "guided", "--guidance_scale", 3, "--guidance_interval", "0.1,9"
    )
    plain = draw(call_script, tmp_path / "model", tmp_path / "plain", "--guidance_scale", 1)
    assert abs(drawn - guided).mean() < 1 < abs(drawn - plain).mean()


MISTAKES = {
    "--guidance_interval 3,1": "--guidance_interval 3,1: expected two numbers",
    "--guidance_interval 1,3": "--guidance_interval 1,3: needs --guidance_scale or --autoguidance_path",
    "--guidance_scale 2 --guidance_interval 500,600": "--guidance_interval 500,600: this model's noise is from ",
    "--guidance_scale nan": "--guidance_scale nan: must be at least 0",
    "--guidance_scale inf": "--guidance_scale inf: must be at least 0 and at most 1000",
    "--autoguidance_scale 3": "--autoguidance_scale 3.0: needs --autoguidance_path",
    "--autoguidance_path nowhere --autoguidance_scale 1": "--autoguidance_path nowhere: there is no such file",
    "--ema_length 0.5": "--ema_length 0.5: expected a number from 0.01 to 0.28",
    "--autoguidance_path nowhere": "--autoguidance_path nowhere: there is no such file",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_in_drawing(run, tmp_path, call_script, flags):
    done = call_script("image_sample.py", "--model_path", run, "--log_dir", tmp_path / "out", *flags.split())
    assert done.returncode == 2 and MISTAKES[flags] in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prediction": "epsilon"}, "has --prediction epsilon, but the model has v; they must agree"),
        (
            {"class_cond": False, "class_dropout": 0.0},
            "has --class_cond False, but the model has True; they must agree",
        ),
        ({}, "has other classes than the model; they must agree"),
    ],
)
def test_autoguidance_needs_a_model_of_the_same_task(run, tmp_path, call_script, arguments, message):
    stored = {**read_json(run / "args.json"), "num_classes": 10, "class_dropout": 0.1, **arguments}
    save_trained(tmp_path / "other", class_names=[f"class {i}" for i in range(10)], **stored)
    flags = ["--model_path", run, "--autoguidance_path", tmp_path / "other", "--log_dir", tmp_path / "out"]
    done = call_script("image_sample.py", *flags, check=2)
    assert f"--autoguidance_path {tmp_path / 'other'}: {message}" in done.stderr


def test_a_file_has_no_averages_of_other_lengths(run, tmp_path, call_script):
    flags = ["--model_path", run / "model000016.pt", "--ema_length", 0.1]
    done = call_script("image_sample.py", *flags, "--log_dir", tmp_path)
    assert done.returncode == 2 and "--ema_length 0.1: needs the directory of a run" in done.stderr


def test_a_run_without_averages_is_named_by_the_flag(tmp_path):
    with pytest.raises(
        ValueError, match="^--ema_length 0.1: no checkpoint up to step 5 holds .* --ema_lengths"
    ):
        runs._average(str(tmp_path), 0.1, 5, log=print)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--lr_decay_share 0.5", "--lr_decay_share 0.5: needs"),
        ("--lr_decay cosine --lr_anneal_steps 5", "--lr_decay cosine: contradicts --lr_anneal_steps 5"),
        ("--lr_decay linear --lr_warmup_steps 9 --total_steps 9", "--lr_warmup_steps 9: leaves nothing"),
        ("--ema_lengths 0.05,0.5", "--ema_lengths 0.05,0.5: expected numbers from 0.01 to 0.28"),
        ("--heldout_dir nowhere", "nowhere does not exist"),
        (
            "--heldout_dir nowhere --heldout_share 0.1",
            "--heldout_share 0.1: contradicts --heldout_dir nowhere",
        ),
        ("--recipe cifar", "--recipe cifar: use one of cifar10, small; did you mean cifar10?"),
        ("--hours 2 --total_steps 30", "--total_steps 30: contradicts --hours 2.0"),
        ("--patch_size 3", "--patch_size 3: must divide the image size 32"),
        ("--loss_weighting edm --use_kl True", "--loss_weighting edm: contradicts --use_kl True"),
        (
            "--prediction epsilon --predict_xstart True",
            "--predict_xstart True: contradicts --prediction epsilon",
        ),
        ("--sigma_mean 3", "--sigma_mean 3.0: needs --schedule_sampler log-normal or --loss_weighting edm"),
        (
            "--uniform_share 0.5 --loss_weighting edm",
            "--uniform_share 0.5: needs --schedule_sampler log-normal",
        ),
        (
            "--guidance_scale nan --class_cond True --class_dropout 0.1",
            "--guidance_scale nan: must be at least 0",
        ),
        (
            "--recipe cifar10 --total_steps 1",
            "--lr_warmup_steps 150: leaves nothing of --total_steps 1 for --lr_decay linear (--recipe cifar10 sets "
            "--lr_warmup_steps 150 --lr_decay linear)",
        ),
        ("--schedule_sampler log-normal --sigma_mean 20 --sigma_std 0.1", "--sigma_mean 20.0, std 0.1: no"),
        ("--prediction noise", "--prediction noise: use one of epsilon, x_start, v, edm"),
    ],
)
def test_mistakes_in_training(tmp_path, call_script, flags, message):
    done = call_script(
        "image_train.py", "--data_dir", "builtin", "--log_dir", tmp_path / "run", *flags.split()
    )
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.glob("run/*.pt"))


def test_hours_decide_the_steps(tmp_path, call_script, monkeypatch):
    monkeypatch.setattr(pace, "MEASURED_SECONDS", 0.3)
    flags = [
        "--data_dir",
        "builtin",
        *TINY_FLAGS,
        "--hours",
        "0.001",
        "--lr_decay",
        "linear",
        "--log_interval",
        1,
    ]
    flags += ["--sample_interval", 0, "--precision", "fp32", "--log_dir", tmp_path / "run"]
    done = call_script("image_train.py", *flags)
    assert done.returncode == 0, done.stderr
    total = read_json(tmp_path / "run" / "args.json")["total_steps"]
    assert f"that is --total_steps {total}" in done.stdout
    with open(tmp_path / "run" / "checkpoints.csv", newline="") as file:
        saved = [int(row["step"]) for row in csv.DictReader(file)]
    assert len(saved) == len(set(saved)) and saved[-1] == total
    newest = checkpoint.find(str(tmp_path / "run"))
    assert newest.step == total != 30000 and newest.state["plan"]["hours"] == 0.001
    with open(tmp_path / "run" / "progress.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert len(rates) == total
    assert rates[0] == pytest.approx(1e-4, rel=1e-6) and rates[-1] == pytest.approx(1e-4 / total)
    # What was decided stays.
    done = call_script("image_train.py", *flags)
    assert "nothing left to do" in done.stdout and checkpoint.find(str(tmp_path / "run")).step == total
    # A number of steps prolongs it, as that message says.
    more = ["--total_steps", total + 2, "--log_dir", tmp_path / "run"]
    call_script("image_train.py", *more, check=0)
    assert checkpoint.find(str(tmp_path / "run")).step == total + 2


def test_hours_that_are_too_few_are_named(tmp_path, call_script, monkeypatch):
    monkeypatch.setattr(pace, "MEASURED_SECONDS", 0)
    flags = ["--data_dir", "builtin", *TINY_FLAGS, "--hours", "0.00001", "--sample_interval", 0]
    flags += ["--lr_warmup_steps", 30, "--lr_decay", "linear", "--log_dir", tmp_path / "run"]
    done = call_script("image_train.py", *flags, check=0)
    assert (
        "WARNING: --hours 1e-05: is too short for --lr_warmup_steps 30; this run takes about" in done.stdout
    )
    assert checkpoint.find(str(tmp_path / "run")).step == 31


@pytest.mark.parametrize(
    "flags, images",
    [
        ({}, 16),
        ({"class_cond": True, "num_classes": 3}, 12),
        ({"class_cond": True, "num_classes": 10, "class_dropout": 0.1, "guidance_scale": 2.0}, 80),
    ],
)
def test_the_cost_of_a_preview(tmp_path, flags, images):
    _, diffusion = create_model_and_diffusion(**TINY)
    photos = read_images("builtin", 8)
    assert _preview(TrainConfig(**flags), diffusion, photos, str(tmp_path))[1] == images


def test_a_run_of_hours_that_is_stopped_keeps_what_was_decided(tmp_path, call_script, monkeypatch):
    plan = train_util.TrainLoop._plan

    def plan_and_stop(loop):
        plan(loop)
        loop.max_hours = 1e-9

    monkeypatch.setattr(pace, "MEASURED_SECONDS", 0)
    monkeypatch.setattr(train_util, "steps_within", lambda *arguments, **options: 6)
    monkeypatch.setattr(train_util.TrainLoop, "_plan", plan_and_stop)
    flags = ["--data_dir", "builtin", *TINY_FLAGS, "--hours", "0.002", "--sample_interval", 0]
    flags += ["--precision", "fp32", "--log_dir", tmp_path / "run"]
    call_script("image_train.py", *flags)
    stopped = checkpoint.find(str(tmp_path / "run"))
    assert stopped.state["arguments"]["total_steps"] == stopped.step + 6
    monkeypatch.setattr(train_util, "steps_within", lambda *arguments, **options: 1)
    call_script("image_train.py", *flags)
    assert checkpoint.find(str(tmp_path / "run")).step == stopped.step + 6


def test_a_share_of_the_images_is_withheld(tmp_path, call_script):
    pixels = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "ten.npz", arr_0=pixels, arr_1=np.arange(10) // 5)
    flags = ["--data_dir", tmp_path / "ten.npz", *TINY_FLAGS, "--class_cond", True, "--sample_interval", 0]
    flags += ["--heldout_share", 0.2, "--total_steps", 2, "--log_dir", tmp_path / "run"]
    done = call_script("image_train.py", *flags, check=0)
    assert "8 images from" in done.stdout and "withheld for the held-out loss: 2 more" in done.stdout
    with open(tmp_path / "run" / "checkpoints.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["heldout_loss"]) > 0
    # It is a part of what the run is.
    done = call_script("image_train.py", "--heldout_share", 0.3, "--log_dir", tmp_path / "run", check=2)
    assert re.search(
        r"--heldout_share 0.3: the run to resume was started with 0.2; leave the flag out", done.stderr
    )


def test_held_out_images_need_the_same_classes(tmp_path, call_script):
    for name, label in (("cat", 3), ("dog", 5)):
        pixels = np.full((4, 8, 8, 3), label, dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels, arr_1=[label] * 4)
    flags = ["--data_dir", tmp_path / "cat.npz", *TINY_FLAGS, "--class_cond", True]
    flags += ["--heldout_dir", tmp_path / "dog.npz", "--log_dir", tmp_path / "run"]
    done = call_script("image_train.py", *flags, check=2)
    assert (
        f"--heldout_dir {tmp_path / 'dog.npz'}: its classes differ from those of the training" in done.stderr
    )


def test_held_out_images_that_are_trained_on_are_named(tmp_path, call_script):
    flags = ["--data_dir", "builtin", *TINY_FLAGS, "--heldout_dir", "builtin", "--sample_interval", 0]
    done = call_script("image_train.py", *flags, "--total_steps", 1, "--log_dir", tmp_path / "run", check=0)
    assert "WARNING: --heldout_dir builtin: these are the training images" in done.stdout


def test_cifar10_holds_out_its_test_images(tmp_path):
    """Without flags, and only if its test images are there too."""
    photos = read_images("builtin", 8)
    _, diffusion = create_model_and_diffusion(**TINY)
    config = TrainConfig(data_dir=str(tmp_path / "datasets" / "cifar_train"), image_size=8)
    assert _heldout(config, diffusion, photos, None, str(tmp_path)) is None
    test = tmp_path / "datasets" / "cifar_test"
    test.mkdir(parents=True)
    for number in range(9):
        Image.fromarray(photos.get(np.array([number]))[0]).save(test / f"x_{number}.png")
    (test / ".complete").touch()
    assert _heldout(replace(config, heldout_dir="none"), diffusion, photos, None, str(tmp_path)) is None
    measured = _heldout(config, diffusion, photos, None, str(tmp_path))
    assert measured(lambda x, t: x).keys() == set(columns())


def test_no_withheld_image_is_trained_on():
    images = read_images("builtin", 8)
    remaining, withheld = withhold(images, 0.01)
    assert len(remaining) + len(withheld) == len(images) and len(withheld) == round(0.01 * len(images))
    assert len(set(withheld.labels)) == images.num_classes
    first = withheld.get(np.array([0]))
    assert (first == images.get(np.array([0]))).all()
    assert (remaining.get(np.array([0])) == images.get(np.array([1]))).all()
