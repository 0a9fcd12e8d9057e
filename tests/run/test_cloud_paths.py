"""URLs where paths are expected: training, sampling and converting in a cloud, played by a folder."""

import io
import os
import tempfile

import blobfile as bf
import numpy as np
import pytest
import torch as th
from cloud import BUCKET, Cloud
from conftest import TINY_FLAGS
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion.run import checkpoint
from improved_diffusion.run.remote import working_folder
from improved_diffusion.storage import open_atomic

RUN = BUCKET + "run"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    yield Cloud(tmp_path / "cloud", monkeypatch)
    assert not any("gs:" in name for name in os.listdir(tmp_path)), "a URL was taken for a local path"


@pytest.fixture
def train_there(call_script):
    def run(*args):
        flags = [
            "--data_dir",
            "builtin",
            *TINY_FLAGS,
            "--batch_size",
            2,
            "--save_interval",
            2,
            "--log_interval",
            1,
        ]
        return call_script("image_train.py", *flags, *args)

    return run


def weights(folder):
    found = checkpoint.find(str(folder))
    return found.step, found.load("0.9999")


def test_a_run_lives_in_the_cloud_and_goes_on_from_there(tmp_path, cloud, train_there):
    (tmp_path / "cloud" / "run" / "drawn").mkdir(parents=True)  # what else is there stays there
    for total in (3, 5):
        done = train_there("--log_dir", RUN, "--total_steps", total)
        assert done.returncode == 0, done.stderr
        assert f"run directory: {RUN}" in done.stdout
    assert os.listdir(tempfile.tempdir) == [], "the local copy is gone"
    train_there("--log_dir", tmp_path / "local", "--total_steps", 5)
    (step, there), (_, here) = weights(tmp_path / "cloud" / "run"), weights(tmp_path / "local")
    assert step == 5
    assert all(th.equal(there[name], here[name]) for name in here)
    rows = (tmp_path / "cloud" / "run" / "progress.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4", "5"]
    same = {name for name in os.listdir(tmp_path / "local") if not name.startswith(".")}
    # The remote run has one checkpoint more: that of step 3, where it was interrupted.
    extra = {"model000003.pt", "opt000003.pt", "ema_0.9999_000003.pt", "state000003.json"}
    assert set(os.listdir(tmp_path / "cloud" / "run")) == same | extra | {"drawn"}


def test_pictures_go_there_and_come_back(tmp_path, cloud, train_there):
    for total in (2, 4):
        assert train_there("--log_dir", RUN, "--total_steps", total, "--sample_interval", 2).returncode == 0
    run = tmp_path / "cloud" / "run"
    assert sorted(os.listdir(run / "samples")) == ["step_000002.png", "step_000004.png"]
    # The second session's workbook shows that of the first too.
    assert len(load_workbook(run / "results.xlsx")["Samples"]._images) == 2
    assert cloud.changes.count("+ step_000002.png") == 1


def test_checkpoints_are_complete_or_absent_at_any_time(cloud, train_there):
    done = train_there("--log_dir", RUN, "--total_steps", 4, "--keep_last", 1)
    assert done.returncode == 0, done.stderr
    members = [change for change in cloud.changes if checkpoint.kind_of(change[2:])]
    first = ["+ model000002.pt", "+ ema_0.9999_000002.pt", "+ opt000002.pt", "+ state000002.json"]
    assert set(members[:4]) == set(first) and members[3] == "+ state000002.json"
    assert members[7] == "+ state000004.json"
    assert members[8] == "- state000002.json"
    assert checkpoint.steps(RUN) == [4]


def test_a_branch_from_the_cloud_brings_its_history(tmp_path, cloud, train_there):
    train_there("--log_dir", RUN, "--total_steps", 2)
    done = train_there("--resume_checkpoint", RUN, "--log_dir", tmp_path / "branch", "--total_steps", 3)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "branch" / "progress.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


def test_resuming_without_log_dir_goes_on_there(cloud, train_there):
    train_there("--log_dir", RUN, "--total_steps", 2)
    done = train_there("--resume_checkpoint", RUN, "--total_steps", 3)
    assert done.returncode == 0, done.stderr
    assert checkpoint.steps(RUN) == [2, 3]
    done = train_there("--resume_checkpoint", f"{RUN}/model000002.pt", "--total_steps", 4)
    assert done.returncode == 2
    assert "would overwrite the newer checkpoints up to step 3" in done.stderr


