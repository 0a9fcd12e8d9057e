"""The scripts, run as a user runs them: train, continue, sample, and every mistake's one line."""

import csv
import importlib.util
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from conftest import SCRIPTS, TINY_FLAGS, read_json, save_trained
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion.jobs import runs
from improved_diffusion.run import checkpoint

SHORT = ["--total_steps", "12", "--log_interval", "5", "--save_interval", "6", "--ema_rate", "0.9,0.999"]


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A class-conditional run of 12 steps, shared by the tests that only look at it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, str(SCRIPTS / "image_train.py"), *TINY_FLAGS, *SHORT]
    command += [
        "--data_dir",
        "builtin",
        "--class_cond",
        "True",
        "--diffusion_steps",
        "20",
        "--log_dir",
        str(run),
    ]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_a_run_leaves_everything_behind(trained):
    run, output = trained
    assert checkpoint.steps(str(run)) == [6, 12]
    names = {path.name for path in run.iterdir()}
    assert {"progress.csv", "progress.jsonl", "log.txt", "args.json", "run.json", "results.xlsx"} <= names
    assert {"model000012.pt", "ema_0.9_000012.pt", "ema_0.999_000012.pt", "opt000012.pt"} <= names
    rows = csv_rows(run / "progress.csv")
    assert [row["step"] for row in rows] == ["5", "10", "12"]
    quartiles = [f"{term}{q}" for term in ("loss", "mse") for q in ("", "_q0", "_q1", "_q2", "_q3")]
    expected = ["step", "samples", *quartiles, "grad_norm", "param_norm", "lr", "images_per_sec", "elapsed"]
    assert list(rows[0]) == expected
    assert rows[-1]["samples"] == str(12 * 8)
    lines = output.splitlines()
    assert lines[0] == f"run directory: {run}" and str(run) in lines[-1]  # said first and last
    assert "10,000 images from builtin" in output


def test_arguments_and_facts_are_recorded(trained):
    run, _ = trained
    arguments = read_json(run / "args.json")
    assert arguments["num_classes"] == 10 and arguments["data_dir"] == "builtin"
    facts = read_json(run / "run.json")
    assert facts["data"]["source"] == "builtin" and facts["model"]["parameters"] > 10_000
    assert facts["machine"]["cores"] >= 1 and len(facts["sessions"]) == 1
    defaults = facts["defaults"]
    assert defaults.keys() == arguments.keys()
    assert defaults["total_steps"] == 30000 and defaults["data_dir"] == ""
    changed = load_workbook(run / "results.xlsx")["Arguments"].iter_rows(min_row=2, values_only=True)
    changed = {flag.removeprefix("--") for flag, *_, mark in changed if mark}
    assert changed == {name for name in arguments if arguments[name] != defaults[name]} >= {"total_steps"}


def test_the_workbook_says_what_the_csv_says(trained):
    run, _ = trained
    book = load_workbook(run / "results.xlsx")
    assert {"Run", "Metrics", "Charts", "Checkpoints", "Arguments", "Explained"} <= set(book.sheetnames)
    table = list(book["Metrics"].values)
    rows = csv_rows(run / "progress.csv")
    assert [title.partition(" (")[0] for title in table[0]] == list(rows[0])
    for cells, row in zip(table[1:], rows, strict=True):
        for cell, text in zip(
            cells[:-1], list(row.values())[:-1], strict=True
        ):  # elapsed comes back as a time
            assert cell == (pytest.approx(float(text), rel=1e-14) if text else None)
    assert "built-in" in " ".join(str(c) for row in book["Run"].values for c in row if c).lower()


def test_the_same_command_continues_the_run(tmp_path, train):
    run = tmp_path / "run"
    train(*SHORT, "--log_dir", run)
    done = train(*SHORT, "--total_steps", "18", "--log_dir", run)
    assert f"resumed step 12 from {run}" in done.stdout
    assert [row["step"] for row in csv_rows(run / "progress.csv")] == ["5", "10", "15", "18"]
    assert len(read_json(run / "run.json")["sessions"]) == 2
    # The directory alone is enough, and so is any file of its newest checkpoint.
    done = train("--resume_checkpoint", run / "opt000018.pt", "--total_steps", "20")
    assert "resumed step 18" in done.stdout and checkpoint.steps(str(run))[-1] == 20
    done = train("--resume_checkpoint", run / "model000006.pt", "--total_steps", "22", check=2)
    assert "--log_dir" in done.stderr and "20" in done.stderr
    done = train(
        "--resume_checkpoint", run / "model000006.pt", "--total_steps", "8", "--log_dir", tmp_path / "b"
    )
    assert checkpoint.steps(str(tmp_path / "b")) == [8]


