"""The workbook's first sheet: the run at a glance."""

import datetime
import os
import shlex

import numpy as np
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.charts import half_window, smooth
from improved_diffusion.results.columns import (
    COUNT,
    DURATION,
    GENERAL,
    HELD_OUT_LOSS,
    REAL,
    SCIENTIFIC,
    SHORT_REAL,
    TIME,
)
from improved_diffusion.results.read import Run, Table
from improved_diffusion.results.style import (
    NOTE,
    NOTE_FILL,
    RULE,
    SECTION,
    SUBTLE,
    TITLE,
    WARNING,
    WARNING_FILL,
    WRAPPED,
    put,
    put_link,
    set_row_height,
    set_up_page,
    set_widths,
)

LABEL, VALUE, RIGHT, LAST = 2, 3, 5, 16  # columns; charts and the picture begin at RIGHT
LINES_OF_COMMAND = 20
WIDTHS = [2, 26, 50, 3]
COMMAND = "Command"
BUILT_IN = "BUILT-IN IMAGES: this run was trained on drawn shapes, not on CIFAR-10 or images of your own."

Fact = tuple[str, object, str]  # label, value, number format


def fill_overview(sheet: Worksheet, run: Run) -> int:
    """Fill the sheet. :return: the first row with space for charts, in the columns from `RIGHT` on."""
    sheet.title = "Run"
    sheet.sheet_view.showGridLines = False
    set_widths(sheet, WIDTHS)
    set_up_page(sheet, pages_high=1)
    put(sheet, 1, LABEL, os.path.basename(run.dir) or run.dir).font = TITLE
    sheet.row_dimensions[1].height = 30
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    put(sheet, 2, LABEL, f"{coverage(run.metrics)}  Exported {now}.").font = SUBTLE

    row = 4
    if run.data.get("source") == "builtin":
        _put_banner(sheet, row, BUILT_IN, WARNING, WARNING_FILL)
        sheet.row_dimensions[row].height = 26
        row += 1
    for note in run.notes:
        _put_banner(sheet, row, note, NOTE, NOTE_FILL)
        row += 1
    first = row = row if row == 4 else row + 1

    for title, facts in sections(run):
        for column in (LABEL, VALUE):
            sheet.cell(row, column).border = RULE
        put(sheet, row, LABEL, title).font = SECTION
        row += 1
        for label, value, number_format in facts:
            put(sheet, row, LABEL, label).alignment = WRAPPED
            cell = put(sheet, row, VALUE, "not recorded" if value is None else value, number_format)
            cell.alignment = WRAPPED
            if value is None:
                cell.font = SUBTLE
            set_row_height(sheet, row, [(str(value), WIDTHS[VALUE - 1])])
            row += 1
        row += 1
    return first


def link_sheets(sheet: Worksheet, names: list[str]) -> None:
    """Add links to the sheets `names`, above the charts."""
    column = RIGHT
    for name in names:
        put_link(sheet, 2, column, name)
        column += 1 if len(name) < 9 else 2


def coverage(metrics: Table) -> str:
    """How far the metrics reach, in words."""
    if not metrics.rows:
        return "No rows have been logged yet."
    steps = metrics.column("step")
    return f"{len(steps):,} rows, up to step {int(steps.max()):,}."


def _put_banner(sheet: Worksheet, row: int, text: str, font, fill) -> None:
    for column in range(LABEL, LAST + 1):
        sheet.cell(row, column).fill = fill
    put(sheet, row, LABEL, text).font = font


def sections(run: Run) -> list[tuple[str, list[Fact]]]:
    """The facts about a run, in groups with a title; a value of None is not recorded."""
    return [
        ("Progress", _progress(run)),
        ("Loss", _loss(run)),
        ("Data", _data(run)),
        ("Model and training", _training(run)),
        ("Machine and session", _machine(run)),
    ]


def _progress(run: Run) -> list[Fact]:
    steps = run.metrics.column("step")
    done = int(steps.max()) if len(steps) else 0
    total = run.arguments.get("total_steps")
    facts = [("Steps done", done, COUNT), ("Steps planned", total, COUNT)]
    if isinstance(total, int) and total > 0:
        facts.append(("Finished", done / total, "0.0%"))
    return [
        *facts,
        ("Images seen", _last(run.metrics.column("samples")), COUNT),
        ("Training time", _last(run.metrics.column("elapsed")), DURATION),
        ("Images per second (median)", _median(run.metrics.column("images_per_sec")), "0.00"),
        ("Checkpoints", len(run.checkpoints.rows), COUNT),
    ]


