"""Checkpoints on disk: complete or absent, verified by checksums, found again by directory or by any file.

A checkpoint of step N consists of ``modelN.pt``, ``ema_<rate>_N.pt``, ``power_<length>_N.pt`` (see `averages`),
``optN.pt`` and ``stateN.json``. N is the number of completed optimizer updates, with six digits or more. The state
file holds everything else, the sizes and checksums of the other files, and a checksum of itself. It is written
last: without it, the checkpoint does not exist.

`rotate` deletes old checkpoints, but keeps the power-function averages of some, because averages of other lengths are
made of them. The state file of such a checkpoint is renamed to ``averagesN.json``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import torch as th

from improved_diffusion.run.tensor_file import RefusedContent, parse_tensors
from improved_diffusion.storage import absolute, is_remote, open_atomic, open_input

FORMAT = 2  # 1 had no checksum of the state file
MOST_AVERAGES = 24  # deleted checkpoints whose averages stay; see `rotate`
POWER_LENGTH = re.compile(r"0\.[0-9]{1,8}")
_MEMBER = re.compile(
    r"(?P<kind>model|opt|state|ema_(?P<rate>[^_/\\]+)_|power_(?P<length>" + POWER_LENGTH.pattern + ")_)"
    r"(?P<step>\d{6,})\.(?:pt|json)"
)
_AVERAGES = re.compile(r"averages(?P<step>\d{6,})\.json")  # the state file after `rotate`
_STATE_TYPES = {
    "samples": int,
    "elapsed": int | float,
    "arguments": dict,
    "data": dict,
    "schedule_sampler": dict,
    "log": dict,
    "heldout": dict,
    "plan": dict,
    "origin": dict,
    "logged_step": int,
    "skipped": int,
    "files": dict,
}


class DamagedCheckpoint(ValueError):
    """A checkpoint file is missing, truncated or altered; the message names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, its step and the content of its state file."""

    folder: str
    step: int
    state: dict[str, Any]

    def path(self, kind: str) -> str:
        """The path of the file of `kind`: "model", "opt", "state", an EMA rate such as "0.9999", or a `power_kind`."""
        return bf.join(self.folder, member_name(kind, self.step))

    def load(self, kind: str) -> dict[str, Any]:
        """The tensors of `kind`, after a comparison of the checksum.

        :raises DamagedCheckpoint: the file is missing or was altered.
        :raises ValueError: it holds weights that `load_weights` refuses.
        """
        recorded = self.state["files"].get(member_name(kind, self.step))
        if recorded is None:
            raise DamagedCheckpoint(f"{self.path('state')}: records no file {member_name(kind, self.step)}")
        load = load_tensors if kind == "opt" else load_weights
        return load(self.path(kind), sha256=recorded["sha256"])

    @property
    def ema_rates(self) -> list[str]:
        """The rates of the moving averages in this checkpoint, as in the file names."""
        return self._named_in_files("rate")

    @property
    def power_lengths(self) -> list[str]:
        """The lengths of the power-function averages in this checkpoint, as in the file names."""
        return self._named_in_files("length")

    def _named_in_files(self, part: str) -> list[str]:
        matches = (_MEMBER.fullmatch(name) for name in self.state["files"])
        return [match[part] for match in matches if match and match[part]]


def power_kind(length: str) -> str:
    """The kind of file that holds the power-function average of `length`: "power_0.05" for "0.05"."""
    return f"power_{length}"


def member_name(kind: str, step: int) -> str:
    """The file name of `kind` ("model", "opt", "state", an EMA rate or a `power_kind`) at `step`."""
    if kind == "state":
        return f"state{step:06d}.json"
    if kind in ("model", "opt"):
        return f"{kind}{step:06d}.pt"
    return f"{kind}_{step:06d}.pt" if kind.startswith("power_") else f"ema_{kind}_{step:06d}.pt"


def save(
    folder: str,
    step: int,
    tensors: dict[str, dict],
    state: dict[str, Any],
    check_folder: Callable[[], object] = lambda: None,
) -> Checkpoint:
    """Write a checkpoint. It does not exist before all of it is on the disk.

    :param tensors: what `torch.save` writes, by kind ("model", "opt", EMA rates, `power_kind`).
    :param state: further content of the state file, of types that JSON has.
    :param check_folder: called before each file. Raises an OSError if it must not be written.
    :raises OSError: the checkpoint could not be written. Earlier ones are untouched. The message names `folder`.
    """
    state_path = bf.join(folder, member_name("state", step))
    files = {}
    try:
        check_folder()
        if bf.exists(state_path):
            # The files are replaced one by one. In between they are not a checkpoint.
            bf.remove(state_path)
        for kind, content in tensors.items():
            name = member_name(kind, step)
            check_folder()
            with open_atomic(bf.join(folder, name)) as file:
                writer = _HashingWriter(file)
                _save_tensors(content, writer)
            files[name] = {"bytes": writer.bytes, "sha256": writer.sha256.hexdigest()}
        state = {"format": FORMAT, "step": step, **state, "files": files}
        check_folder()
        with open_atomic(state_path, "w") as file:
            json.dump({**state, "sha256": _state_checksum(state)}, file, indent=1)
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write checkpoint {step} ({error.strerror or error}); earlier checkpoints are intact. "
            "Free some space or repair the directory, then run the same command again"
        ) from error
    return Checkpoint(folder, step, state)


def rotate(
    folder: str,
    keep_last: int,
    keep_every: int = 0,
    log: Callable[[str], object] = print,
    check_folder: Callable[[], object] = lambda: None,
) -> list[str]:
    """Delete all checkpoints but the newest `keep_last` and those whose step is a multiple of `keep_every`.

    Of deleted checkpoints, the power-function averages stay, for `averages.with_averages`, but of at most
    `MOST_AVERAGES` of them. More are thinned out to about equal steps, which costs little: averages of the lengths
    0.04 to 0.2, made of those of 0.05 and 0.1, stay within 2% of the wanted profile (see `averages.combine`).

    Only files that a state file lists are deleted. The state file goes first, so an interrupted deletion never leaves
    half a checkpoint that looks complete. Nothing is deleted unless one of the checkpoints that stay is intact.

    :param log: gets a line about each checkpoint that could not be deleted. No error is raised then.
    :param check_folder: called before the first deletion and before each of these lines. Raises an OSError, which ends
        the rotation, if `folder` was moved, deleted or replaced.
    :return: the names of the deleted files.
    """
    assert keep_last >= 1
    deleted: list[str] = []

    def delete(name: str) -> None:
        bf.remove(bf.join(folder, name))
        deleted.append(name)

    complete = steps(folder)
    old = [step for step in complete[:-keep_last] if not (keep_every and step % keep_every == 0)]
    if not old:
        return deleted
    check_folder()
    if not any(_is_intact(folder, step) for step in reversed(complete) if step not in old):
        check_folder()
        log(f"WARNING: {folder}: all checkpoints are kept, because none of the newest is intact")
        return deleted
    for step in old:
        try:
            checkpoint = read(folder, step)
            kept = {member_name(power_kind(length), step) for length in checkpoint.power_lengths}
            if kept:
                os.replace(checkpoint.path("state"), _averages_path(folder, step))
                deleted.append(member_name("state", step))
            else:
                delete(member_name("state", step))
            for name in checkpoint.state["files"]:
                if name not in kept:
                    delete(name)
        except (DamagedCheckpoint, OSError) as error:
            check_folder()
            log(f"WARNING: checkpoint {step} is not deleted: {error}")
    for step in _superfluous_averages(folder):
        try:
            checkpoint = read_averages(folder, step)
            for name in (bf.basename(_averages_path(folder, step)), *checkpoint.state["files"]):
                delete(name)
        except (DamagedCheckpoint, OSError) as error:
            check_folder()
            log(f"WARNING: the averages of checkpoint {step} are not deleted: {error}")
    return deleted


def _superfluous_averages(folder: str) -> list[int]:
    """The deleted checkpoints whose averages can go, so that `MOST_AVERAGES` are left in about equal steps.

    One by one, that between the two nearest neighbours goes. Complete checkpoints are neighbours too.
    """
    complete = steps(folder)
    kept = [step for step in averages_steps(folder) if step not in complete]
    superfluous: list[int] = []
    while len(kept) > MOST_AVERAGES:
        places = sorted({0, *kept, *complete})
        gaps = {step: after - before for before, step, after in zip(places, places[1:], places[2:])}
        superfluous.append(min(gaps.keys() & set(kept), key=lambda step: (gaps[step], step)))
        kept.remove(superfluous[-1])
    return superfluous


def _is_intact(folder: str, step: int) -> bool:
    try:
        verify(read(folder, step))
    except (DamagedCheckpoint, OSError):
        return False
    return True


def steps(folder: str) -> list[int]:
    """The steps of all complete checkpoints in `folder`, ascending; a missing folder has none."""
    matches = (_MEMBER.fullmatch(name) for name in _names_in(folder))
    return sorted(int(match["step"]) for match in matches if match and match["kind"] == "state")


def averages_steps(folder: str) -> list[int]:
    """The steps of the deleted checkpoints in `folder` whose power-function averages were kept, ascending."""
    matches = map(_AVERAGES.fullmatch, _names_in(folder))
    return sorted(int(match["step"]) for match in matches if match)


def _names_in(folder: str) -> list[str]:
    if is_remote(folder):
        return list(bf.listdir(folder)) if bf.isdir(folder) else []
    # Not blobfile's listing: it fails when a file is deleted meanwhile, which a running training does.
    return os.listdir(folder) if os.path.isdir(folder) else []


def _averages_path(folder: str, step: int) -> str:
    return bf.join(folder, f"averages{step:06d}.json")


def read(folder: str, step: int) -> Checkpoint:
    """The checkpoint of `step`. Its state file is read, and the sizes of its other files are compared.

    :raises DamagedCheckpoint: one of the files is missing, damaged or of another size.
    """
    path = bf.join(folder, member_name("state", step))
    state = _read_state(path, step)
    _check_sizes(folder, path, state)
    return Checkpoint(folder, step, state)


def read_averages(folder: str, step: int) -> Checkpoint:
    """What `rotate` has left of the checkpoint of `step`: a `Checkpoint` with power-function averages only.

    :raises DamagedCheckpoint: as `read`.
    """
    path = _averages_path(folder, step)
    state = _read_state(path, step)
    state["files"] = {name: entry for name, entry in state["files"].items() if name.startswith("power_")}
    _check_sizes(folder, path, state)
    return Checkpoint(folder, step, state)


def _read_state(path: str, step: int) -> dict[str, Any]:
    try:
        state = json.loads(_read(path))
        _check_state(state, step)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing, so this checkpoint is not complete") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: damaged ({error})") from None
    return state


def _check_sizes(folder: str, path: str, state: dict[str, Any]) -> None:
    """Compare the sizes of the files that `state`, read from `path`, lists."""
    for name, entry in state["files"].items():
        member = bf.join(folder, name)
        try:
            size = bf.stat(member).size
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{member}: missing, though {path} lists it") from None
        if size != entry["bytes"]:
            raise DamagedCheckpoint(f"{member}: damaged ({size} bytes where {entry['bytes']} were written)")


def verify(checkpoint: Checkpoint) -> None:
    """Compare the checksum of every file. :raises DamagedCheckpoint: one differs; the message names the first."""
    for name, entry in checkpoint.state["files"].items():
        path = bf.join(checkpoint.folder, name)
        try:
            content = _read(path)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: missing") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DamagedCheckpoint(f"{path}: damaged (its checksum is not the recorded one)")


def find(path: str, log=print) -> Checkpoint:
    """The checkpoint at `path`.

    :param path: a directory, for its newest intact checkpoint, or any file of a checkpoint, whose files must all be
        intact.
    :param log: gets a line about each damaged checkpoint of a directory that is newer than the returned one.
    :raises ValueError: there is no such checkpoint; the message names the path.
    """
    path = absolute(path)
    if bf.isdir(path):
        tried: set[int] = set()
        # Listed anew for each, because a running training may save one meanwhile, and delete the others.
        while left := [step for step in steps(path) if step not in tried]:
            step = left[-1]
            tried.add(step)
            try:
                checkpoint = read(path, step)
                verify(checkpoint)
                return checkpoint
            except DamagedCheckpoint as error:
                log(f"WARNING: skipping checkpoint {step}: {error}")
        raise ValueError(f"{path}: holds no {'intact' if tried else 'complete'} checkpoint")
    if not bf.exists(path):
        raise ValueError(f"{path}: there is no such file or directory")
    match = _MEMBER.fullmatch(bf.basename(path))
    if match is None:
        raise ValueError(
            f"{path}: not a file of a checkpoint (modelN.pt, ema_RATE_N.pt, power_LENGTH_N.pt, optN.pt, stateN.json)"
        )
    checkpoint = read(bf.dirname(path), int(match["step"]))
    verify(checkpoint)
    return checkpoint


def kind_of(path: str) -> str | None:
    """The kind of a checkpoint's file, by its name: "model", "opt", "state", an EMA rate, a `power_kind`; else None."""
    match = _MEMBER.fullmatch(bf.basename(path))
    return match and (match["rate"] or match["kind"].rstrip("_"))


