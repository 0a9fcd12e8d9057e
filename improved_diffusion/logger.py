"""The logs of a run: lines of text, and rows of metrics as CSV and JSON lines. A resumed run continues them.

    logger.configure("runs/first", columns=["step", "loss", "lr"])
    logger.log("training...")               # terminal and log.txt
    logger.logkv_mean("loss", 0.5)          # averaged until the next dumpkvs
    logger.logkv("step", 10)
    logger.dumpkvs()                        # one row of progress.csv and progress.jsonl

Existing files are continued, never erased.
"""

import contextlib
import csv
import datetime
import errno
import hashlib
import io
import json
import math
import numbers
import os
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from improved_diffusion.storage import absolute, is_remote, new_directory, open_atomic, read_csv, read_lines

Value = int | float | str | None


class CsvTable:
    """A CSV file with fixed columns. It grows by whole rows of one line each.

    A new file gets its header at once. An existing file is continued. If an interrupted write has left an incomplete
    last line, that is dropped. If the file has other columns than `columns`, it is rewritten with `columns` first and
    its own further columns after them; the old rows keep their values. A file whose first line is not a header is
    renamed to ``<name>.damaged``.

    The file stays open. Otherwise, a spreadsheet program could lock it between two rows.

    :param columns: the names of the columns, in order, ``step`` among them.
    :raises OSError: the file cannot be read or written.
    """

    def __init__(self, path: str, columns: Sequence[str]):
        self.path = path
        self.columns = list(columns)
        header, rows = [], []
        if os.path.exists(path):
            header, rows, _ = read_csv(path)
        if header and not _is_header(header):
            os.replace(path, path + ".damaged")
            log(
                f"WARNING: {path}: its first line is damaged; the file is kept as {path}.damaged, and a new one begun"
            )
            header, rows = [], []
        self.columns += [name for name in header if name not in self.columns]
        if header == self.columns:
            _drop_torn_line(path)
        else:
            self._rewrite([dict(zip(header, row)) for row in rows if row])
        self._open()

    def append(self, row: dict[str, Value]) -> None:
        """Write `row`, values by column, as one line. A column without a value becomes an empty cell.

        Floats are written with all digits, so that reading them gives the same numbers.

        :raises OSError: the line could not be written. The file is then as it was before.
        """
        unknown = row.keys() - set(self.columns)
        assert not unknown, f"{self.path} has no column {sorted(unknown)}"
        _append_line(self._file, _csv_line([_cell(row.get(name)) for name in self.columns]))

    def keep_until(self, step: float) -> float | None:
        """Drop the rows after `step`, which a resumed run writes again, and the lines that are not rows.

        :return: the step of the last row that stays, or None.
        :raises OSError: the file cannot be rewritten. It is then as it was before.
        """
        header, rows, _ = read_csv(self.path)
        table = [dict(zip(header, row)) for row in rows if len(row) == len(header)]
        kept = [row for row in table if _number(row.get("step")) <= step]
        self.close()
        try:
            self._rewrite(kept)
        finally:
            self._open()
        return _number(kept[-1]["step"]) if kept else None

    def sha256(self) -> str:
        """The SHA-256 of the present file, in hexadecimal."""
        self._file.seek(0)  # harmless: in append mode, rows go to the end from any position
        return hashlib.sha256(self._file.readall()).hexdigest()

    def close(self) -> None:
        """Close the file. Rows can no longer be appended."""
        self._file.close()

    def _open(self) -> None:
        # Unbuffered: a row is a single write, and is in the file when `append` returns.
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with open_atomic(self.path, "w") as file:
            file.write(_csv_line(self.columns))
            file.writelines(_csv_line([row.get(name, "") for name in self.columns]) for row in rows)


class _Run:
    """The files that are open between `configure` and `close`, and the values since the last `dumpkvs`."""

    def __init__(self):
        self.dir: str | None = None
        self.text: io.FileIO | None = None
        self.table: CsvTable | None = None
        self.json_lines: io.FileIO | None = None
        self.tensorboard = None
        self.values: dict[str, Value] = {}
        self.sums: dict[str, list[float]] = {}  # key -> [sum of weight * value, sum of weights]

    def close(self) -> None:
        for file in (self.text, self.table, self.json_lines, self.tensorboard):
            if file is not None:
                file.close()


