"""One process per run directory: the second is refused by name of the first, and no crash locks anybody out."""

import os
import shutil
import subprocess
import sys

import pytest
from training_process import Training, assert_one_line_error, rows, run_training

from improved_diffusion.run.lock import run_lock

SHORT = ["--total_steps", 2, "--batch_size", 2]


def hold_lock_in_another_process(folder):
    """A process that holds the lock of `folder` until its stdin is closed."""
    code = (
        "import sys; from improved_diffusion.run.lock import run_lock\n"
        "with run_lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_second_process_is_refused_by_name_of_the_first(tmp_path):
    run = tmp_path / "run"
    with Training(run, "--total_steps", 10**6, "--batch_size", 2, "--log_interval", 1) as first:
        first.wait_for_rows(1)
        second = run_training(run, *SHORT, check=2)
        assert_one_line_error(second, f"--log_dir {run}: in use by process {first.pid} on ")
        # The first has not noticed.
        before = len(rows(run))
        first.wait_for_rows(before + 2)
        assert first.stderr == ""


def test_a_killed_owner_blocks_nobody(tmp_path):
    run = tmp_path / "run"
    with Training(run, *SHORT, "--total_steps", 10**6, "--log_interval", 1) as owner:
        owner.wait_for_rows(1)
        owner.kill()
        owner.wait()
    assert (run / ".lock-owner.json").exists()  # it had no time to tidy up
    run_training(run, *SHORT)
    assert not (run / ".lock-owner.json").exists()


def test_the_lock_ends_with_its_owner(tmp_path):
    holder = hold_lock_in_another_process(tmp_path)
    with (
        pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .+ since \d{{4}}-"),
        run_lock(str(tmp_path)),
    ):
        pass
    holder.communicate()
    with run_lock(str(tmp_path)):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\0\xff"])
def test_an_unreadable_owner_is_another_process(tmp_path, content):
    holder = hold_lock_in_another_process(tmp_path)
    (tmp_path / ".lock-owner.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="in use by another process; wait"), run_lock(str(tmp_path)):
        pass
    holder.communicate()


def test_a_mistake_leaves_no_directory_behind(tmp_path):
    run = tmp_path / "run"
    failed = run_training(run, "--data_dir", tmp_path / "absent", check=2)
    assert_one_line_error(failed, "--data_dir", str(tmp_path / "absent"))
    assert not run.exists()


def test_a_directory_that_was_there_stays(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    run_training(run, "--data_dir", tmp_path / "absent", check=2)
    assert {path.name for path in run.iterdir()} <= {"notes.txt", ".lock"}
    assert (run / "notes.txt").read_text() == "mine"


def test_what_the_body_wrote_stays(tmp_path):
    with run_lock(str(tmp_path / "run")):
        (tmp_path / "run" / "model.pt").write_text("x")
    assert (tmp_path / "run" / "model.pt").exists()


@pytest.mark.skipif(os.name != "posix", reason="open files cannot be deleted")
def test_the_reason_is_told_when_the_directory_vanishes(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(OSError, match="the reason"), run_lock(str(run)):
        shutil.rmtree(run)
        raise OSError("the reason")


def test_remote_directories_cannot_be_locked():
    with (
        pytest.raises(ValueError, match="gs://bucket/run: .*local directory"),
        run_lock("gs://bucket/run"),
    ):
        pass
