"""A soak: runs that are killed, signalled, starved, moved and damaged at random must end as undisturbed ones do.

    python tests/soak.py --hours 2 --seed 0 --folder soak

Every case draws what is trained (`FEATURES`) and what happens to it, goes on with the same command until the run has
come to its end, and compares that bit by bit with a run that nothing disturbed. ``soak.json`` in the folder has the
counts. A case that fails keeps its directory, and the command that repeats it is printed. pytest does not collect this
file, and CI does not run it.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what is started
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch as th
import training_process
from cloud import Cloud
from PIL import Image
from training_process import Training, rows, temporaries

from improved_diffusion.run import checkpoint
from improved_diffusion.storage import TEMPORARY_PREFIX, write_json

STEPS, SAVE_INTERVAL = 20, 3
BASE = {  # the rest is `Training`'s
    "diffusion_steps": 20,
    "total_steps": STEPS,
    "save_interval": SAVE_INTERVAL,
    "log_interval": 4,
    "sample_interval": 0,
    "keep_last": 2,
    "batch_size": 4,
    "microbatch": 3,
    "lr": 1e-3,
    "max_hours": 0,
}
CLOUD, RANKS = "remote folder", "two ranks"
FEATURES = {
    "classes": {"class_cond": True, "class_dropout": 0.2, "dropout": 0.2},
    "learned sigma": {"learn_sigma": True, "noise_schedule": "cosine"},
    "loss-second-moment": {"schedule_sampler": "loss-second-moment", "diffusion_steps": 4},
    "log-normal": {"schedule_sampler": "log-normal", "loss_weighting": "edm"},
    "v": {"prediction": "v", "loss_weighting": "min_snr"},
    "edm": {"prediction": "edm", "patch_size": 2},
    "streamed data": {"cache_limit_gb": 0, "data_workers": 2, "random_flip": True},
    "several averages": {"ema_rate": "0.9,0.99,0.9999", "ema_lengths": "0.05,0.1"},
    "16 bits": {"precision": "bf16"},
    "two cores": {"num_workers": 2, "microbatch": 2},
    "previews": {"sample_interval": 5},
    "lr decay": {"lr_decay": "cosine", "lr_decay_share": 0.5, "lr_warmup_steps": 5, "grad_clip": 1},
    "held-out loss": {"heldout_dir": "heldout"},  # in the folder of all cases
    "muon": {"optimizer": "muon"},
    RANKS: {"batch_size": 2},
    CLOUD: {},
}
SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
MOST_DISTURBANCES = 7
DISK_BYTES = 160_000_000
PATIENCE = 600  # seconds until a process hangs: a soak leaves room to others
MADE_AGAIN = (
    "args.json",
    "run.json",
    "results.xlsx",
    "index.html",
)  # files beside the checkpoints that may be lost

# What a run says; tests/run/test_soak.py looks whether it still says so.
TRAINING, DONE, STOPPED = "training from step ", "done: ", "stopped by "
STOPPING = "finishing this step"
LOST = ("another process of this job has ended", "lost contact with ")
CUT_OFF, KEPT_IN, BEHIND = "could not be brought up to date", "all files are in ", "is not up to date"
SKIPPED, ALL_KEPT, UNDELETED = "skipping checkpoint ", "all checkpoints are kept", " is not deleted"
NOT_DRAWN, NOT_WRITTEN, NOT_CACHED, BAD_CACHE = (
    "could not be drawn",
    "could not be written",
    "cache",
    "its cache",
)
TEXTS = (TRAINING, DONE, STOPPED, STOPPING, *LOST, CUT_OFF, KEPT_IN, BEHIND, SKIPPED, ALL_KEPT, UNDELETED)
TEXTS += (NOT_DRAWN, NOT_WRITTEN, NOT_CACHED, BAD_CACHE)

STATE_KEYS = ("samples", "global_batch", "data", "schedule_sampler", "logged_step", "skipped", "precision")
TIMING = {*training_process.TIMING, "saved_at", "seconds"}


class Broken(AssertionError):
    """Something that is promised did not hold."""


def require(holds: object, message: str) -> None:
    if not holds:
        raise Broken(message)


# -- what is compared -------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, str]:
    """All that two runs must have in common at their end, by name: a checksum of each, or its text."""
    newest = checkpoint.find(str(run))
    found = {"step": str(newest.step)}
    for name in newest.state["files"]:
        found[name] = digest(newest.load(checkpoint.kind_of(name)))
    for key in STATE_KEYS:
        found[key] = json.dumps(newest.state[key])
    for key in ("values", "sums"):
        found[f"unfinished row: {key}"] = json.dumps(_without(newest.state["log"][key], TIMING))
    found["steps of rows"] = " ".join(row["step"] for row in rows(run))
    for row in rows(run):
        found[f"row {row['step']}"] = json.dumps(row)
    for row in rows(run, "checkpoints.csv"):
        # Where a signal came, there is one more.
        if int(row["step"]) % SAVE_INTERVAL == 0 or row["step"] == str(STEPS):
            heldout = {name for name in row if name.startswith("heldout")}
            found[f"checkpoint {row['step']}"] = json.dumps(_without(row, TIMING | heldout))
            found[f"held-out loss {row['step']}"] = ",".join(row[name] for name in sorted(heldout))
    for path in sorted((run / "samples").glob("*.png")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def digest(content) -> str:
    """A checksum of nested dictionaries and lists of tensors and numbers, of every bit in them."""
    sha256 = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, th.Tensor):
            sha256.update(repr((value.dtype, tuple(value.shape))).encode())
            sha256.update(value.contiguous().flatten().view(th.uint8).numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            sha256.update(repr((type(value), len(value))).encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            sha256.update(repr(value).encode())

    add(content)
    return sha256.hexdigest()


def _without(values: dict, names: set[str]) -> dict:
    return {name: value for name, value in values.items() if name not in names}


# -- the processes of a run -------------------------------------------------------------------------------


@contextlib.contextmanager
def sessions(
    run: Path, flags: list, ranks: int, limit: int | None = None, **options
) -> Iterator[list[Training]]:
    """Start the processes of a run, one for each rank.

    :param limit: bytes that no file of rank 0 can grow beyond.
    :param options: of `Training`.
    """
    environment = options.pop("environment")
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            environment["MASTER_PORT"] = str(server.getsockname()[1])
        number = str(ranks)
        environment |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank)} if ranks > 1 else environment
            options["file_size_limit"] = limit if rank == 0 else None
            processes.append(stack.enter_context(Training(run, *flags, environment=own, **options)))
        yield processes


def is_training(processes: list[Training]) -> bool:
    return TRAINING in processes[0].stdout


def wait_until_training(processes: list[Training]) -> None:
    while not is_training(processes) and all(process.is_alive for process in processes):
        time.sleep(0.01)


def files_of_checkpoints(folder: Path) -> dict[str, int]:
    """The files of checkpoints in `folder`, also those that are being written, and their steps."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    names = [name.split("-", 2)[-1] if name.startswith(TEMPORARY_PREFIX) else name for name in names]
    return {name: int(name.split(".")[-2][-6:]) for name in names if checkpoint.kind_of(name)}