def test_finished_run_has_nothing_left_to_do(tmp_path, train):
    train(*SHORT, "--log_dir", tmp_path)
    before = (tmp_path / "progress.csv").read_text()
    done = train(*SHORT, "--log_dir", tmp_path)
    assert "done: 12 steps" in done.stdout
    assert (tmp_path / "progress.csv").read_text() == before


def test_log_dir_from_the_environment(tmp_path, train, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    monkeypatch.chdir(tmp_path)
    train("--total_steps", "1")
    assert checkpoint.steps(str(tmp_path / "env")) == [1]


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--num_channels", "64"], "--num_channels 64"),
        (["--diffusion_steps", "30"], "--diffusion_steps 30"),
        (["--seed", "5"], "--seed 5"),
        (["--data_dir", "OTHER"], "--data_dir"),
        (["--class_cond", "False"], "--class_cond False"),
    ],
)
def test_resuming_another_run_is_refused_by_name(trained, tmp_path, call_script, flags, name):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "a_1.png")
    flags = [str(other) if flag == "OTHER" else flag for flag in flags]
    done = call_script(
        "image_train.py", "--resume_checkpoint", trained[0], "--log_dir", tmp_path / "x", *flags
    )
    assert done.returncode == 2
    assert name in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_allow_changed_flags(trained, tmp_path, call_script):
    flags = ["--seed", "5", "--allow_changed_flags", "True", "--total_steps", "13", "--log_dir", tmp_path]
    call_script("image_train.py", "--resume_checkpoint", trained[0], *flags, check=0)
    assert read_json(tmp_path / "args.json")["seed"] == 5


def sample(run, model_path, out, *flags, check=0):
    """Draw in float32, so that the images of two processes can be compared."""
    options = ["--num_samples", "5", "--batch_size", "3", "--precision", "fp32", "--log_dir", out]
    return run("image_sample.py", "--model_path", model_path, *options, *flags, check=check)


