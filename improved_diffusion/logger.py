"""The record of a run: lines of text, and rows of metrics as CSV and JSON lines that a resumed run continues.

    logger.configure("runs/first", columns=["step", "loss", "lr"])
    logger.log("training...")               # terminal and log.txt
    logger.logkv_mean("loss", 0.5)          # averaged until the next dumpkvs
    logger.logkv("step", 10)
    logger.dumpkvs()                        # one row of progress.csv and progress.jsonl

Nothing here ever erases a history: existing files are appended to.
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

from tqdm import tqdm

from improved_diffusion.storage import absolute, is_remote, new_directory, open_atomic, read_csv, read_lines

Value = int | float | str | None


class CsvTable:
    """A CSV file with fixed columns that grows by whole rows, one line each.

    A new file gets its header at once. An existing one is continued: a last line that an interrupted write
    left without its end is dropped. When its columns differ from `columns`, it is rewritten with `columns`
    first and its other columns after them, and the old rows keep their values. A file whose first line cannot
    be a header is put aside.

    The file stays open, so that a spreadsheet program that looks at it cannot lock it between two rows.

    :param columns: names in the order of the file; rows are selected by the column ``step``.
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
            log(f"WARNING: {path}: its first line is damaged; kept as {path}.damaged, and begun anew")
            header, rows = [], []
        self.columns += [name for name in header if name not in self.columns]
        if header == self.columns:
            _drop_torn_line(path)
        else:
            self._rewrite([dict(zip(header, row)) for row in rows if row])
        self._open()

    def append(self, row: dict[str, Value]) -> None:
        """Write `row` as one line; a column without a value becomes an empty cell.

        Floats are written with all their digits, so that reading them back gives the same number.

        :raises OSError: the line could not be written in full; what was written of it is taken back.
        """
        unknown = row.keys() - set(self.columns)
        assert not unknown, f"{self.path} has no column {sorted(unknown)}"
        _append_line(self._file, _csv_line([_cell(row.get(name)) for name in self.columns]))

    def keep_until(self, step: float) -> float | None:
        """Drop the rows after `step` and the lines that are no rows at all, as a resumed run must.

        :return: the step of the last row that stays, or None.
        :raises OSError: the file cannot be rewritten; it is then as it was.
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
        """The checksum of the file as it stands."""
        self._file.seek(0)  # rows are appended wherever this leaves the position
        return hashlib.sha256(self._file.readall()).hexdigest()

    def close(self) -> None:
        """Close the file. Rows can no longer be appended."""
        self._file.close()

    def _open(self) -> None:
        # Unbuffered: a row is one write call, in the file before `append` returns.
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with open_atomic(self.path, "w") as file:
            file.write(_csv_line(self.columns))
            file.writelines(_csv_line([row.get(name, "") for name in self.columns]) for row in rows)


class _Run:
    """What is open between `configure` and `close`, and what has been logged since the last `dumpkvs`."""

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
    """Send everything that is logged from now on to the directory `dir`, which is created where needed.

    `log` writes to ``log.txt``. With `columns`, `dumpkvs` writes to ``progress.csv`` and
    ``progress.jsonl``. Files that exist are continued, never erased.

    :param dir: by default $OPENAI_LOGDIR, or else a new dated directory in ``runs``.
    :param columns: all keys that will be logged, in the order of the CSV file; ``step`` among them.
    :param keep_until: drop the rows after this step: those that a resumed run is going to repeat.
    :param tensorboard: write TensorBoard event files too.
    :raises ValueError: `dir` cannot be written, or TensorBoard is not installed.
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
            assert "step" in columns, "rows are told apart by their step"
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
    """Close the files. What is logged afterwards goes to the terminal only."""
    global _run
    _run.close()
    _run = _Run()


reset = close  # the name in openai/improved-diffusion


def get_dir() -> str | None:
    """The absolute path of the configured directory, or None."""
    return _run.dir