def is_intact(run: Path, step: int) -> bool:
    try:
        checkpoint.verify(checkpoint.read(str(run), step))
    except checkpoint.DamagedCheckpoint:
        return False
    return True


# -- a case -----------------------------------------------------------------------------------------------


class Case:
    """A run and what happens to it, all drawn from `rng`; only the moments at which it happens vary.

    :param home: an empty folder for it. :param common: the folder of all cases, with images and a cache.
    :param features: names of `FEATURES`. :param disks: whether a small disk can be mounted.
    :param counts: what happened how often, to be added to.
    """

    def __init__(
        self,
        home: Path,
        common: Path,
        features: list[str],
        rng: random.Random,
        disks: bool,
        counts: Counter,
    ):
        self.home, self.common, self.rng, self.counts = home, common, rng, counts
        self.features = features
        self.flags = flags_of(self.features, common)
        self.ranks = 2 if RANKS in self.features else 1
        self.cloud = Cloud(home / "cloud", _KeepsAll()) if CLOUD in self.features else None
        self.disk = home / "disk" if disks and rng.random() < 0.5 else None
        local = self.disk or home
        self.temporary = local / "temporary"
        self.run = (self.cloud.folder if self.cloud else local) / "run"
        self.newest = 0  # the newest checkpoint, which must not be lost
        self.damaged: set[int] = set()  # checkpoints that were damaged on purpose
        self.excused_row = 0  # rows up to this step may be there although later checkpoints are damaged
        self.undrawn = self.signalled = False  # what excuses a missing picture, and a held-out loss
        self.story: list[str] = []

    def play(self, expected: dict[str, str]) -> None:
        """Disturb the run, let it come to its end, and compare. :raises Broken: a promise did not hold."""
        (self.home / "output").mkdir()
        if self.disk:
            mount(self.disk)
        self.temporary.mkdir()
        kinds = 4 * [self.kill] + 3 * [self.ask_to_stop] + 3 * [self.damage]
        kinds += [self.limit_hours, self.limit_file_size]
        kinds += 4 * [self.fill_disk] if self.disk else []
        kinds += 2 * [self.cut_off] if self.cloud else [self.move, self.move, self.delete]
        for _ in range(self.rng.randint(2, MOST_DISTURBANCES)):
            self.rng.choice(kinds)()
        self.come_to_the_end()
        found = contents(self.run)
        names = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        names = sorted(name for name in names if not self.is_excused(name, found))
        require(not names, f"differs from the undisturbed run: {', '.join(names)}")

    def is_excused(self, name: str, found: dict[str, str]) -> bool:
        """Whether `name` may be missing at the end: what is left out when there is no room or time for it."""
        if name.startswith("held-out loss"):
            return self.signalled and not found[name].strip(",")
        return self.undrawn and name.startswith("step_") and name not in found

    # -- what happens to it

    def kill(self) -> None:
        """SIGKILL to one rank or all, at any moment."""
        with self.session() as processes:
            self.wait_for_a_moment(processes)
            victims = processes
            if is_training(processes) and self.rng.random() < 0.7:
                victims = [self.rng.choice(processes)]  # the others must notice
            seen = self.newest_on_disk()
            for victim in victims:
                victim.kill()
            codes = [process.wait() for process in processes]
        self.counts["kills within a save"] += self.is_within_a_save()
        self.tell("kill -9", f"{codes} after checkpoint {seen}")
        self.inspect(processes, codes, seen)

    def ask_to_stop(self) -> None:
        """A signal to any rank; sometimes SIGUSR1 before it, or a second Ctrl-C after it."""
        name = self.rng.choice(sorted(SIGNALS))
        twice = name == "SIGINT" and self.rng.random() < 0.15
        with self.session() as processes:
            # Before that, a signal just ends a process, and other ranks may wait for it for minutes.
            wait_until_training(processes)
            self.wait_for_a_moment(processes, starting=False)
            names = ["SIGUSR1"] * (self.rng.random() < 0.2) + [name] * (1 + twice)
            seen = self.newest_on_disk()
            for sent in names:
                process = self.rng.choice(processes)
                if process.is_alive:
                    process.signal(getattr(signal, sent))
                time.sleep(0.02)
            codes = [process.wait() for process in processes]
        self.tell(name, f"{names}: {codes}")
        self.counts["SIGUSR1"] += "SIGUSR1" in names
        self.signalled = True
        said = processes[0].stdout
        if not twice:
            right = {0, SIGNALS[name], -getattr(signal, name), -getattr(signal, names[0])}
            if min(codes) < 0:  # it was ending, and no longer listened to signals: the others may notice that
                right.add(2)
            require(set(codes) <= right, f"exit codes {codes} after {name}")
            heard = any(STOPPING in process.stderr for process in processes)
            done = f"{DONE}{STEPS} steps" in said
            require(done or not heard or f"{STOPPED}{name} at step " in said, f"{name} was not obeyed")
        self.inspect(processes, codes, seen)

    def limit_hours(self) -> None:
        with self.session("--max_hours", self.rng.uniform(0.5, 6) / 3600) as processes:
            codes = [process.wait() for process in processes]
        self.tell("--max_hours", f"{codes}")
        require(set(codes) == {0}, f"exit codes {codes}")
        self.inspect(processes, codes)

    def limit_file_size(self) -> None:
        """No file can grow beyond a limit, which is what a quota looks like."""
        limit = int(self.rng.choice([self.rng.uniform(500, 5e3), self.rng.uniform(1e4, 6e6)]))
        with self.session(limit=limit) as processes:
            codes = [process.wait() for process in processes]
        self.tell("file-size limit", f"{limit} bytes: {codes}")
        self.inspect(processes, codes, reason="File too large")

    def fill_disk(self) -> None:
        """The disk fills up, but for a part of a checkpoint, and has room again afterwards."""
        room = int(self.rng.choice([0, self.rng.uniform(0, 2e7)]))
        with self.session() as processes:
            self.wait_for_a_moment(processes)
            ballast = fill(self.disk, room)
            codes = [process.wait() for process in processes]
        for file in ballast:
            file.unlink()
        self.tell("full disk", f"room for {room} bytes: {codes}")
        self.inspect(processes, codes, reason="No space left on device")

    def move(self) -> None:
        """The run directory is moved while the run is under way, and put back or left where it is."""
        elsewhere = self.run.with_name(f"moved{len(self.story)}")
        with self.session() as processes:
            wait_until_training(processes)
            self.wait_for_a_moment(processes, starting=False)
            seen = self.newest_on_disk()
            self.run.rename(elsewhere)
            codes = [process.wait() for process in processes]
        require(not self.run.exists(), f"{self.run} was made anew")
        stays = self.rng.random() < 0.5
        self.tell("moved folder", f"{codes}, {'left there' if stays else 'put back'}")
        if stays:
            self.run = elsewhere
        else:
            elsewhere.rename(self.run)
        self.inspect(processes, codes, seen, reason=str(self.home))

    def delete(self) -> None:
        """The run directory is deleted: nothing may be made in its place, and the same command begins anew."""
        gone = self.run.with_name("gone")
        with self.session() as processes:
            wait_until_training(processes)
            self.wait_for_a_moment(processes, starting=False)
            self.run.rename(gone)  # at once, which rmtree is not
            shutil.rmtree(gone, ignore_errors=True)
            codes = [process.wait() for process in processes]
        require(not self.run.exists(), f"{self.run} was made anew")
        self.tell("deleted folder", f"{codes}")
        self.inspect(processes, codes, reason=str(self.home))
        shutil.rmtree(gone, ignore_errors=True)  # what was open was written all the same
        self.newest, self.excused_row, self.damaged = 0, 0, set()

    def cut_off(self) -> None:
        """Nothing can be written into the cloud: for a while, until the end, or until the process is killed."""
        with self.session() as processes:
            wait_until_training(processes)
            self.wait_for_a_moment(processes, starting=False)
            seen = self.newest_on_disk()
            self.cloud.broken = True
            end = self.rng.choice(["for a while", "until the end", "until kill -9"])
            if end != "until the end":
                time.sleep(self.rng.uniform(0, 3))
                for process in processes if end == "until kill -9" else ():
                    process.kill()
                self.cloud.broken = False
            codes = [process.wait() for process in processes]
        self.cloud.broken = False
        self.tell("no connection to the cloud", f"{end}: {codes}")
        self.inspect(processes, codes, seen, reason=CUT_OFF)
        if codes[0] == 2:
            kept = Path(processes[0].stderr.partition(KEPT_IN)[2].strip())
            require(checkpoint.find(str(kept)).step == STEPS, f"{kept} is not complete")

    def damage(self) -> None:
        """Damage a file of the newest checkpoint, if an older one is intact, or a file that is made again."""
        steps = [step for step in checkpoint.steps(str(self.run)) if is_intact(self.run, step)]
        if len(steps) > 1 and self.rng.random() < 0.8:
            names = [*checkpoint.read(str(self.run), steps[-1]).state["files"]]
            name = self.rng.choice([*names, checkpoint.member_name("state", steps[-1])])
            how = spoil(self.run / name, self.rng)
            self.tell("damaged checkpoint", f"{name}: {how}")
            if is_intact(self.run, steps[-1]):
                require(name.endswith(".json"), f"{name} ({how}) is taken for intact")  # white space, perhaps
                return
            self.damaged.add(steps[-1])
            self.newest, self.excused_row = steps[-2], int(rows(self.run)[-1]["step"])
            return
        cached = sorted((self.common / "cache").glob("*.images"))
        paths = [path for path in (*(self.run / name for name in MADE_AGAIN), *cached) if path.exists()]
        if paths:
            path = self.rng.choice(paths)
            self.tell("damaged other file", f"{path.name}: {spoil(path, self.rng)}")

    def come_to_the_end(self) -> None:
        with self.session() as processes:
            codes = [process.wait() for process in processes]
        self.story.append(f"the end: {codes}")
        require(set(codes) == {0}, f"exit codes {codes}\n{processes[0].stderr}")
        self.inspect(processes, codes)
        require(self.newest == STEPS, f"the end, and the newest checkpoint is {self.newest}")
        require(not temporaries(self.run), f"left behind: {temporaries(self.run)}")
        require(not self.mirrors(), f"left behind: {self.mirrors()}")

    # -- what is required of it

    def inspect(self, processes: list, codes: list[int], seen: int = 0, reason: str | None = None) -> None:
        """Look at what a session has said and at what it has left.

        :param seen: a checkpoint that was complete before the disturbance.
        :param reason: the session may fail with one line that has this in it.
        """
        out, err = processes[0].stdout, processes[0].stderr
        for process, code in zip(processes, codes):
            require("Traceback" not in process.stdout + process.stderr, process.stdout + process.stderr)
            lines = [line for line in process.stderr.splitlines() if "error: " in line]
            require(code != 2 or len(lines) == 1, f"exit code 2, and not one line:\n{process.stderr}")
        lost = any(text in err for text in LOST)
        if codes[0] in (1, 2) and not lost:
            require(reason and reason in err, f"exit code {codes[0]}:\n{out}\n{err}")
        if is_training(processes):
            require(f"{TRAINING}{self.newest} to" in out, f"not from step {self.newest}:\n{out}")
        for line in out.splitlines():
            if "WARNING" in line:
                self.check_warning(line, reason)

        found = 0
        for step in checkpoint.steps(str(self.run)):
            self.counts["checkpoints verified"] += 1
            if is_intact(self.run, step):
                found = step
                self.damaged.discard(step)
            else:
                require(step in self.damaged, f"checkpoint {step} is not intact")
        if not self.run.exists():
            return
        require(
            found >= max(self.newest, seen), f"checkpoint {max(self.newest, seen)} is lost, {found} is left"
        )
        self.newest = found
        stopped = out.partition(STOPPED)[2].partition(" at step ")[2].partition(";")[0]
        if stopped and codes[0] != 2:
            require(int(stopped) == found, f"stopped at step {stopped}, and the newest checkpoint is {found}")
        reached = max((int(row["step"]) for row in rows(self.run)), default=0)
        require(
            reached <= max(found + SAVE_INTERVAL, self.excused_row),
            f"the rows reach step {reached}, and the newest checkpoint is {found}",
        )

    def check_warning(self, line: str, reason: str | None) -> None:
        expected = [BAD_CACHE]
        if self.damaged:
            expected += [f"{SKIPPED}{step}:" for step in self.damaged]
            expected += [f"checkpoint {step}{UNDELETED}" for step in self.damaged]
        if reason not in (None, str(self.home)):  # one line is enough where the folder was moved or deleted
            expected += [ALL_KEPT, NOT_DRAWN, NOT_WRITTEN, NOT_CACHED, BEHIND]
        require(any(text in line for text in expected), line)
        self.undrawn = self.undrawn or NOT_DRAWN in line

    # -- its processes

    @contextlib.contextmanager
    def session(self, *more: object, limit: int | None = None) -> Iterator[list[Training]]:
        """The processes of a session, one for each rank."""
        for mirror in self.mirrors():  # of a process that was killed
            shutil.rmtree(mirror)
        environment = {"IMPROVED_DIFFUSION_CACHE": str(self.common / "cache"), "TMPDIR": str(self.temporary)}
        options = {"output": self.home / "output", "environment": environment}
        options["cloud"] = self.cloud and self.cloud.folder
        with sessions(self.run, [*self.flags, *more], self.ranks, limit, **options) as processes:
            yield processes
        self.counts["sessions"] += 1

    def mirrors(self) -> list[Path]:
        """The local folders in which a run in the cloud works."""
        return sorted(self.temporary.glob("improved_diffusion-*"))

    def working_folder(self) -> Path:
        return next(iter(self.mirrors()), self.run)

    def newest_on_disk(self) -> int:
        return max(set(checkpoint.steps(str(self.run))) - self.damaged, default=0)

    def wait_for_a_moment(self, processes: list[Training], starting: bool = True) -> None:
        """Let it write a random number of files of checkpoints, and wait a random moment.

        :param starting: it may be a moment of its start as well.
        """
        if starting and self.rng.random() < 0.2:
            time.sleep(self.rng.uniform(0, 5))
            return
        wanted = self.rng.randint(0, 14)
        # Short enough to hit the writing of a file; or into what follows.
        moment = self.rng.choice([self.rng.uniform(0, 0.01), self.rng.uniform(0, 0.6)])
        before = set(files_of_checkpoints(self.working_folder()))
        seen: set[str] = set()
        while len(seen) < wanted and all(process.is_alive for process in processes):
            seen |= files_of_checkpoints(self.working_folder()).keys() - before
            time.sleep(0.001)
        time.sleep(moment)

    def is_within_a_save(self) -> bool:
        """Whether files of a checkpoint are there that is not complete."""
        folder = self.working_folder()
        steps = files_of_checkpoints(folder).values()
        return max(steps, default=0) > max(checkpoint.steps(str(folder)), default=0)

    def tell(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.story.append(f"{kind}: {what}")


class _KeepsAll:
    """In the place of pytest's monkeypatch: `Cloud` changes nothing in this process."""

    def setattr(self, *arguments) -> None:
        pass


def flags_of(features: list[str], common: Path) -> list[object]:
    flags = {**BASE, "data_dir": common / "images"}
    for feature in features:
        flags.update(FEATURES[feature])
    if "heldout_dir" in flags:
        flags["heldout_dir"] = common / flags["heldout_dir"]
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def spoil(path: Path, rng: random.Random) -> str:
    """Damage a file. :return: in words, how."""
    before = path.read_bytes()
    content = bytearray(before)
    place = rng.randrange(max(len(content), 1))
    how = rng.choice(["truncated", "a bit flipped", "zeros", "deleted", "longer"])
    if how == "deleted" or not content:
        path.unlink()
        return "deleted"
    if how == "truncated":
        del content[place:]
    elif how == "a bit flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        end = min(place + 4096, len(content))
        content[place:end] = bytes(end - place)
    else:
        content += b"more"
    if content == before:  # zeros in the place of zeros
        content[place] = 1
    path.write_bytes(content)
    return f"{how} at byte {place} of {len(content)}"


# -- small disks ------------------------------------------------------------------------------------------


def mount(folder: Path) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


def why_no_disks(folder: Path) -> str:
    """Why no small disk can be mounted here; empty where one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can mount a small disk"
    try:
        mount(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        folder.rmdir()
        return f"a small disk cannot be mounted here ({error})"
    unmount(folder)
    return ""


def fill(disk: Path, room: int) -> list[Path]:
    """Fill a disk but for `room` bytes, while others write there. :return: the files that do it."""
    files: list[Path] = []
    while len(files) < 20 and (surplus := shutil.disk_usage(disk).free - room) > 4096:
        files.append(disk / f"ballast{len(files)}")
        with files[-1].open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, surplus)
    return files


# -- many cases -------------------------------------------------------------------------------------------


def make_images(folder: Path, count: int, seed: int) -> None:
    """Pictures of two classes, which their names tell, in `folder`."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[number % 2]}_{number}.png")


