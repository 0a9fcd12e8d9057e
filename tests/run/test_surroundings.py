"""Clocks that jump, installations that cannot be written, users without a home, file systems that lack something."""

import datetime
import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS, read_json
from openpyxl import load_workbook
from PIL import Image
from training_process import Training, assert_one_line_error, assert_same_run, rows, run_training

from improved_diffusion.run import checkpoint

FLAGS = ["--save_interval", 2, "--log_interval", 1, "--batch_size", 2, "--total_steps", 5]
FLAGS += ["--sample_interval", 3, "--diffusion_steps", 4, "--keep_last", 2]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training(run, *FLAGS)
    return run


# -- clocks -----------------------------------------------------------------------------------------------


def let_the_clock_jump(seconds):
    """Whoever asks for the time is told one that has moved by `seconds` more since the last question."""
    jumps = itertools.count()
    real_time, real_datetime = time.time, datetime.datetime

    class Jumping(real_datetime):
        @classmethod
        def now(cls, tz=None):
            return real_datetime.now(tz) + datetime.timedelta(seconds=seconds * next(jumps))

    time.time = lambda: real_time() + seconds * next(jumps)
    datetime.datetime = Jumping


@pytest.mark.parametrize("seconds", [-3600, 3600], ids=["back", "forward"])
def test_a_clock_that_jumps_changes_nothing(tmp_path, undisturbed, seconds):
    run = tmp_path / "run"
    for total in (3, 5):  # continued by a clock that is elsewhere
        began = time.monotonic()
        prepare = functools.partial(let_the_clock_jump, seconds)
        training = run_training(run, *FLAGS, "--total_steps", total, prepare=prepare)
        took = time.monotonic() - began
        assert training.stderr == "" and "WARNING" not in training.stdout
    assert_same_run(run, undisturbed, 5)
    elapsed = checkpoint.read(str(run), 5).state["elapsed"]
    assert 0 < elapsed < 100 * took
    started = [session["started"] for session in read_json(run / "run.json")["sessions"]]
    assert len(started) == 2
    assert load_workbook(run / "results.xlsx")["Metrics"].max_row == 6


def test_a_clock_that_jumps_does_not_change_max_hours(tmp_path):
    prepare = functools.partial(let_the_clock_jump, -3600)
    endless = [*FLAGS, "--total_steps", 10**6, "--max_hours", 1 / 3600]
    assert "stopped by --max_hours" in run_training(tmp_path / "run", *endless, prepare=prepare).stdout
    prepare = functools.partial(let_the_clock_jump, 3600)
    with Training(tmp_path / "other", *FLAGS, "--max_hours", 1, prepare=prepare) as training:
        assert training.wait() == 0
    assert "done: 5 steps" in training.stdout


def never_set_the_clock():
    time.localtime = lambda seconds=0: time.gmtime(seconds)


def test_a_clock_that_was_never_set_is_refused(tmp_path):
    failed = run_training(tmp_path / "run", *FLAGS, check=2, prepare=never_set_the_clock)
    assert_one_line_error(failed, "the clock of this machine says", "set it first")
    assert not (tmp_path / "run").exists()


# -- file systems -----------------------------------------------------------------------------------------


def refuse_links_and_locks(number):
    """As file systems of networks and of removable disks do."""
    import fcntl

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    os.link = os.symlink = fcntl.flock = fcntl.lockf = refuse


@posix
@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EPERM"])
def test_a_file_system_without_links_and_locks(tmp_path, undisturbed, name):
    run = tmp_path / "run"
    number = getattr(errno, name)
    training = run_training(run, *FLAGS, prepare=functools.partial(refuse_links_and_locks, number))
    warnings = [line for line in training.stdout.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and f"{run}: this file system has no locks" in warnings[0]
    assert os.strerror(number) in warnings[0] and "start only one" in warnings[0]
    assert_same_run(run, undisturbed, 5)
    assert not (run / ".lock-owner.json").exists()


@posix
def test_a_directory_that_moves_is_noticed_without_locks(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    prepare = functools.partial(refuse_links_and_locks, errno.ENOLCK)
    with Training(run, *FLAGS, "--total_steps", 10**6, prepare=prepare) as training:
        training.wait_for_rows(1)
        run.rename(elsewhere)
        assert training.wait() == 2
    assert_one_line_error(training, f"{run}: was moved, deleted or replaced")
    assert not run.exists()


@pytest.fixture
def other_file_system():
    """A folder on another file system than the temporary folder: names cannot be moved from one to the other."""
    place = Path("/dev/shm")
    if not place.is_dir() or place.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no other file system at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir=place))
    yield folder
    shutil.rmtree(folder)


