"""Real processes of image_train.py that a test can watch, signal, starve and kill, at the cost of a fork each.

Where the system offers it, they are forked from a server that has imported everything once.
"""

import contextlib
import csv
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch as th
from cloud import BUCKET, Cloud
from conftest import SCRIPTS, TINY_FLAGS
from tqdm import tqdm

from improved_diffusion.run import checkpoint
from improved_diffusion.storage import TEMPORARY_PREFIX

TIMING = {"images_per_sec", "elapsed"}
PATIENCE = 120  # seconds until a process that does not end or do what is waited for has failed the test

_METHODS = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context("forkserver" if "forkserver" in _METHODS else "spawn")
if "forkserver" in _METHODS:
    _context.set_forkserver_preload(["improved_diffusion.jobs.train", "pytest"])  # `_main` needs both
_numbers = itertools.count()


class Training(contextlib.AbstractContextManager):
    """A process of image_train.py: a tiny model, the built-in shapes, the run directory `folder`.

    It computes in float32: `auto` measures anew in every process, and runs are compared that have to agree.

    :param folder: where the run lives; in a `Cloud` if it is below the folder `cloud`.
    :param flags: more flags; they override those.
    :param file_size_limit: bytes that no file can grow beyond, as `ulimit -f` has it.
    :param output: the folder for what it says; by default that of `folder`.
    :param environment: variables that are set for it.
    :param prepare: a function of a module that is called in the process before the script.
    """

    def __init__(
        self,
        folder: Path,
        *flags: object,
        file_size_limit: int | None = None,
        output: Path | None = None,
        environment: dict[str, str] | None = None,
        cloud: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ):
        self.folder = folder
        number = next(_numbers)
        self._out, self._err = (
            (output or folder.parent) / f"process{number}.{name}" for name in ("out", "err")
        )
        place = str(folder) if cloud is None else BUCKET + folder.relative_to(cloud).as_posix()
        argv = ["--data_dir", "builtin", *TINY_FLAGS, "--precision", "fp32", "--log_dir", place]
        argv += map(str, flags)
        arguments = (argv, self._out, self._err, file_size_limit, environment or {}, cloud, prepare)
        self._process = _context.Process(target=_main, args=arguments)
        self._process.start()

    def __exit__(self, *exc_info) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def stdout(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, or what the system has in its place; a process that has ended is left in peace."""
        self._process.kill()

    def wait(self) -> int:
        """The exit code; negative for the signal that killed it."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, f"it does not end\n{self.stdout}\n{self.stderr}"
        return self._process.exitcode

    def wait_until(self, condition) -> None:
        """Wait until `condition()` holds, which must happen while the process lives."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.is_alive and condition():  # it may have done it and ended
                return
            assert self.is_alive and time.monotonic() < deadline, f"{self.stdout}\n{self.stderr}"
            time.sleep(0.001)

    def wait_for_rows(self, count: int) -> None:
        """Wait until `count` rows of metrics are in progress.csv: training is well under way."""
        self.wait_until(lambda: len(rows(self.folder)) >= count)


def run_training(folder: Path, *flags: object, check: int = 0, **options) -> Training:
    """Run image_train.py to its end, which is to be the exit code `check`; what it said can then be read."""
    with Training(folder, *flags, **options) as training:
        code = training.wait()
    assert code == check, f"exit code {code}\n{training.stdout}\n{training.stderr}"
    return training


def one_host() -> dict[str, str]:
    """What torchrun sets for two ranks on this machine, but for RANK."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def two_ranks(folder: Path, *flags: object, more: dict[str, str] | None = None, **options):
    """Rank 0 and rank 1 as torchrun starts them, but for torchrun itself, so that each can be watched.

    :param more: variables that are set for both. :param options: of `Training`.
    """
    place = {**one_host(), **(more or {})}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Training(folder, *flags, environment={**place, "RANK": str(rank)}, **options))
            for rank in range(2)
        ]


def _main(
    argv: list[str],
    out: Path,
    err: Path,
    file_size_limit: int | None,
    environment: dict[str, str],
    cloud: Path | None,
    prepare: Callable[[], object] | None,
) -> None:
    os.environ.update(environment)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if file_size_limit is not None:
        import resource  # not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, hard))
    if cloud is not None:
        Cloud(cloud, pytest.MonkeyPatch())
    if prepare is not None:
        prepare()
    tqdm.set_lock(threading.RLock())  # its own lock is between processes, and would outlive a killed one
    sys.argv = [str(SCRIPTS / "image_train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def rows(folder: Path, name: str = "progress.csv") -> list[dict[str, str]]:
    """The whole rows of a CSV file, without the columns that measure time."""
    try:
        with open(folder / name, newline="", encoding="utf-8") as file:
            lines = file.read().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(lines)]


def is_running(pid: int) -> bool:
    """Whether a process of this system computes; one that has ended may keep its number until somebody asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def temporaries(folder: Path) -> list[str]:
    """The names of files in `folder` that are being written, or that a killed process has left like that."""
    return (
        [p.name for p in folder.iterdir() if p.name.startswith(TEMPORARY_PREFIX)] if folder.exists() else []
    )


def assert_one_line_error(training: Training, *parts: str) -> None:
    """The process said in a single line of stderr, with all of `parts` in it, what is wrong."""
    assert training.stderr.count("\n") == 1, training.stderr
    assert training.stderr.startswith("image_train.py: error: "), training.stderr
    for part in parts:
        assert part in training.stderr, training.stderr
    assert "Traceback" not in training.stdout


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Two runs have come to the same end, to the last bit: tensors, sampler, unfinished row, and all rows."""
    a, b = (checkpoint.find(str(folder / f"state{step:06d}.json")) for folder in (one, other))
    assert a.ema_rates == b.ema_rates
    for kind in ("model", "opt", *a.ema_rates):
        assert_same_tensors(a.load(kind), b.load(kind))
    for key in ("samples", "logged_step", "skipped", "schedule_sampler", "data"):
        assert a.state[key] == b.state[key], key
    for key in ("values", "sums"):
        assert _without_timing(a.state["log"][key]) == _without_timing(b.state["log"][key])
    assert rows(one) == rows(other)


def assert_same_tensors(a, b) -> None:
    """Nested dictionaries and lists of tensors are equal bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tensors(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_tensors(x, y)
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b)
    else:
        assert a == b


def _without_timing(values: dict) -> dict:
    return {key: value for key, value in values.items() if key not in TIMING}