def log(*args: object) -> None:
    """Print `args` as one line without tearing a progress bar, and add it to ``log.txt`` with the time."""
    line = " ".join(str(arg) for arg in args)
    try:
        tqdm.write(line, file=sys.stdout)
    except UnicodeEncodeError:  # a Windows console with a legacy code page must not stop a run
        tqdm.write(line.encode("ascii", "replace").decode(), file=sys.stdout)
    sys.stdout.flush()
    if _run.text is not None:
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        # The line has been shown. A full disk is reported by what must be on it: rows and checkpoints.
        with contextlib.suppress(OSError):
            _append_line(_run.text, f"{now}  {line}\n")


def logkv(key: str, value: Value) -> None:
    """Set `key` in the next row to `value`, a number or a zero-dimensional array of any kind."""
    _run.values[key] = _plain(value)


def logkv_mean(key: str, value: float, weight: float = 1.0) -> None:
    """Set `key` in the next row to the weighted mean of all values given until then."""
    total = _run.sums.setdefault(key, [0.0, 0.0])
    total[0] += float(weight) * float(value)
    total[1] += float(weight)


def getkvs() -> dict[str, Value]:
    """The next row as it stands: the values set and the means so far. A mean of no weight is left out."""
    means = {key: total / weight for key, (total, weight) in _run.sums.items() if weight}
    return {**_run.values, **means}


def dumpkvs() -> dict[str, Value]:
    """Write the row (where `configure` was given columns), begin the next one, and return it.

    :raises OSError: the disk is full or gone. The row stays, and its means go on, for the next `dumpkvs`.
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


def state() -> dict:
    """The unfinished row, as JSON-able values that `load_state` restores to the last bit, and a checksum of
    ``progress.csv`` with the rows before it."""
    return {
        "values": dict(_run.values),
        "sums": {key: list(total) for key, total in _run.sums.items()},
        "table": _run.table and _run.table.sha256(),
    }


def load_state(saved: dict) -> None:
    """Continue the unfinished row that `state` returned; warn when the rows before it are not as they were.

    :raises ValueError: it was not `state` that returned it.
    """
    if _run.table and saved.get("table") and saved["table"] != _run.table.sha256():
        log(
            f"WARNING: {_run.table.path}: the rows so far are not those that were written (damaged, edited or "
            "lost); training is not affected"
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
    """A Python number (or text, or None) for a number of NumPy or torch."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _cell(value) -> str:
    value = _plain(value)
    if isinstance(value, str):
        assert "\n" not in value and "\r" not in value, "a row is one line"
        return value
    return "" if value is None else repr(value)


def _json_value(value: Value) -> Value:
    """`value` as strict JSON has it, which knows no NaN: the same text as in the CSV file."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(text) -> float:
    """`text` as a number; NaN, which no comparison accepts, when it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _is_header(cells: list[str]) -> bool:
    """Whether the first line of a CSV file can be one of ours."""
    return "step" in cells and len(set(cells)) == len(cells) and all(map(str.isprintable, cells))


def _csv_line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _append_line(file: io.FileIO, line: str) -> None:
    """Append `line` as a whole, or nothing at all."""
    data = line.encode("utf-8", "replace")
    size = os.fstat(file.fileno()).st_size
    try:
        # One write is enough, unless there is no room: then the next one says why.
        while data:
            written = file.write(data)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[written:]
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        error.filename = file.name  # a failed write does not say of itself what was written
        raise


def _drop_torn_line(path: str) -> None:
    """Cut off a last line without an end, to which the next one would otherwise be glued."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _trim_json_lines(path: str, step: float) -> None:
    """Keep the JSON lines up to `step`."""
    kept = []
    for line in read_lines(path)[0] if os.path.exists(path) else ():
        with contextlib.suppress(ValueError, AttributeError):  # no JSON, or no object
            if _number(json.loads(line).get("step")) <= step:
                kept.append(line + "\n")
    with open_atomic(path, "w") as file:
        file.writelines(kept)
