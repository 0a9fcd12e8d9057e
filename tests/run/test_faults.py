"""Disks that fill up, turn read-only or vanish, provoked for real: one clear line, and the same command goes on."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image
from training_process import (
    Training,
    assert_one_line_error,
    assert_same_run,
    rows,
    run_training,
)

from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import member_name
from improved_diffusion.storage import TEMPORARY_PREFIX, open_atomic

FLAGS = ["--save_interval", 4, "--log_interval", 3, "--batch_size", 4, "--ema_rate", "0.9,0.99"]
HALF, WHOLE = 4, 8

posix = pytest.mark.skipif(os.name != "posix", reason="needs the limits and permissions of POSIX")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_training(run, *FLAGS, "--total_steps", WHOLE)
    return run


@pytest.fixture(scope="module")
def first_half(tmp_path_factory):
    run = tmp_path_factory.mktemp("half") / "run"
    run_training(run, *FLAGS, "--total_steps", HALF)
    return run


@pytest.fixture
def half(first_half, tmp_path):
    """A run with one checkpoint, which the test may go on with in its own way."""
    return shutil.copytree(first_half, tmp_path / "run")


def assert_previous_checkpoint_is_intact(run, step=HALF):
    assert checkpoint.find(str(run), log=pytest.fail).step == step
    assert not [path for path in run.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


def assert_the_same_command_goes_on(run, whole):
    assert f"resumed step {HALF} " in run_training(run, *FLAGS, "--total_steps", WHOLE).stdout
    assert_same_run(run, whole, WHOLE)


@posix
@pytest.mark.parametrize("kind", ["model", "opt"])  # the first file and the last, which is the largest
def test_a_save_hits_a_file_size_limit(half, whole, kind):
    limit = (half / member_name(kind, HALF)).stat().st_size * 2 // 3
    failed = run_training(half, *FLAGS, "--total_steps", WHOLE, check=2, file_size_limit=limit)
    assert_one_line_error(failed, f"{half}: cannot write checkpoint 8 (File too large)", "the same command")
    assert not (half / member_name(kind, WHOLE)).exists()
    assert_previous_checkpoint_is_intact(half)
    assert_the_same_command_goes_on(half, whole)


@posix
def test_a_failed_run_ends_though_its_data_are_streamed(first_half, tmp_path):
    """The processes that decode images leave signals to the main process, which must not wait for them at its end."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(images / f"{number}.png")
    streamed = ["--data_dir", images, "--cache_limit_gb", 0, "--data_workers", 2]
    run = tmp_path / "streamed"
    limit = (first_half / member_name("opt", HALF)).stat().st_size // 2
    failed = run_training(run, *FLAGS, *streamed, "--total_steps", WHOLE, check=2, file_size_limit=limit)
    assert_one_line_error(failed, f"{run}: cannot write checkpoint 4 (File too large)")


@posix
def test_a_row_hits_a_file_size_limit(first_half, tmp_path):
    flags = ["--total_steps", 30, "--log_interval", 1, "--save_interval", 30, "--ema_rate", "0.9,0.99"]
    flags += ["--batch_size", 4]
    disturbed, undisturbed = (shutil.copytree(first_half, tmp_path / name) for name in "ab")
    limit = 2000 + max((first_half / name).stat().st_size for name in ("args.json", "run.json"))
    failed = run_training(disturbed, *flags, check=2, file_size_limit=limit)
    assert_one_line_error(failed, f"{disturbed}{os.sep}progress.", "File too large")
    reached = int(rows(disturbed)[-1]["step"])
    assert HALF < reached < 30 and (disturbed / "progress.csv").read_bytes().endswith(b"\n")
    assert_previous_checkpoint_is_intact(disturbed)
    for run in (disturbed, undisturbed):
        run_training(run, *flags)
    assert_same_run(disturbed, undisturbed, 30)


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of its own, with room for two checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [0, 4_000_000], ids=["none at all", "for a part of a checkpoint"])
def test_full_disk(small_disk, first_half, tmp_path, whole, room):
    run = shutil.copytree(first_half, small_disk / "run")
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - room))
    failed = run_training(run, *FLAGS, "--total_steps", WHOLE, check=2, output=tmp_path)
    assert_one_line_error(failed, str(run), "No space left on device")
    assert_previous_checkpoint_is_intact(run)
    ballast.unlink()
    assert_the_same_command_goes_on(run, whole)


