"""Reading the directory of a run, which may be unfinished or damaged."""

import contextlib
import datetime
import functools
import json
import math
import os
import re
from dataclasses import dataclass, field

import numpy as np

from improved_diffusion.results.columns import is_known
from improved_diffusion.storage import absolute, read_csv

Value = int | float | str | datetime.datetime | None

TEXT_COLUMNS = ("saved_at", "files")  # of checkpoints.csv
LARGEST_EXACT_INTEGER = 2**53  # as a float, the only type of number in Excel
EVALUATED = ("step", "weights", "features", "images", "reference_images")  # columns before the metrics
SOURCES = ("images_path", "reference_path", "evaluated_at", "notes")  # columns after them
MAX_METRICS = 200  # columns; Excel has at most 16,384
# The name of a weights file, which is part of the path of images drawn with it.
WEIGHTS = re.compile(r"(model|ema_(\d[\d.]*)_)(\d{6,15})(?!\d)", re.ASCII)


@dataclass
class Table:
    """The readable rows of a CSV file, and the number of unreadable ones, `broken`."""

    columns: list[str] = field(default_factory=list)
    rows: list[list[Value]] = field(default_factory=list)
    broken: int = 0
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def column(self, name: str) -> np.ndarray:
        """The numbers of a column, float64 [rows]. NaN for a cell without a number, or without such a column."""
        if name not in self._arrays:
            index = self.columns.index(name) if name in self.columns else None
            cells = [None if index is None else row[index] for row in self.rows]
            numbers = [cell if isinstance(cell, (int, float)) else math.nan for cell in cells]
            self._arrays[name] = np.array(numbers, np.float64)
            self._arrays[name].flags.writeable = False
        return self._arrays[name]

    @functools.cached_property
    def repeated(self) -> dict[str, str]:
        """The columns that are equal to an earlier column (except the step) in every row, each with that column."""
        first: dict[bytes, str] = {}
        found = {}
        for name in self.columns:
            values = self.column(name)
            if name == "step" or np.isnan(values).all():
                continue
            original = first.setdefault(values.tobytes(), name)
            if original != name:
                found[name] = original
        return found


@dataclass
class Run:
    """The content of the directory of a run.

    :ivar notes: lines about missing and damaged files.
    :ivar evaluation_notes: warnings, to whose numbers, from 1 on, the column "notes" of `evaluations` refers.
    """

    dir: str
    metrics: Table
    checkpoints: Table
    evaluations: Table
    evaluation_notes: list[str]
    previews: list[tuple[int, str]]  # (step, path of the picture), newest first
    arguments: dict
    defaults: dict  # of the flags in `arguments`; empty where they are not recorded
    data: dict
    machine: dict
    model: dict
    origin: dict  # what a run took that starts from the weights of another model
    started: datetime.datetime | str | None
    sessions: list[dict]
    command: str | None
    notes: list[str]

    @property
    def diffusion_steps(self) -> int | None:
        steps = self.arguments.get("diffusion_steps")
        return steps if isinstance(steps, int) and steps > 0 else None


def read_run(run_dir: str) -> Run:
    """Read `run_dir`. Only ``progress.csv`` is required. Other missing files are noted in `Run.notes`.

    :raises ValueError: there is no such directory, or it has no ``progress.csv`` with a column ``step``.
    :raises OSError: ``progress.csv`` cannot be read.
    """
    run_dir = absolute(run_dir)
    if not os.path.isdir(run_dir):
        raise ValueError(f"{run_dir} is not a directory; give the directory that a training run wrote")
    path = os.path.join(run_dir, "progress.csv")
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; give the directory that a training run wrote")
    metrics = _read_table(path)
    if "step" not in metrics.columns:
        raise ValueError(
            f"{path} is not the progress of a run: its first line does not name the columns of one"
        )

    notes = [_broken_note("progress.csv", metrics.broken)] if metrics.broken else []
    arguments = _read_json(run_dir, "args.json", "the arguments are not known", notes)
    info = _read_json(run_dir, "run.json", "data, model and machine are not known", notes)
    evaluations, evaluation_notes = _read_evaluations(run_dir, notes)
    return Run(
        dir=run_dir,
        metrics=metrics,
        checkpoints=_read_checkpoints(run_dir, notes),
        evaluations=evaluations,
        evaluation_notes=evaluation_notes,
        previews=_find_previews(run_dir),
        arguments=arguments,
        defaults=_dict(info.get("defaults")),
        data=_dict(info.get("data")),
        machine=_dict(info.get("machine")),
        model=_dict(info.get("model")),
        origin=_dict(info.get("origin")),
        started=_time(info.get("started")),
        sessions=[_dict(session) for session in _list(info.get("sessions"))],
        command=info["command"] if isinstance(info.get("command"), str) else None,
        notes=notes,
    )