def state_beside(path: str) -> Checkpoint | None:
    """The checkpoint that the weights file `path` belongs to, or None without a state file in the same folder.

    :raises DamagedCheckpoint: as `read`.
    """
    match = _MEMBER.fullmatch(bf.basename(path))
    if match is None:
        return None
    folder, step = bf.dirname(path), int(match["step"])
    if bf.exists(bf.join(folder, member_name("state", step))):
        return read(folder, step)
    if match["length"] and bf.exists(_averages_path(folder, step)):
        return read_averages(folder, step)
    return None


def lone_weights(path: str) -> str | None:
    """The path of a weights file without a state file, as improved-diffusion writes it, or None.

    :param path: such a file, or a folder. Of a folder, the file of the latest step is taken, if possible an average.
    """
    if not bf.isdir(path):
        alone = path.endswith(".pt") and bf.exists(path) and kind_of(path) not in ("opt", "state")
        match = _MEMBER.fullmatch(bf.basename(path))
        state = match and bf.join(bf.dirname(path), member_name("state", int(match["step"])))
        return path if alone and not (state and bf.exists(state)) else None
    if steps(path):
        return None
    matches = [match for name in bf.listdir(path) if (match := _MEMBER.fullmatch(name))]
    found = [
        (int(match["step"]), bool(match["rate"]), float(match["rate"] or 0), match.string)
        for match in matches
        if match["rate"] or match["kind"] == "model"
    ]
    return bf.join(path, max(found)[-1]) if found else None