def test_read_only_disk(small_disk, first_half, tmp_path, whole):
    run = shutil.copytree(first_half, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    failed = run_training(run, *FLAGS, "--total_steps", WHOLE, check=2, output=tmp_path)
    assert_one_line_error(failed, f"--log_dir {run}: cannot be written (Read-only file system)")
    assert_previous_checkpoint_is_intact(run)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert_the_same_command_goes_on(run, whole)


@pytest.fixture
def set_read_only():
    """A function that makes a directory read-only, even for root, or writable again."""
    changed = []

    def change(folder, read_only):
        changed.append(folder)
        if os.geteuid() != 0:
            folder.chmod(0o555 if read_only else 0o755)
        elif subprocess.run(["chattr", "+i" if read_only else "-i", folder], capture_output=True).returncode:
            pytest.skip("nothing is read-only for root here: chattr +i does not work on this file system")

    if os.name != "posix" or (os.geteuid() == 0 and not shutil.which("chattr")):
        pytest.skip("needs chmod, or chattr for root")
    yield change
    for folder in set(changed):
        change(folder, False)


def finish_from_where_it_is(run, undisturbed, *flags):
    """Give the command again, for a few steps more, and compare with a run that nothing disturbed."""
    saved = checkpoint.steps(str(run))[-1]
    for folder in (run, undisturbed):
        run_training(folder, *FLAGS, *flags, "--total_steps", saved + 3)
    assert_same_run(run, undisturbed, saved + 3)


def test_directory_turns_read_only(tmp_path, set_read_only):
    run = tmp_path / "run"
    with Training(run, *FLAGS, "--total_steps", 10**6) as training:
        training.wait_until(lambda: checkpoint.steps(str(run)))
        set_read_only(run, True)
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: cannot write checkpoint")
    saved = checkpoint.steps(str(run))
    assert checkpoint.find(str(run), log=pytest.fail).step == saved[-1]
    again = run_training(run, *FLAGS, "--total_steps", saved[-1] + 3, check=2)
    assert_one_line_error(again, str(run))
    set_read_only(run, False)
    finish_from_where_it_is(run, tmp_path / "undisturbed")


@posix
def test_directory_vanishes_and_comes_back(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with Training(run, *FLAGS, "--total_steps", 10**6) as training:
        training.wait_until(lambda: checkpoint.steps(str(run)))
        run.rename(elsewhere)
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: was moved, deleted or replaced", "continues")
    assert not run.exists()
    elsewhere.rename(run)
    finish_from_where_it_is(run, tmp_path / "undisturbed")


@posix
def test_a_moved_directory_goes_on_where_it_was_moved_to(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    often = [*FLAGS, "--sample_interval", 2, "--diffusion_steps", 10, "--total_steps", 10**6]
    with Training(run, *often) as training:  # a preview comes before each save
        training.wait_until(lambda: checkpoint.steps(str(run)))
        run.rename(elsewhere)
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: was moved, deleted or replaced")
    assert not run.exists()
    finish_from_where_it_is(elsewhere, tmp_path / "undisturbed", "--diffusion_steps", 10)


@posix
def test_a_deleted_directory_is_not_made_again(tmp_path):
    run = tmp_path / "run"
    with Training(run, *FLAGS, "--sample_interval", 2, "--total_steps", 10**6) as training:
        training.wait_until(lambda: checkpoint.steps(str(run)))
        run.rename(tmp_path / "gone")  # at once, which rmtree is not
        shutil.rmtree(tmp_path / "gone")
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: was moved, deleted or replaced")
    assert not run.exists()


@posix
def test_a_directory_that_took_the_place_is_left_alone(tmp_path):
    run = tmp_path / "run"
    with Training(run, *FLAGS, "--sample_interval", 2, "--total_steps", 10**6) as training:
        training.wait_until(lambda: checkpoint.steps(str(run)))
        training.signal(signal.SIGSTOP)
        run.rename(tmp_path / "elsewhere")
        run.mkdir()
        (run / ".lock").touch()
        (run / ".lock-owner.json").write_text("{}")
        training.signal(signal.SIGCONT)
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: was moved, deleted or replaced")
    assert {path.name for path in run.iterdir()} == {".lock", ".lock-owner.json"}


def test_a_workbook_that_cannot_be_written_stops_nothing(half, whole):
    (half / "results.xlsx").unlink()
    (half / "results.xlsx").mkdir()
    done = run_training(half, *FLAGS, "--total_steps", WHOLE)
    assert "WARNING: the workbook could not be written" in done.stdout and "results.xlsx" in done.stdout
    assert done.stderr == ""
    assert_same_run(half, whole, WHOLE)


def test_a_log_dir_that_is_a_file(tmp_path):
    run = tmp_path / "run"
    run.write_text("precious")
    failed = run_training(run, check=2)
    assert_one_line_error(failed, f"--log_dir {run}: cannot be written")
    assert run.read_text() == "precious"


def test_errors_name_the_file_that_the_user_knows(tmp_path):
    with pytest.raises(FileNotFoundError) as error, open_atomic(str(tmp_path / "new")):
        (tmp_path / "absent").read_bytes()
    assert error.value.filename == str(tmp_path / "absent"), "another file than the one that is written"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as error, open_atomic(str(tmp_path / "folder")) as file:
        file.write(b"content")
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "folder"), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