def test_run_and_cache_on_another_file_system(tmp_path, other_file_system):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(images / f"{number}.png")
    here = {"IMPROVED_DIFFUSION_CACHE": str(tmp_path / "cache")}
    there = {"IMPROVED_DIFFUSION_CACHE": str(other_file_system / "cache")}
    run_training(tmp_path / "run", *FLAGS, "--data_dir", images, environment=here)
    run_training(other_file_system / "run", *FLAGS, "--data_dir", images, environment=there)
    assert_same_run(tmp_path / "run", other_file_system / "run", 5)
    assert len(list((other_file_system / "cache").iterdir())) == 1
    branch = ["--resume_checkpoint", other_file_system / "run", "--total_steps", 6]
    run_training(tmp_path / "branch", *FLAGS, *branch, "--data_dir", images, environment=here)
    assert len(rows(tmp_path / "branch")) == 6


# -- installations and users ------------------------------------------------------------------------------

NOBODY = 65534


@pytest.fixture
def open_folder():
    """A folder that every user can reach and write, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def installation(open_folder):
    """A copy of the project that cannot be written, by root neither."""
    place = open_folder / "installation"
    if os.name != "posix":
        pytest.skip("needs POSIX")
    for part in ("improved_diffusion", "scripts", "datasets"):
        ignore = shutil.ignore_patterns("__pycache__", "cifar_*", "lsun_*")
        shutil.copytree(ROOT / part, place / part, ignore=ignore)
    if os.geteuid() == 0:
        mounted = [["mount", "--bind", place, place], ["mount", "-o", "remount,ro,bind", place]]
        if any(subprocess.run(command, capture_output=True).returncode for command in mounted):
            pytest.skip("nothing is read-only for root here: mounting is not allowed")
        yield place
        subprocess.run(["umount", "--lazy", place], check=True)
    else:
        folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        yield place
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_an_installation_that_cannot_be_written_and_no_home(open_folder, installation, user):
    options = {"cwd": "/", "capture_output": True, "text": True, "timeout": 300}
    if user == "nobody":
        probe = [sys.executable, "-c", f"import os, torch; os.listdir({str(open_folder)!r})"]
        try:
            options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            reachable = subprocess.run(probe, **options).returncode == 0
        except OSError:
            reachable = False
        if not reachable:
            pytest.skip("only root can become another user, who must be able to reach Python")
    unset = ("HOME", "XDG_CACHE_HOME", "IMPROVED_DIFFUSION_CACHE", "PYTHONPYCACHEPREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join([str(installation), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment |= {"HOME": "/nonexistent/home", "PYTHONPATH": path}
    images = open_folder / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(images / f"{number}.png")

    def run(script, *flags, check=0):
        command = [sys.executable, installation / "scripts" / script, *map(str, flags)]
        done = subprocess.run(command, env=environment, **options)
        assert done.returncode == check, f"{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return done

    flags = [*TINY_FLAGS, *FLAGS, "--data_dir", images, "--precision", "fp32"]
    refused = run("image_train.py", *flags, check=2)
    assert str(installation / "runs") in refused.stderr and "cannot be written" in refused.stderr
    trained = run("image_train.py", *flags, "--log_dir", open_folder / "run")
    assert "the next start decodes them again" in trained.stdout + trained.stderr or os.geteuid() == 0
    draw = ["--model_path", open_folder / "run", "--num_samples", 2, "--timestep_respacing", 2]
    refused = run("image_sample.py", *draw, check=2)
    assert f"--log_dir {installation / 'samples'}" in refused.stderr and "cannot be created" in refused.stderr
    run("image_sample.py", *draw, "--log_dir", open_folder / "drawn")
    assert (open_folder / "drawn" / "samples_2x8x8x3.npz").exists()
    assert not list(installation.rglob("__pycache__"))


def test_two_ranks_and_a_clock_that_jumps(tmp_path, undisturbed):
    """The connection between processes is not taken for lost, nor a lost one for alive, by the clock."""
    from soak import sessions

    flags = [*FLAGS, "--batch_size", 1]
    prepare = functools.partial(let_the_clock_jump, 3600)
    options = {"environment": {}, "output": tmp_path, "prepare": prepare}
    with sessions(tmp_path / "run", flags, 2, **options) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert rows(tmp_path / "run")[-1]["step"] == "5"