def load_tensors(path: str, sha256: str | None = None) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to `path`, on the CPU. Nothing in it is executed (see `parse_tensors`).

    :param sha256: the expected checksum, if known.
    :raises DamagedCheckpoint: the file is missing or damaged, or holds more than tensors.
    """
    try:
        content = _read(path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: there is no such file") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedCheckpoint(f"{path}: damaged (its checksum is not the recorded one)")
    try:
        return parse_tensors(content)
    except RefusedContent as error:
        raise DamagedCheckpoint(f"{path}: refused: {error}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None


def load_weights(path: str, sha256: str | None = None) -> dict[str, th.Tensor]:
    """The weights that `torch.save` wrote to `path`: finite floating-point tensors by name. See `load_tensors`.

    :raises ValueError: an entry is something else; the message names the file and the entry.
    """
    weights = load_tensors(path, sha256)
    for name, value in weights.items():
        if not isinstance(value, th.Tensor) or not value.is_floating_point():
            kind = (
                str(value.dtype).removeprefix("torch.")
                if isinstance(value, th.Tensor)
                else type(value).__name__
            )
            raise ValueError(f"{path}: {name!r} is of type {kind}; weights are floating-point numbers")
        if not th.isfinite(value).all():
            raise ValueError(f"{path}: {name!r} has numbers that are not finite; use an earlier checkpoint")
    return weights


def _state_checksum(state: dict[str, Any]) -> str:
    """The checksum of a state file's content without the checksum itself."""
    return hashlib.sha256(json.dumps(state, indent=1).encode()).hexdigest()


