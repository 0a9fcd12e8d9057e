"""Files that survive: atomic writes and paths, for local disks and blobfile URLs alike."""

import contextlib
import csv
import datetime
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import blobfile as bf

TEMPORARY_PREFIX = ".tmp-"


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as ``gs://...`` or ``az://...`` rather than a local path."""
    return "://" in path


def absolute(path: str) -> str:
    """`path` as a user can find it again: absolute when local, unchanged when remote."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def new_directory(parent: str) -> str:
    """A path in `parent`, named after the present time, that does not exist yet."""
    path = stamp = os.path.join(parent, datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S"))
    number = 1
    while os.path.exists(path):
        number += 1
        path = f"{stamp}-{number}"
    return path


def open_input(path: str) -> BinaryIO:
    """Open a file that a user has named, or that lies in a folder of theirs, for reading bytes.

    :raises ValueError: a local `path` is a FIFO, a device or the like, which may never begin or never end.
    :raises OSError: it cannot be opened.
    """
    if is_remote(path):
        return bf.BlobFile(path, "rb")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a FIFO, a device or a socket, not a file")
    return open(path, "rb")


@contextlib.contextmanager
def open_atomic(path: str, mode: str = "wb") -> Iterator:
    """Open `path` for writing so that it appears complete or not at all.

    The data go to a temporary file, are flushed to the disk, and only then take the name `path` (a rename
    locally, an upload remotely). When the body raises, whatever was at `path` is left as it was.

    :param mode: ``"wb"``, or ``"w"`` for UTF-8 text without newline translation.
    :raises OSError: the folder is missing, full or read-only.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, "upload")
            with open(temporary, mode, **text) as file:
                yield file
            bf.copy(temporary, path, overwrite=True)
        return
    folder, name = os.path.split(absolute(path))
    temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:8]}-{name}")
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(folder, name))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a failed write does not say of itself what was written
        raise
    _sync_folder(folder)


def remove_temporaries(folder: str) -> None:
    """Delete what a killed process left of its `open_atomic` files; nobody may be writing into `folder` now."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(TEMPORARY_PREFIX) and os.path.isfile(path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def read_lines(path: str) -> tuple[list[str], bool]:
    """The complete lines of a text file without their ends, and whether a torn one, without an end, follows.

    :raises OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig", "replace")
    # A power failure may leave NUL bytes where data should have been.
    *lines, torn = text.replace("\0", "").split("\n")
    return [line.rstrip("\r") for line in lines], bool(torn)


def read_csv(path: str) -> tuple[list[str], list[list[str]], bool]:
    """The header and the rows of a CSV file with one line per row, and whether a torn line follows them.

    Empty lines are left out. A line that cannot be split into cells becomes a row without cells.

    :raises OSError: the file cannot be read.
    """
    lines, torn = read_lines(path)
    header, *rows = [_split(line) for line in lines if line.strip()] or [[]]
    return header, rows, torn


def _split(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a cell of more than a hundred kilobytes
        return []


def _sync_folder(folder: str) -> None:
    """Make a rename in `folder` durable, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str, content: Any) -> None:
    """Write `content` into the JSON file `path`, for people to read too. :raises OSError: as `open_atomic`."""
    with open_atomic(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