def _read_table(path: str) -> Table:
    """The rows that have a cell for every column, a number in every column of numbers, and a finite step."""
    columns, rows, torn = read_csv(path)
    table = Table(columns or ["step"], broken=int(torn))
    if "step" not in table.columns or len(set(columns)) < len(columns):
        return Table()
    step = table.columns.index("step")
    for cells in rows:
        try:
            row = [_parse(name, cell) for name, cell in zip(columns, cells, strict=True)]
            # This also rejects a step that is missing, NaN or infinite.
            if not 0 <= row[step] < LARGEST_EXACT_INTEGER:
                raise ValueError("no step")
        except (ValueError, TypeError):
            table.broken += 1
        else:
            table.rows.append(row)
    return table


def _parse(name: str, cell: str) -> Value:
    """The value of a cell of a CSV file: a number, except in columns of text and of other programs."""
    if not cell:
        return None
    if name in TEXT_COLUMNS:
        return _time(cell)
    try:
        number = float(cell)
    except ValueError:
        if is_known(name):
            raise
        return cell
    is_exact_integer = abs(number) < LARGEST_EXACT_INTEGER and number.is_integer()
    return int(number) if is_exact_integer else number


def _read_checkpoints(run_dir: str, notes: list[str]) -> Table:
    try:
        table = _read_table(os.path.join(run_dir, "checkpoints.csv"))
    except OSError:
        notes.append("checkpoints.csv is missing: no checkpoint has been saved yet.")
        return Table()
    if table.broken:
        notes.append(_broken_note("checkpoints.csv", table.broken))
    return table


def _read_evaluations(run_dir: str, notes: list[str]) -> tuple[Table, list[str]]:
    """The records of image_eval.py: a table with a row for each evaluation, and the different warnings.

    Rows with the same features, numbers of images and weights are neighbours, sorted by step.
    """
    try:
        with open(os.path.join(run_dir, "evaluation.json"), encoding="utf-8") as file:
            records = json.load(file)
    except FileNotFoundError:
        return Table(), []
    except (OSError, ValueError, RecursionError):
        records = None
    if not isinstance(records, list):
        notes.append("evaluation.json cannot be read: its evaluations are left out.")
        return Table(), []
    records = [record for record in records if isinstance(record, dict)]
    # Without the features, which are in square brackets after a metric's name: they have their own column.
    metrics = [
        {name.partition("[")[0]: value for name, value in _dict(record.get("metrics")).items()}
        for record in records
    ]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    columns = list(dict.fromkeys([*EVALUATED, *names[:MAX_METRICS], *SOURCES]))
    numbers: dict[str, int] = {}  # of the warnings
    rows = []
    for record, found in zip(records, metrics):
        warnings = [str(warning) for warning in _list(record.get("warnings"))]
        marks = [str(numbers.setdefault(warning, len(numbers) + 1)) for warning in warnings]
        step, weights = _weights_of(record.get("images_path"))
        cells = {**found, "step": step, "weights": weights, **record, "notes": ", ".join(marks) or None}
        row = {name: _cell(cells.get(name)) for name in columns}
        rows.append([*({**row, "evaluated_at": _time(cells.get("evaluated_at"))}.values())])
    order = [columns.index(name) for name in ("features", "reference_images", "images", "weights", "step")]
    rows.sort(key=lambda row: [_sort_key(row[index]) for index in order])
    return Table(columns, rows), list(numbers)


def _weights_of(images_path) -> tuple[int | None, str | None]:
    """The step and the kind of the weights that drew the images, if `images_path` has the name of a weights file.

    The kind is "model", or "ema" and the rate, as in "ema 0.9999".
    """
    matches = list(WEIGHTS.finditer(images_path)) if isinstance(images_path, str) else []
    if not matches:
        return None, None
    kind, rate, step = matches[-1].groups()
    return int(step), f"ema {rate}" if rate else kind


def _sort_key(value: Value) -> tuple[int, float, str]:
    """A key that sorts numbers first, then texts, then missing values."""
    if isinstance(value, int | float):
        return (0, value, "")
    return (2, 0.0, "") if value is None or value == "" else (1, 0.0, str(value))


def _cell(value) -> Value:
    """A value of a JSON file as a cell: numbers as numbers, if Excel can store them, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return str(value)
    return None if isinstance(value, int) and abs(value) >= LARGEST_EXACT_INTEGER else value


def _broken_note(name: str, count: int) -> str:
    return f"{name}: {count:,} unreadable {'line was' if count == 1 else 'lines were'} left out."


def _read_json(run_dir: str, name: str, consequence: str, notes: list[str]) -> dict:
    """The object in a JSON file. If the file is missing or damaged, it is empty, and `notes` gets a line."""
    try:
        with open(os.path.join(run_dir, name), encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        notes.append(f"{name} is missing: {consequence}.")
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{name} cannot be read: {consequence}.")
        return {}
    return content


def _time(text):
    """`text` as a time, if it is one in ISO format. Without the time zone, which Excel does not have."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.datetime.fromisoformat(text).replace(tzinfo=None)
    return text


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _find_previews(run_dir: str) -> list[tuple[int, str]]:
    """The pictures ``samples/step_NNNNNN.png``, newest first."""
    folder = os.path.join(run_dir, "samples")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = [re.fullmatch(r"step_(\d{1,15})\.png", name, re.ASCII) for name in names]
    found = [(int(match[1]), os.path.join(folder, match[0])) for match in matches if match]
    return sorted(found, reverse=True)
