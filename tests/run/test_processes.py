"""Several processes by one flag: they do what torchrun's do, and none is left over, whichever ends first."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch as th
import torch.distributed
from training_process import (
    PATIENCE,
    Training,
    assert_same_run,
    is_running,
    one_host,
    run_training,
    two_ranks,
)

from improved_diffusion.run import checkpoint

pytestmark = [
    pytest.mark.skipif(not th.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc, on Linux"),
]

FLAGS = ["--batch_size", 4, "--microbatch", 3, "--lr", "1e-4", "--sample_interval", 0, "--log_interval", 1]
ENDLESS = [*FLAGS, "--total_steps", 10**6, "--save_interval", 10**6]


def children(pid: int) -> list[int]:
    """The processes that process `pid` has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_ended(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def training(tmp_path):
    """A training of two processes that is under way, and the second process."""
    with Training(tmp_path / "run", "--processes", 2, *ENDLESS) as first:
        first.wait_for_rows(1)
        (second,) = children(first.pid)
        yield first, second
        assert_ended(second)


def test_they_do_what_processes_of_torchrun_do(tmp_path):
    flags = [*FLAGS, "--save_interval", 3]
    with two_ranks(tmp_path / "torchrun", *flags, "--total_steps", 6) as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0]
    run_training(tmp_path / "flag", "--processes", 2, *flags, "--total_steps", 3)
    done = run_training(tmp_path / "flag", "--processes", 2, *flags, "--total_steps", 6)
    assert_same_run(tmp_path / "torchrun", tmp_path / "flag", 6)
    assert "2 processes with 4 images each per step" in done.stdout and done.stderr == ""
    assert done.stdout.count("run directory: ") == done.stdout.count("done: ") == 1


def test_a_signal_stops_both_with_a_checkpoint(training):
    first, second = training
    assert os.getpgid(first.pid) != os.getpgid(second)  # Ctrl-C in a terminal reaches only the first
    first.signal(signal.SIGTERM)
    assert first.wait() == 143 and len(checkpoint.steps(str(first.folder))) == 1
    assert "stopped by SIGTERM at step" in first.stdout
    assert first.stderr.count("finishing this step") == first.stderr.strip().count("\n") + 1 == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(training, victim):
    first, second = training
    os.kill((first.pid, second)[victim], signal.SIGKILL)
    assert first.wait() == (-signal.SIGKILL, 2)[victim], first.stderr
    assert_ended(second)
    # Of whichever is left: the exchange breaks off, or, if it does not, the other is silent for too long.
    assert any(
        said in first.stderr for said in ("another process of this job has ended", "lost contact with ")
    )


def test_a_launcher_has_the_say(tmp_path):
    place = {**one_host(), "RANK": "0"}
    refused = run_training(tmp_path / "run", "--processes", 2, *FLAGS, check=2, environment=place)
    assert "--processes 2: a launcher has already started several processes" in refused.stderr
    assert not (tmp_path / "run").exists()