def test_sampling_from_a_run(trained, tmp_path, call_script):
    done = sample(call_script, trained[0], tmp_path, "--save_png", "True")
    assert "ema_0.999_000012.pt" in done.stdout  # the EMA of the largest rate, and it says so
    with np.load(tmp_path / "samples_5x8x8x3.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4]
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 64
    for i in range(5):
        with Image.open(tmp_path / f"{i:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[i])


def load(out):
    with np.load(next(out.glob("samples_*.npz"))) as arrays:
        return arrays["arr_0"].astype(int), arrays["arr_1"]


def test_samples_depend_on_the_seed_and_not_on_the_batch(trained, tmp_path, call_script):
    results = {}
    other_batches = ["--batch_size", "5", "--num_workers", "2"]
    for name, flags in {"a": [], "b": other_batches, "c": ["--seed", "1"]}.items():
        sample(call_script, trained[0], tmp_path / name, *flags)
        results[name] = load(tmp_path / name)[0]
    assert np.abs(results["a"] - results["b"]).max() <= 1  # other batches round differently, no more
    assert np.abs(results["a"] - results["c"]).max() > 20


@pytest.mark.parametrize(
    "flags, sampler, steps",
    [
        ([], "sde_dpmpp_2m", 20),
        (["--interpolate", "True", "--num_samples", "2"], "unipc", 20),
        (["--sampler", "heun", "--sample_steps", "3", "--timestep_spacing", "karras"], "heun", 3),
        (["--sampler", "ddpm"], "ddpm", 20),
        (["--use_ddim", "True"], "ddim", 20),
        (["--timestep_respacing", "ddim7", "--use_ddim", "True"], "ddim", 7),
    ],
)
def test_samplers(trained, tmp_path, call_script, flags, sampler, steps):
    flags = ["--num_samples", 4, *flags, "--class_label", "star,3", "--log_dir", tmp_path]
    done = call_script("image_sample.py", "--model_path", trained[0] / "model000012.pt", *flags)
    assert done.returncode == 0, done.stderr
    assert f"with {sampler} in {steps} steps" in done.stdout
    assert set(load(tmp_path)[1]) == {7, 3}


def test_trajectory_and_interpolation(trained, tmp_path, call_script):
    """Between two images of a seed, in a row for each class; and an animation of how they came about."""
    common = ["--model_path", trained[0], "--class_label", "star,3", "--sample_steps", 4]
    common += ["--precision", "fp32"]  # where images of other batches agree to one grey level
    flags = [
        "--interpolate",
        "True",
        "--num_samples",
        3,
        "--save_trajectory",
        "True",
        "--log_dir",
        tmp_path / "i",
    ]
    done = call_script("image_sample.py", *common, *flags)
    assert done.returncode == 0 and "drawing 6 images" in done.stdout, done.stderr
    between, labels = load(tmp_path / "i")
    assert labels.tolist() == [7, 7, 7, 3, 3, 3]
    with (
        Image.open(tmp_path / "i" / "grid.png") as grid,
        Image.open(tmp_path / "i" / "trajectory.webp") as way,
    ):
        assert grid.size == way.size and grid.width > grid.height
        assert 3 <= way.n_frames <= 5  # frames that do not differ are shown as one
    done = call_script(
        "image_sample.py", *common, "--num_samples", 2, "--sampler", "unipc", "--log_dir", tmp_path / "two"
    )
    ends = load(tmp_path / "two")[0]
    assert np.abs(ends[0] - between[0]).max() <= 1 and np.abs(ends[1] - between[5]).max() <= 1


def test_guidance(tmp_path, train, call_script):
    run = tmp_path / "run"
    classes = ["--class_cond", "True", "--class_dropout", "0.2", "--diffusion_steps", "10"]
    train(*SHORT, *classes, "--log_dir", run)
    for scale in ("1", "4"):
        sample(call_script, run, tmp_path / scale, "--guidance_scale", scale)
    assert np.abs(load(tmp_path / "1")[0] - load(tmp_path / "4")[0]).max() > 0
    done = call_script(
        "image_sample.py", "--model_path", run, "--class_label", "10", "--log_dir", tmp_path / "x"
    )
    assert (
        done.returncode == 2 and "no such class" in done.stderr
    )  # the label for "no class" is none to ask for


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--guidance_scale", "2"], "--guidance_scale 2.0: this model was trained without --class_dropout"),
        (["--num_channels", "64"], "--num_channels 64: contradicts the checkpoint"),
        (["--class_label", "unicorn"], "--class_label 'unicorn'.*circle"),
        (["--timestep_respacing", "21"], "--timestep_respacing"),
        (["--use_ddim", "True", "--sampler", "heun"], "--use_ddim True: contradicts --sampler heun"),
        (["--interpolate", "True", "--sampler", "ddpm"], "--interpolate True: .* ddpm"),
        (["--interpolate", "True", "--use_ddim", "True", "--eta", "0.5"], "--interpolate True: .*--eta 0.5"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--batch_size", "x"], "--batch_size"),
    ],
)
def test_sampling_mistakes(trained, tmp_path, call_script, flags, message):
    options = ["--num_samples", "5", "--log_dir", tmp_path / "out"]
    done = call_script("image_sample.py", "--model_path", trained[0], *options, *flags)
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_model_path_missing_or_wrong(tmp_path, call_script, monkeypatch):
    monkeypatch.setattr(runs, "SHIPPED", "none")
    for flags, message in (
        ([], "--model_path is missing"),
        (["--model_path", tmp_path / "absent"], "--model_path .*absent: there is no such"),
        (["--model_path", tmp_path], "no complete checkpoint"),
    ):
        done = call_script("image_sample.py", *flags)
        assert done.returncode == 2
        assert re.search(message, done.stderr) and done.stderr.count("\n") == 1


def test_weights_without_arguments_need_flags(trained, tmp_path, call_script):
    lonely = tmp_path / "somebody.pt"
    lonely.write_bytes((trained[0] / "model000012.pt").read_bytes())
    done = sample(call_script, lonely, tmp_path / "a", check=2)
    assert "give the flags it was trained with" in done.stderr
    flags = [*TINY_FLAGS, "--class_cond", "True", "--num_classes", "10", "--diffusion_steps", "20"]
    sample(call_script, lonely, tmp_path / "b", *flags)
    sample(call_script, trained[0] / "model000012.pt", tmp_path / "c")
    assert np.array_equal(load(tmp_path / "b")[0], load(tmp_path / "c")[0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr", "-1"], "--lr -1.0: must be at least 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--microbatch", "0"], "--microbatch 0"),
        (["--ema_rate", "2"], "--ema_rate 2"),
        (["--schedule_sampler", "random"], "--schedule_sampler"),
        (["--num_channels", "33"], "--num_channels"),
        (["--image_size", "9"], "--image_size 9"),
        (["--data_dir", "ABSENT"], "--data_dir"),
        (["--data_dir", "EMPTY"], "--data_dir.*no usable image"),
        (["--data_dir", "UNREADABLE"], "--data_dir.*no usable image"),
        (["--data_dir", "PLAIN", "--class_cond", "True"], "--class_cond"),
        (["--log_dir", "FILE"], "--log_dir"),
        (["--resume_checkpoint", "ABSENT"], "--resume_checkpoint"),
        (["--resume_checkpoint", "EMPTY"], "--resume_checkpoint.*no complete checkpoint"),
        (["--nonsense", "1"], "--nonsense"),
        (["--class_cond", "perhaps"], "--class_cond"),
    ],
)
def test_training_mistakes(tmp_path, call_script, flags, message):
    for name in ("EMPTY", "UNREADABLE", "PLAIN"):
        (tmp_path / name).mkdir()
    (tmp_path / "UNREADABLE" / "x.png").write_bytes(b"not an image")
    (tmp_path / "FILE").write_text("a file, not a directory")
    Image.new("RGB", (8, 8)).save(tmp_path / "PLAIN" / "picture.png")
    flags = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    run = tmp_path / "run"
    options = ["--data_dir", "builtin", *TINY_FLAGS, "--log_dir", run, "--total_steps", "1"]
    done = call_script("image_train.py", *options, *flags)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not run.exists()


def test_fewer_images_than_a_batch_wrap_around(tmp_path, train):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        Image.new("RGB", (12, 9), (80 * i, 10, 10)).save(data / f"{i}.png")
    train("--data_dir", data, "--log_dir", tmp_path / "run", "--total_steps", "2", "--batch_size", "7")
    assert csv_rows(tmp_path / "run" / "progress.csv")[-1]["samples"] == "14"


def test_help_is_grouped(run_script):
    done = run_script("image_train.py", "--help", check=0)
    headings = ("what to set first:", "images:", "learning:", "saving and stopping:", "model:", "diffusion:")
    places = [done.stdout.index(f"\n{heading}") for heading in headings]
    assert places == sorted(places), "what people set first comes first"


def test_export_results_script(trained, tmp_path, run_script):
    output = tmp_path / "book.xlsx"
    run_script("export_results.py", trained[0], "--output", output, check=0)
    assert len(list(load_workbook(output)["Metrics"].values)) == 4


def test_tensorboard_missing_names_the_extra(tmp_path, train):
    if importlib.util.find_spec("tensorboard") is None:
        done = train("--tensorboard", "True", "--total_steps", "1", "--log_dir", tmp_path / "r", check=2)
        assert "improved_diffusion[tensorboard]" in done.stderr
    else:
        train("--tensorboard", "True", "--total_steps", "1", "--log_dir", tmp_path / "r")
        assert list((tmp_path / "r").glob("events.out.tfevents*"))


@pytest.mark.parametrize("value, says", [(math.nan, "not finite"), (math.inf, "not finite"), (7, "int64")])
def test_weights_that_are_no_weights_are_refused(tmp_path, call_script, value, says):
    path = tmp_path / "ema_0.99_000004.pt"
    weights = checkpoint.load_tensors(str(save_trained(tmp_path / "run") / path.name))
    name = next(iter(weights))
    weights[name] = weights[name].to(th.tensor(value).dtype)
    weights[name].view(-1)[3] = value
    th.save(weights, path)
    options = ["--num_samples", 1, "--sample_steps", 1, "--log_dir", tmp_path / "out", *TINY_FLAGS]
    done = call_script("image_sample.py", "--model_path", path, *options, "--diffusion_steps", 20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr and name in done.stderr and says in done.stderr
    assert not list((tmp_path / "out").glob("*.npz"))