def _check_state(state: dict[str, Any], step: int) -> None:
    """Check the checksum and the types of `state`, which was just read from a file, and remove the checksum.

    The state may list only files of the checkpoint of `step`, so that no other file is read or deleted by it.

    :raises ValueError, TypeError, KeyError, AttributeError, OverflowError: something is wrong.
    """
    recorded = state.pop("sha256", None)
    if state["format"] > FORMAT:
        raise ValueError(f"its format {state['format']} is that of a newer version of this program")
    if recorded != _state_checksum(state):
        raise ValueError("its checksum is not the recorded one")
    if state["step"] != step:
        raise ValueError("holds another step")
    for key, kind in _STATE_TYPES.items():
        if key in state and not isinstance(state[key], kind):
            raise TypeError(f"its {key} is a {type(state[key]).__name__}")
        if key in state and kind is int and not 0 <= state[key] < 2**53:
            raise ValueError(f"its {key} is {state[key]}")
    class_names = state.get("data", {}).get("class_names", [])
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise TypeError("its class names are no list of texts")
    for name, entry in state["files"].items():
        kind = kind_of(name)
        if kind in (None, "state") or name != member_name(kind, step):
            raise ValueError(f"it lists {name!r}, which is no file of checkpoint {step}")
        if kind not in ("model", "opt"):
            float(kind.removeprefix("power_"))
        if not isinstance(entry["sha256"], str) or not isinstance(entry["bytes"], int):
            raise TypeError(f"it has no checksum or size of {name}")


def _read(path: str) -> bytes:
    with open_input(path) as file:
        return file.read()


def _save_tensors(content: dict, writer: "_HashingWriter") -> None:
    try:
        th.save(content, writer)
    except RuntimeError:
        # After a failed write, torch raises an error about its own writer instead of the reason.
        if writer.error is not None:
            raise writer.error from None
        raise


class _HashingWriter:
    """A file for writing that computes the checksum and size of what is written, and remembers its first error."""

    def __init__(self, file):
        self.file = file
        self.error: OSError | None = None
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()