def features_of_case(seed: int, number: int) -> list[str]:
    """One to three of `FEATURES`, in rounds: as many cases as there are features have each of them once or more."""
    names = sorted(FEATURES)
    round_, place = divmod(number, len(names))
    first = random.Random(f"{seed} round {round_}").sample(names, len(names))[place]
    rng = random.Random(f"{seed} features {number}")
    return sorted([first, *rng.sample([name for name in names if name != first], rng.randint(0, 2))])


class Soak:
    """All cases, and what has come of them.

    :param folder: where they are played, and where the report goes.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        make_images(folder / "images", 50, seed=0)
        make_images(folder / "heldout", 16, seed=1)
        self.no_disks = why_no_disks(folder / "disk")
        self.started = time.monotonic()
        self.counts: Counter = Counter()
        self.features: Counter = Counter()
        self.references: dict[tuple[str, ...], dict[str, str]] = {}
        self.failures: list[dict[str, str]] = []
        self.played = 0

    def play(self, number: int) -> None:
        """Play a case; a failure is reported and recorded, and its directory kept."""
        home = self.folder / f"case{number}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        features = features_of_case(self.seed, number)
        rng = random.Random(f"{self.seed} {number}")
        case = Case(home, self.folder, features, rng, not self.no_disks, self.counts)
        problem = ""
        try:
            case.play(self.reference(case))
        except Broken as error:
            problem = str(error)
        except (Exception, AssertionError):  # of the soak itself, or a process that hangs
            problem = traceback.format_exc()
        finally:
            if case.disk and case.disk.is_mount():
                if problem:
                    shutil.copytree(case.disk, home / "copy of disk")
                unmount(case.disk)
        self.played += 1
        self.features.update(case.features)
        told = f"case {number} ({', '.join(case.features)}): {'; '.join(case.story)}"
        if problem:
            command = f"python tests/soak.py --seed {self.seed} --only {number} --folder {self.folder}"
            self.failures.append({"case": told, "problem": problem, "repeat": command, "kept": str(home)})
            print(f"FAILED {told}\n{problem}\nkept in {home}; to repeat it: {command}", flush=True)
        else:
            shutil.rmtree(home)
            print(f"same {told}", flush=True)
        self.report()

    def reference(self, case: Case) -> dict[str, str]:
        """What the run of `case` has come to where nothing disturbs it; computed once for each mode."""
        mode = tuple(case.features)
        if mode not in self.references:
            home = self.folder / "reference"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            environment = {"IMPROVED_DIFFUSION_CACHE": str(self.folder / "cache")}
            with sessions(home / "run", case.flags, case.ranks, environment=environment) as processes:
                codes = [process.wait() for process in processes]
            require(set(codes) == {0}, f"the undisturbed run fails: {codes}\n{processes[0].stderr}")
            self.references[mode] = contents(home / "run")
            shutil.rmtree(home)
        return self.references[mode]

    def summary(self) -> str:
        """The counts in a line of text."""
        happened = sum(count for kind, count in self.counts.items() if kind in DISTURBANCES)
        told = ", ".join(f"{self.counts[kind]} {kind}" for kind in DISTURBANCES if self.counts[kind])
        return (
            f"soak: {self.played} runs in {len(self.references)} modes compared after {happened} disturbances ({told}; "
            f"{self.counts['kills within a save']} kills within a save): {len(self.failures)} failed. "
            f"{self.no_disks or 'The disks that filled up were small ones of their own.'}"
        )

    def report(self) -> None:
        content = {
            "date": datetime.date.today().isoformat(),
            "hours": round((time.monotonic() - self.started) / 3600, 2),
            "seed": self.seed,
            "python": platform.python_version(),
            "torch": th.__version__,
            "runs": self.played,
            "modes": len(self.references),
            "runs with": dict(sorted(self.features.items())),
            "counts": dict(sorted(self.counts.items())),
            "without": self.no_disks,
            "failures": self.failures,
        }
        write_json(str(self.folder / "soak.json"), content)


DISTURBANCES = (
    *("kill -9", *SIGNALS, "SIGUSR1", "--max_hours", "full disk", "file-size limit", "moved folder"),
    *("deleted folder", "damaged checkpoint", "damaged other file", "no connection to the cloud"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--hours", type=float, default=2.0, help="how long; the case that is under way is finished"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--folder", type=Path, default=Path("soak"), help="where to work and to report")
    parser.add_argument("--only", type=int, help="repeat the case of this number, and no other")
    arguments = parser.parse_args()
    training_process.PATIENCE = PATIENCE
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    soak = Soak(arguments.folder.resolve(), arguments.seed)
    numbers = [arguments.only] if arguments.only is not None else range(10**6)
    deadline = time.monotonic() + 3600 * arguments.hours
    with contextlib.suppress(KeyboardInterrupt):
        for number in numbers:
            if time.monotonic() >= deadline:
                break
            soak.play(number)
    print(soak.summary())
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