_run = _Run()


def configure(
    dir: str | None = None,
    columns: Sequence[str] | None = None,
    keep_until: float | None = None,
    tensorboard: bool = False,
) -> None:
    """Log to the directory `dir` from now on. It is created if it does not exist.

    `log` writes to ``log.txt``. With `columns`, `dumpkvs` writes to ``progress.csv`` and ``progress.jsonl``. Existing
    files are continued.

    :param dir: by default $OPENAI_LOGDIR or else a new dated directory in ``runs``.
    :param columns: all keys that will be logged, in the order of the CSV file, ``step`` among them.
    :param keep_until: drop the rows after this step, which a resumed run writes again.
    :param tensorboard: also write TensorBoard event files.
    :raises ValueError: `dir` is remote or cannot be written, or TensorBoard is not installed.
    """
    global _run
    dir = dir or os.environ.get("OPENAI_LOGDIR") or new_directory("runs")
    if is_remote(dir):
        raise ValueError(f"{dir}: logs are written line by line, which needs a local directory")
    close()
    run = _Run()
    run.dir = absolute(dir)
    try:
        os.makedirs(run.dir, exist_ok=True)
        run.text = open(os.path.join(run.dir, "log.txt"), "ab", buffering=0)  # noqa: SIM115
        if columns is not None:
            assert "step" in columns
            run.table = CsvTable(os.path.join(run.dir, "progress.csv"), columns)
            path = os.path.join(run.dir, "progress.jsonl")
            _drop_torn_line(path)
            if keep_until is not None:
                run.table.keep_until(keep_until)
                _trim_json_lines(path, keep_until)
            run.json_lines = open(path, "ab", buffering=0)  # noqa: SIM115
        if tensorboard:
            run.tensorboard = _open_tensorboard(run.dir, keep_until)
    except OSError as error:
        run.close()
        name = error.filename or run.dir
        raise ValueError(
            f"{dir}: cannot write {name} ({error.strerror}); choose another directory, or close the file where it is "
            "open"
        ) from error
    except ValueError:
        run.close()
        raise
    _run = run


def close() -> None:
    """Close the files. From then on, `log` only prints."""
    global _run
    _run.close()
    _run = _Run()


reset = close  # the name in openai/improved-diffusion


def get_dir() -> str | None:
    """The absolute path of the configured directory, or None."""
    return _run.dir


def log(*args: object) -> None:
    """Print `args` as one line, above a progress bar if there is one, and add it to ``log.txt`` with the time."""
    line = " ".join(str(arg) for arg in args)
    try:
        tqdm.write(line, file=sys.stdout)
    except UnicodeEncodeError:  # for example on a Windows console with a legacy code page
        tqdm.write(line.encode("ascii", "replace").decode(), file=sys.stdout)
    sys.stdout.flush()
    if _run.text is not None:
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        # The line was printed already. If the disk is full, writing a row or a checkpoint raises the error.
        with contextlib.suppress(OSError):
            _append_line(_run.text, f"{now}  {line}\n")


def logkv(key: str, value: Value) -> None:
    """Set `key` in the next row to `value`: a text, a number, or a zero-dimensional array or tensor."""
    _run.values[key] = _plain(value)


def logkv_mean(key: str, value: float, weight: float = 1.0) -> None:
    """Set `key` in the next row to the weighted mean of all values that are given until then."""
    total = _run.sums.setdefault(key, [0.0, 0.0])
    total[0] += float(weight) * float(value)
    total[1] += float(weight)


def getkvs() -> dict[str, Value]:
    """The unfinished row: the values set and the means so far. A mean with a total weight of 0 is left out."""
    means = {key: total / weight for key, (total, weight) in _run.sums.items() if weight}
    return {**_run.values, **means}


