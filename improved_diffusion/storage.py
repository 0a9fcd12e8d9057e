"""Atomic writes, reading of text files, and paths: on local disks, and partly for blobfile URLs too."""

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
    """`path` as an absolute path; a URL stays unchanged."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def output_file(path: str) -> str:
    """`path` as an absolute path, for a file that is to be written after long work.

    :raises ValueError: a file cannot be there, because it is a folder, or because its folder does not exist.
    """
    path = absolute(path)
    if os.path.isdir(path):
        raise ValueError(f"{path}: is a folder; give the name of a file")
    if not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"{path}: there is no folder {os.path.dirname(path)}")
    return path


def make_new_directory(parent: str) -> str:
    """Create a directory in `parent`, named after the present time, and return its path.

    No other process gets the same one, even if it asks at the same moment.

    :raises OSError: it cannot be created.
    """
    os.makedirs(parent, exist_ok=True)
    while True:
        path = new_directory(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            return path


def new_directory(parent: str) -> str:
    """The path of a directory in `parent` that does not exist yet, named after the present time."""
    path = stamp = os.path.join(parent, datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S"))
    number = 1
    while os.path.exists(path):
        number += 1
        path = f"{stamp}-{number}"
    return path


def open_input(path: str) -> BinaryIO:
    """Open a file of a user for reading bytes.

    :raises ValueError: a local `path` is a FIFO, a device or a socket, from which reading might never end.
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
    """Open `path` for writing, so that the file appears complete or not at all.

    The data are written to a temporary file and flushed to the disk. Only then the file gets the name `path`, by a
    rename or, for a URL, an upload. If the body raises an error, a file that was at `path` before stays as it was.

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
        if isinstance(error, OSError) and error.filename in (None, temporary):
            error.filename, error.filename2 = path, None  # which is what the user knows
        raise
    _sync_folder(folder)


def remove_temporaries(folder: str) -> None:
    """Delete the temporary files of `open_atomic` that a killed process has left.

    No other process may be writing into `folder` meanwhile.
    """
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(TEMPORARY_PREFIX) and os.path.isfile(path):
            with contextlib.suppress(OSError):
                os.unlink(path)


def read_lines(path: str) -> tuple[list[str], bool]:
    """The complete lines of a text file, without line ends, and whether an incomplete line follows them.

    :raises OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig", "replace")
    # A power failure may leave NUL bytes in the place of data.
    *lines, torn = text.replace("\0", "").split("\n")
    return [line.rstrip("\r") for line in lines], bool(torn)


def read_csv(path: str) -> tuple[list[str], list[list[str]], bool]:
    """The header and the rows of a CSV file with one line per row, and whether an incomplete line follows them.

    Empty lines are left out. A line that cannot be split into cells becomes an empty row.

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
    """Flush a rename in `folder` to the disk, on systems where a folder can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str, content: Any) -> None:
    """Write `content` into the JSON file `path`, with indentation. :raises OSError: as `open_atomic`."""
    with open_atomic(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
