"""What somebody meets who uses the scripts for the first time: hints, and mistakes told in one line."""

import json
import os
from dataclasses import replace

import pytest
import torch as th
from conftest import TINY, TINY_FLAGS, save_trained

from improved_diffusion import storage
from improved_diffusion.config import SampleConfig, SuperResTrainConfig, TrainConfig
from improved_diffusion.jobs import runs
from improved_diffusion.jobs.sample import YOUNG, warn_of_youth
from improved_diffusion.jobs.script import is_out_of_memory
from improved_diffusion.run import checkpoint
from improved_diffusion.train_util import TrainLoop

SHORT = [
    *TINY_FLAGS,
    "--data_dir",
    "builtin",
    "--precision",
    "fp32",
    "--num_workers",
    1,
    "--sample_interval",
    0,
]


def unfinished(folder, step, config):
    save_trained(folder, step=step)
    (folder / "args.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


def test_an_unfinished_run_with_the_same_flags_is_found(tmp_path):
    config = TrainConfig(**TINY, class_cond=True, total_steps=9)
    assert runs.find_unfinished(config, str(tmp_path / "runs")) is None
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "one"
    # A run has found its data and counted their classes.
    unfinished(run, 4, replace(config, data_dir="/data/cifar_train", num_classes=10, log_dir="elsewhere"))
    found = runs.find_unfinished(config, str(tmp_path / "runs"))
    assert found == (str(run), 4)
    for other in (
        replace(config, lr=1.0),
        replace(config, data_dir="builtin"),
        replace(config, total_steps=4),
        replace(config, total_steps=10),
        SuperResTrainConfig(total_steps=9),
    ):
        assert runs.find_unfinished(other, str(tmp_path / "runs")) is None
    # A run of hours has decided its number of steps.
    hours = replace(config, hours=2.0, total_steps=30000)
    unfinished(run, 4, replace(hours, data_dir="/data/cifar_train", num_classes=10, total_steps=9))
    assert runs.find_unfinished(hours, str(tmp_path / "runs")) == (str(run), 4)
    assert runs.find_unfinished(replace(hours, hours=3.0), str(tmp_path / "runs")) is None
    unfinished(run, 4, replace(hours, data_dir="/data/cifar_train", num_classes=10, total_steps=4))
    assert runs.find_unfinished(hours, str(tmp_path / "runs")) is None
    (run / "args.json").write_text(json.dumps({**hours.to_dict(), "total_steps": "many"}), encoding="utf-8")
    assert runs.find_unfinished(hours, str(tmp_path / "runs")) is None
    (run / "args.json").write_text("damaged", encoding="utf-8")
    assert runs.find_unfinished(config, str(tmp_path / "runs")) is None


@pytest.mark.parametrize(
    "name, message",
    [
        ("results.xlsx", "results.xlsx: is an Excel workbook; give a run directory"),
        ("drawn.npz", "is an archive of images"),
        ("picture.png", "is a picture"),
        ("args.json", "is a record of a run"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ValueError, match=message):
        runs.load_trained(str(tmp_path / name), SampleConfig(), set())


def test_a_folder_of_runs_names_the_newest(tmp_path):
    for number, name in enumerate(("old", "new")):
        save_trained(tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    with pytest.raises(ValueError, match="is a folder of runs; the newest of them is .*new$"):
        runs.load_trained(str(tmp_path), SampleConfig(), set())


def test_what_is_not_done_with_a_checkpoint_is_said(tmp_path):
    for name in ("old", "new"):
        save_trained(tmp_path / name)
    said = []
    assert runs.choose_source(str(tmp_path / "old"), str(tmp_path / "new"), said.append).folder == str(
        tmp_path / "new"
    )
    assert said == [
        "note: the run's directory has checkpoints already, so it goes on from step 4; --resume_checkpoint only "
        "counts in a new directory"
    ]
    assert runs.choose_source(str(tmp_path / "new"), str(tmp_path / "new"), pytest.fail).step == 4


@pytest.mark.parametrize(
    "damage, path, message",
    [
        (False, "empty", "holds no complete checkpoint; give a run directory or a .pt file"),
        (
            True,
            "run/ema_0.99_000004.pt",
            r"damaged \(9 bytes where \d+ were written\); give the directory, for its newest",
        ),
        (True, "alone.pt", r"truncated or damaged \(neither an archive nor a pickle\)$"),
    ],
)
def test_weights_that_cannot_be_read(tmp_path, damage, path, message):
    save_trained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    if damage:
        (tmp_path / path).write_bytes(b"some text")
    with pytest.raises(ValueError, match=f"^--model_path {tmp_path / path}: .*{message}"):
        runs.read_weights(str(tmp_path / path), SampleConfig())


def test_a_model_says_what_it_began_with(tmp_path):
    save_trained(tmp_path / "run", init_from="other")
    assert str(runs.read_weights(str(tmp_path / "run"), SampleConfig())).endswith(
        "(4 steps, 32 images after those of other)"
    )


def test_a_folder_that_cannot_be_read_is_no_run(tmp_path, monkeypatch):
    for name in ("mine", "closed"):
        save_trained(tmp_path / name)
    steps = checkpoint.steps

    def deny(folder):
        if folder.endswith("closed"):
            raise PermissionError(folder)
        return steps(folder)

    monkeypatch.setattr(checkpoint, "steps", deny)  # root may read everything
    with pytest.raises(ValueError, match="is a folder of runs; the newest of them is .*mine$"):
        runs.load_trained(str(tmp_path), SampleConfig(), set())


def test_two_commands_at_the_same_moment_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    names = iter("112")  # the second command looks before the first one has created its directory
    monkeypatch.setattr(storage, "new_directory", lambda parent: os.path.join(parent, next(names)))
    found = [runs.choose_out_dir("", str(tmp_path / "samples")) for _ in range(2)]
    assert found == [str(tmp_path / "samples" / name) for name in "12"]


def test_a_model_that_is_too_young_to_draw(tmp_path, call_script, capsys):
    warn_of_youth(YOUNG)
    warn_of_youth(0)  # an imported model
    assert capsys.readouterr().out == ""
    save_trained(tmp_path / "run", step=41)
    options = ["--num_samples", 1, "--sample_steps", 1, "--precision", "fp32", "--log_dir", tmp_path / "out"]
    done = call_script("image_sample.py", "--model_path", tmp_path / "run", *options)
    assert done.returncode == 0 and "trained on 328 images only" in done.stdout
    assert str(tmp_path / "out") in done.stdout, "it says where the images are"


def test_running_out_of_memory_is_one_line_that_says_what_helps(tmp_path, call_script, monkeypatch):
    original = TrainLoop.compute_gradient

    def hungry(loop, drawn):
        if loop.step == 3:
            th.empty(2**60)
        return original(loop, drawn)

    monkeypatch.setattr(TrainLoop, "compute_gradient", hungry)
    run = tmp_path / "run"
    done = call_script("image_train.py", *SHORT, "--total_steps", 9, "--save_interval", 2, "--log_dir", run)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "step 4" in line and "--microbatch" in line and "--use_checkpoint" in line and "checkpoint 2" in line
    )
    assert line in (run / "log.txt").read_text(encoding="utf-8")
    assert checkpoint.steps(str(run)) == [2]


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        th.empty(2**60)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("memory"))


def test_progress_off_a_terminal_is_a_line_now_and_then(tmp_path, call_script):
    done = call_script(
        "image_train.py", *SHORT, "--total_steps", 9, "--log_interval", 1, "--log_dir", tmp_path
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/9", "9/9"], (
        "the first, the last, and one each half minute"
    )