def dumpkvs() -> dict[str, Value]:
    """Finish the row and begin the next one. If `configure` was given columns, the row is written to the files.

    :return: the row.
    :raises OSError: the row could not be written. It is then still unfinished, and the next `dumpkvs` tries again.
    """
    row = getkvs()
    if _run.table is not None:
        _run.table.append(row)
        full_row = {name: _json_value(row.get(name)) for name in _run.table.columns}
        _append_line(_run.json_lines, json.dumps(full_row) + "\n")
    if _run.tensorboard is not None:
        for key, value in row.items():
            if key != "step" and not isinstance(value, str):
                _run.tensorboard.add_scalar(key, value, row["step"])
        _run.tensorboard.flush()
    _run.values.clear()
    _run.sums.clear()
    return row


def log_picture(key: str, path: str, step: int) -> None:
    """Show the picture in the file `path` in TensorBoard, where `configure` was asked for that.

    :raises OSError: the file is no picture, or the disk is full.
    """
    if _run.tensorboard is None:
        return
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    _run.tensorboard.add_image(key, pixels, step, dataformats="HWC")
    _run.tensorboard.flush()


def state() -> dict:
    """The unfinished row, which `load_state` restores exactly, and the checksum of ``progress.csv``.

    All values are of types that JSON has.
    """
    return {
        "values": dict(_run.values),
        "sums": {key: list(total) for key, total in _run.sums.items()},
        "table": _run.table and _run.table.sha256(),
    }


def load_state(saved: dict) -> None:
    """Continue the unfinished row in `saved`, which `state` returned. Warn if ``progress.csv`` has changed since.

    :raises ValueError: `saved` is damaged.
    """
    if _run.table and saved.get("table") and saved["table"] != _run.table.sha256():
        log(
            f"WARNING: {_run.table.path}: its rows have changed since the checkpoint (damaged, edited or lost); "
            "training is not affected"
        )
    try:
        _run.values = dict(saved["values"])
        _run.sums = {key: [float(total), float(weight)] for key, (total, weight) in saved["sums"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{_run.dir}: the checkpoint's state of the log is damaged ({error})") from None


def _open_tensorboard(dir: str, keep_until: float | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard is not installed: pip install "improved_diffusion[tensorboard]", or train without it'
        ) from error
    return SummaryWriter(dir, purge_step=None if keep_until is None else int(keep_until) + 1)


def _plain(value) -> Value:
    """`value`, if it is a number of NumPy or torch, as a Python number."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _cell(value) -> str:
    value = _plain(value)
    if isinstance(value, str):
        assert "\n" not in value and "\r" not in value
        return value
    return "" if value is None else repr(value)


def _json_value(value: Value) -> Value:
    """`value` for a JSON file. NaN and infinity, which JSON does not have, become the text of the CSV file."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(text) -> float:
    """`text` as a number; NaN if it is not a number, so that every comparison with it is false."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _is_header(cells: list[str]) -> bool:
    """Whether `cells`, the first line of a CSV file, can be a header of this module."""
    return "step" in cells and len(set(cells)) == len(cells) and all(map(str.isprintable, cells))


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _append_line(file: io.FileIO, line: str) -> None:
    """Append all of `line`, or nothing. :raises OSError: it could not be written; the error names the file."""
    data = line.encode("utf-8", "replace")
    size = os.fstat(file.fileno()).st_size
    try:
        # Usually a single write. When the disk is full, it writes a part, and the next one raises the error.
        while data:
            written = file.write(data)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[written:]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        error.filename = file.name  # which the error of a failed write lacks
        raise


def _drop_torn_line(path: str) -> None:
    """Remove an incomplete last line, because the next line would be appended to it."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _trim_json_lines(path: str, step: float) -> None:
    """Drop the JSON lines after `step`, and those that cannot be read."""
    kept = []
    for line in read_lines(path)[0] if os.path.exists(path) else ():
        with contextlib.suppress(ValueError, AttributeError):  # no JSON, or no object
            if _number(json.loads(line).get("step")) <= step:
                kept.append(line + "\n")
    with open_atomic(path, "w") as file:
        file.writelines(kept)