def _loss(run: Run) -> list[Fact]:
    metrics = run.metrics
    count = len(metrics.rows)
    tail = max(1, count // 10)
    steps, loss = metrics.column("step"), metrics.column("loss")
    repeated = metrics.repeated
    facts = [
        (f"Final {name}", _mean(metrics.column(name)[-tail:]), REAL)
        for name in ("loss", "mse", "vb", "grad_norm")
        if name not in repeated and (name != "vb" or np.isfinite(metrics.column(name)).any())
    ]
    if count:
        which = f"means of the last {tail:,} rows, steps {int(steps[-tail]):,} to {int(steps[-1]):,}"
        facts.append(("Final values are", which, GENERAL))
    smoothed = smooth(loss, half_window(count))
    if np.isfinite(smoothed).any():
        best = int(np.nanargmin(smoothed))
        facts.append(("Best smoothed loss", float(smoothed[best]), REAL))
        facts.append(("reached at step", int(steps[best]), COUNT))
    best = best_checkpoint(run.checkpoints)
    if best is not None:
        facts.append(("Best held-out loss", run.checkpoints.column(HELD_OUT_LOSS)[best], REAL))
        facts.append(("in the checkpoint of step", run.checkpoints.column("step")[best], COUNT))
    return facts


def best_checkpoint(checkpoints: Table) -> int | None:
    """The index of the row with the lowest held-out loss; None without such a loss."""
    loss = checkpoints.column(HELD_OUT_LOSS)
    finite = np.isfinite(loss)
    return int(np.argmin(np.where(finite, loss, np.inf))) if finite.any() else None


def _data(run: Run) -> list[Fact]:
    classes = run.data.get("classes")
    if isinstance(classes, dict):
        names = ", ".join(
            f"{name} {count:,}" if isinstance(count, int) else name for name, count in classes.items()
        )
        classes = f"{len(classes)}: {_shortened(names)}" if classes else "none"
    image_size, width = run.arguments.get("image_size"), run.arguments.get("image_width")
    if width:
        image_size = f"{width}x{image_size}"
    return [
        ("Source", run.data.get("source"), GENERAL),
        ("Images", run.data.get("images"), COUNT),
        ("Image size", image_size, GENERAL),
        ("Classes", classes, GENERAL),
    ]


def _training(run: Run) -> list[Fact]:
    given = run.arguments.get
    return [
        ("Parameters", run.model.get("parameters"), COUNT),
        ("Channels", given("num_channels"), GENERAL),
        ("Residual blocks", given("num_res_blocks"), GENERAL),
        ("Diffusion steps", run.diffusion_steps, COUNT),
        ("Noise schedule", given("noise_schedule"), GENERAL),
        ("Batch size", given("batch_size"), COUNT),
        ("Microbatch", given("microbatch"), GENERAL),
        ("Learning rate", given("lr"), SCIENTIFIC),
        ("EMA rates", given("ema_rate"), GENERAL),
        *_origin(run),
    ]


def _origin(run: Run) -> list[Fact]:
    """The facts about the model with whose weights the run started."""
    names = {"path": "Starts from", "step": "trained for steps", "taken": "Taken", "anew": "Began anew"}
    return [
        (label, run.origin[name], COUNT if name == "step" else GENERAL)
        for name, label in names.items()
        if run.origin.get(name)
    ]


def _machine(run: Run) -> list[Fact]:
    machine = run.machine.get
    cores = f"{machine('cores')} cores, {machine('threads')} threads used" if machine("cores") else None
    if machine("workers"):
        cores = f"{machine('workers')} of {machine('cores')} used, computing in {machine('precision')}"
        if machine("kernels"):
            cores += f" with kernels for {machine('kernels')}"
    versions = f"Python {machine('python')}, torch {machine('torch')}" if machine("python") else None
    resumed = [f"{session['step']:,}" for session in run.sessions[1:] if isinstance(session.get("step"), int)]
    sessions = f"{len(run.sessions)}, resumed at step {_shortened(', '.join(resumed))}" if resumed else "1"
    return [
        ("Processor", machine("processor"), GENERAL),
        ("Cores", cores, GENERAL),
        ("Memory (GB)", machine("memory_gb"), SHORT_REAL),
        ("System", machine("os"), GENERAL),
        ("Software", versions, GENERAL),
        ("Started", run.started, TIME),
        ("Sessions", sessions if run.sessions else None, GENERAL),
        (COMMAND, in_lines(run.command, WIDTHS[VALUE - 1] - 4) if run.command else None, GENERAL),
    ]


def in_lines(command: str, width: int) -> str:
    """Break a command into lines of at most `width` characters, with a backslash at each line end, for a shell.

    A flag stays on one line with its value. Words are not broken: one that is longer than `width` has its own line.
    """
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # an unclosed quotation mark
        return _shortened(command)
    parts: list[str] = []
    for word in words:
        if word.startswith("--") or not parts or not parts[-1].startswith("--") or " " in parts[-1]:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 1 + len(part) <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    if len(lines) > LINES_OF_COMMAND:
        lines[LINES_OF_COMMAND:] = ["..."]
    return " \\\n".join(lines)


def _shortened(text: str, length: int = 600) -> str:
    return text if len(text) <= length else text[:length] + " ..."


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None