def test_a_mistake_leaves_nothing_there(tmp_path, cloud, train_there):
    done = train_there("--log_dir", RUN, "--lr", "-1")
    assert done.returncode == 2 and "--lr" in done.stderr
    assert not (tmp_path / "cloud").exists()
    assert os.listdir(tempfile.tempdir) == []


def test_an_outage_is_reported_and_made_up_for(tmp_path, cloud, capsys):
    with working_folder(RUN) as (folder, publish):
        cloud.broken = True
        (tmp_path / folder / "log.txt").write_text("first")
        publish([])
        assert f"WARNING: {RUN} is not up to date (no connection)" in capsys.readouterr().out
        cloud.broken = False
    assert (tmp_path / "cloud" / "run" / "log.txt").read_text() == "first"


def test_an_outage_at_the_end_keeps_the_local_copy(tmp_path, cloud):
    with pytest.raises(OSError, match=f"{RUN}: could not be brought up to date") as error:  # noqa: SIM117
        with working_folder(RUN) as (folder, _):
            cloud.broken = True
            (tmp_path / folder / "log.txt").write_text("all there is")
    assert folder in str(error.value)
    assert (tmp_path / folder / "log.txt").read_text() == "all there is"


def test_only_what_has_changed_is_copied(tmp_path, cloud):
    with working_folder(RUN) as (folder, publish):
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text(name)
        publish([])
        (tmp_path / folder / "a.txt").write_text("longer")
    assert cloud.changes == ["+ a.txt", "+ b.txt", "+ a.txt"]


def test_only_what_the_run_has_deleted_is_deleted(tmp_path, cloud):
    with working_folder(RUN) as (folder, publish):
        for name in "abc":
            (tmp_path / folder / name).write_text(name)
        publish([])
        for name in "ab":  # the system cleans up one of them
            (tmp_path / folder / name).unlink()
        cloud.broken = True
        publish(["a"])
        cloud.broken = False
    assert sorted(os.listdir(tmp_path / "cloud" / "run")) == ["b", "c"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, cloud):
    with open_atomic(BUCKET + "file.json", "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError), open_atomic(BUCKET + "file.json", "w") as file:
        file.write("half of the n")
        raise RuntimeError
    assert (tmp_path / "cloud" / "file.json").read_text() == "old"
    assert cloud.changes == ["+ file.json"]


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_training_images_come_from_the_cloud(tmp_path, cloud, train_there, kind):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    url = BUCKET + "images"
    if kind == "npz":
        url += ".npz"
        with open_atomic(url) as file:
            np.savez(file, images)
    else:
        for number, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            with open_atomic(f"{url}/below/{number}.png") as file:
                file.write(buffer.getvalue())
    done = train_there("--data_dir", url, "--log_dir", tmp_path / "run", "--total_steps", 1)
    assert done.returncode == 0, done.stderr
    assert f"4 images from {url}" in done.stdout


@pytest.mark.parametrize("model_path", [RUN, f"{RUN}/model000001.pt"])
def test_images_are_drawn_from_and_into_the_cloud(cloud, call_script, train_there, model_path):
    train_there("--log_dir", RUN, "--total_steps", 1)
    flags = ["--num_samples", 2, "--timestep_respacing", 3, "--save_png", True]
    done = call_script("image_sample.py", "--model_path", model_path, "--log_dir", BUCKET + "drawn", *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(bf.listdir(BUCKET + "drawn")) == [
        "000000.png",
        "000001.png",
        "grid.png",
        "samples_2x8x8x3.npz",
    ]


def test_models_are_converted_there(cloud, call_script, train_there):
    pytest.importorskip("safetensors")
    train_there("--log_dir", RUN, "--total_steps", 1)
    for flags in (
        ["--model_path", RUN, "--to_diffusers", BUCKET + "converted"],
        ["--from_diffusers", BUCKET + "converted", "--log_dir", BUCKET + "back"],
    ):
        done = call_script("convert_checkpoint.py", *flags)
        assert done.returncode == 0, done.stderr
    here, back = checkpoint.find(RUN).load("0.9999"), checkpoint.find(BUCKET + "back").load("model")
    assert all(th.equal(here[name], back[name]) for name in here)


def test_an_error_of_the_cloud_is_one_line(cloud, call_script, monkeypatch):
    def fail(path):
        raise bf.Error("403 forbidden")

    monkeypatch.setattr(bf, "exists", fail)
    done = call_script("image_sample.py", "--model_path", RUN)
    assert done.returncode == 2
    assert "403 forbidden" in done.stderr and done.stderr.count("\n") == 1
