"""Any number of runs side by side: what their records say of them, in tables with a row's run in the first column."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from improved_diffusion.results.charts import AUTO, FITTED, HOURS, PALETTE, Line, half_window, smooth
from improved_diffusion.results.columns import BEST, HELD_OUT, HELD_OUT_LOSS
from improved_diffusion.results.evaluations import EVALUATION_CHARTS, comparable
from improved_diffusion.results.overview import best_checkpoint
from improved_diffusion.results.read import EVALUATED, SOURCES, Run, Table, Value, read_run
from improved_diffusion.storage import absolute

POINTS = 500  # of a run's learning curve
# The columns to draw over, and the titles of their axes.
WAYS = {"step": "step", "samples": "images seen", "hours": HOURS}
# Flags that say where a run is and how it was watched, not what it has learned.
OF_NO_INTEREST = {"log_dir"}
# With other values of these, loss and mse are errors of something else.
OBJECTIVE = (
    *("predict_xstart", "prediction", "loss_weighting", "use_kl", "learn_sigma"),
    *("noise_schedule", "diffusion_steps", "schedule_sampler", "sigma_mean", "sigma_std", "uniform_share"),
)
UNKNOWN = "not recorded"


@dataclass
class Compared:
    """A run and what is said of it.

    :ivar name: short, and unlike those of the others.
    :ivar notes: what is missing, or to keep in mind. :ivar weights: the file that drew its images, if any did.
    :ivar images: what it has drawn, uint8 [N, S, S, 3].
    """

    name: str
    run: Run
    colour: str
    dashed: bool
    notes: list[str] = field(default_factory=list)
    weights: str = ""
    images: np.ndarray | None = None


class Chart(NamedTuple):
    """A chart of a table: its title, the label and the scale of its y axis, its x axis, and its lines."""

    title: str
    y_title: str
    scale: str
    x_title: str
    lines: list[Line]


def read_runs(paths: Sequence[str]) -> list[Compared]:
    """Read the directories of runs, finished or not.

    :raises ValueError: none is given, one twice, or one is not the directory of a run.
    """
    if not paths:
        raise ValueError("give the directories of the runs to compare: compare_runs.py RUN RUN")
    found = [absolute(path) for path in paths]
    for path in found:
        if found.count(path) > 1:
            raise ValueError(f"{path}: is given twice")
    runs = [read_run(path) for path in found]
    compared = []
    for number, (name, run) in enumerate(zip(_short_names(found), runs)):
        colour, dashed = PALETTE[number % len(PALETTE)], number // len(PALETTE) % 2 == 1
        compared.append(Compared(name, run, colour, dashed, _notes_on(run)))
    return compared


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of `paths`, as many as tell them apart."""
    parts = [path.split(os.sep) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len({name.casefold() for name in names}) == len(names):
            return names
    return list(paths)  # they differ in upper and lower case only


def _notes_on(run: Run) -> list[str]:
    notes = list(run.notes)
    steps = run.metrics.column("step")
    done, total = int(steps.max(initial=0)), run.arguments.get("total_steps")
    if not len(steps):
        notes.append("No rows have been logged yet: it has no learning curve.")
    elif isinstance(total, int) and done < total:
        notes.append(f"Unfinished: {done:,} of {total:,} steps.")
    if not np.isfinite(run.checkpoints.column(HELD_OUT_LOSS)).any():
        notes.append("No held-out loss was measured (--heldout_dir).")
    if not run.evaluations.rows:
        notes.append("No evaluation is recorded (image_eval.py --run_dir).")
    elif not np.isfinite(run.evaluations.column("step")).any():
        notes.append("Its evaluations name no step, so that no chart shows them.")
    return notes


def general_notes(compared: Sequence[Compared]) -> list[str]:
    """What to keep in mind with the numbers of all runs."""
    notes = []
    differing = {row[0] for row in differing_flags(compared).rows}
    objective = [f"--{name}" for name in OBJECTIVE if f"--{name}" in differing]
    if objective:
        notes.append(
            f"The runs differ in {', '.join(objective)}: their loss and mse are errors of different tasks. Compare "
            "held-out losses and evaluations instead."
        )
    sizes = {run.arguments.get("image_size", run.arguments.get("large_size")) for run in _runs(compared)}
    if len(sizes) > 1:
        notes.append(
            "The runs differ in the size of their images: losses, distances and noise are those of different images."
        )
    measured = {
        (run.arguments.get("heldout_dir"), run.data.get("source"))
        for run in _runs(compared)
        if np.isfinite(run.checkpoints.column(HELD_OUT_LOSS)).any()
    }
    if len(measured) > 1:
        notes.append(
            "The runs differ in their data: their held-out losses may be errors on different images."
        )
    return notes


def _runs(compared: Sequence[Compared]) -> list[Run]:
    return [one.run for one in compared]


def summary(compared: Sequence[Compared]) -> Table:
    """A row for each run."""
    columns = [
        *(
            "run",
            "steps done",
            "steps planned",
            "samples",
            "hours",
            "images_per_sec",
            "parameters",
            "image size",
        ),
        *(
            "loss",
            "mse",
            HELD_OUT_LOSS,
            f"{BEST} at step",
            "evaluations",
            "processor",
            "computing",
            "directory",
        ),
    ]
    rows = []
    for one in compared:
        run, metrics = one.run, one.run.metrics
        best = best_checkpoint(run.checkpoints)
        machine, arguments = run.machine.get, run.arguments
        computing = f"{machine('precision')}, {machine('workers')} cores" if machine("workers") else None
        rows.append(
            [
                one.name,
                int(metrics.column("step").max(initial=0)),
                _cell(arguments.get("total_steps")),
                _last(metrics.column("samples")),
                _last(metrics.column("elapsed") / 3600),
                _median(metrics.column("images_per_sec")),
                _cell(run.model.get("parameters")),
                _cell(arguments.get("image_size", arguments.get("large_size"))),
                _last(_smoothed(metrics, "loss")),
                _last(_smoothed(metrics, "mse")),
                None if best is None else float(run.checkpoints.column(HELD_OUT_LOSS)[best]),
                None if best is None else float(run.checkpoints.column("step")[best]),
                len(run.evaluations.rows),
                _cell(machine("processor")),
                computing,
                run.dir,
            ]
        )
    return Table(columns, rows)


def learning_curves(compared: Sequence[Compared]) -> Table:
    """Smoothed loss and mse: of each run `POINTS` rows at the most."""
    rows = []
    for one in compared:
        metrics = one.run.metrics
        columns = [metrics.column("step"), metrics.column("samples"), metrics.column("elapsed") / 3600]
        columns += [_smoothed(metrics, name) for name in ("loss", "mse")]
        count = len(metrics.rows)
        chosen = np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(np.int64))
        rows += [[one.name, *map(_cell, values)] for values in np.stack(columns, axis=1)[chosen].tolist()]
    return Table(["run", *WAYS, "loss", "mse"], rows)


def heldout_losses(compared: Sequence[Compared]) -> Table:
    """A row for each checkpoint with a held-out loss, and a column for each of its noise levels."""
    names = [name for run in _runs(compared) for name in run.checkpoints.columns if name.startswith(HELD_OUT)]
    names = list(dict.fromkeys([HELD_OUT_LOSS, *names]))
    rows = []
    for one in compared:
        table = one.run.checkpoints
        columns = [table.column("step"), table.column("samples"), table.column("elapsed") / 3600]
        columns += [table.column(name) for name in names]
        for values in np.stack(columns, axis=1).tolist():
            if math.isfinite(values[len(WAYS)]):
                rows.append([one.name, *map(_cell, values)])
    return Table(["run", *WAYS, *names], rows)


def evaluations(compared: Sequence[Compared]) -> Table:
    """What image_eval.py has recorded of all runs, with the images seen and the hours until the step."""
    fixed = ["run", *WAYS, *(name for name in EVALUATED if name != "step")]
    found = [name for run in _runs(compared) for name in run.evaluations.columns]
    last = [name for name in SOURCES if name != "notes"]
    metrics = [name for name in dict.fromkeys(found) if name not in (*fixed, *SOURCES)]
    columns = [*fixed, *metrics, *last]
    rows = []
    for one in compared:
        table, progress = one.run.evaluations, one.run.metrics
        for row in table.rows:
            cells = dict(zip(table.columns, row))
            step = cells.get("step")
            cells["run"] = one.name
            cells["samples"] = _at(step, progress.column("step"), progress.column("samples"))
            cells["hours"] = _at(step, progress.column("step"), progress.column("elapsed") / 3600)
            rows.append([cells.get(name) for name in columns])
    return Table(columns, rows)


def differing_flags(compared: Sequence[Compared]) -> Table:
    """The flags in which the runs differ, and what else may explain a difference; a column for each run.

    A flag that an earlier version did not know yet counts as its default.
    """
    runs = _runs(compared)
    defaults = {name: value for run in runs for name, value in run.defaults.items()}
    rows = []
    for name in sorted({name for run in runs for name in run.arguments} - OF_NO_INTEREST):
        # Of a run without any record, nothing is known.
        values = [
            run.arguments.get(name, defaults.get(name, UNKNOWN)) if run.arguments else UNKNOWN for run in runs
        ]
        if len({repr(value) for value in values}) > 1:
            rows.append([f"--{name}", *values, defaults.get(name)])
    facts = {
        "data: source": [run.data.get("source") for run in runs],
        "data: images": [run.data.get("images") for run in runs],
        "model: parameters": [run.model.get("parameters") for run in runs],
        **{
            f"machine: {name}": [run.machine.get(name) for run in runs]
            for name in ("processor", "cores", "workers", "precision", "kernels", "torch")
        },
    }
    for name, values in facts.items():
        if len({repr(value) for value in values}) > 1:
            rows.append([name, *(UNKNOWN if value is None else value for value in values), None])
    return Table(["flag or fact", *(one.name for one in compared), "default"], rows)


def charts_of(
    table: Table, compared: Sequence[Compared], plots: Sequence[tuple[str, str, str]]
) -> list[Chart]:
    """A chart over the steps, the images seen and the hours for each of `plots`, as far as there are numbers.

    :param table: its first column is the run, whose rows follow each other; then come the columns `WAYS`.
    :param plots: title, column and scale of each.
    """
    charts = []
    for title, column, scale in plots:
        for way, x_title in WAYS.items():
            lines = []
            for one in compared:
                rows = [number for number, row in enumerate(table.rows) if row[0] == one.name]
                part = slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
                line = _line(table, way, column, part, one.name, one, markers=column == HELD_OUT_LOSS)
                lines += [line] if np.isfinite(line.x + line.y).any() else []
            if lines:
                charts.append(Chart(f"{title} over {x_title}", column, scale, x_title, lines))
    return charts


def curve_charts(table: Table, compared: Sequence[Compared]) -> list[Chart]:
    """The charts of `learning_curves`: those of mse only where it is not the loss."""
    plots = [("Loss (smoothed)", "loss", AUTO)]
    if not np.array_equal(table.column("loss"), table.column("mse"), equal_nan=True):
        plots.append(("Mse (smoothed)", "mse", AUTO))
    return charts_of(table, compared, plots)


def heldout_charts(table: Table, compared: Sequence[Compared]) -> list[Chart]:
    """The charts of `heldout_losses`."""
    return charts_of(table, compared, [("Held-out loss", HELD_OUT_LOSS, FITTED)])


def evaluation_charts(table: Table, compared: Sequence[Compared]) -> list[Chart]:
    """The charts of `evaluations`. A line has the colour of its run; only its first one is not dashed."""
    known = {one.name: one for one in compared}
    charts = []
    for title, metrics in EVALUATION_CHARTS:
        for metric in metrics:
            for way, x_title in WAYS.items():
                lines, seen = [], set()
                for name, part in comparable(table, table.column(way), table.column(metric), first="run"):
                    one = known[table.rows[part.start][0]]
                    line = _line(table, way, metric, part, name, one, markers=True)
                    lines.append(line._replace(dashed=one.dashed or one.name in seen))
                    seen.add(one.name)
                if lines:
                    charts.append(Chart(f"{title} over {x_title}", metric, FITTED, x_title, lines))
    return charts


def _line(table: Table, way: str, column: str, part: slice, name: str, one: Compared, markers: bool) -> Line:
    x_column, y_column = (1 + table.columns.index(title) for title in (way, column))
    x, y = table.column(way)[part], table.column(column)[part]
    return Line(name, one.colour, x_column, y_column, 2 + part.start, x, y, True, markers, one.dashed)


def _smoothed(metrics: Table, name: str) -> np.ndarray:
    return smooth(metrics.column(name), half_window(len(metrics.rows)))


def _at(step: Value, steps: np.ndarray, values: np.ndarray) -> float | None:
    """What `values` were at `step`; None before the first row and after the last."""
    known = np.isfinite(values)
    if not isinstance(step, int | float) or not known.any() or not step <= steps[known].max():
        return None
    return float(np.interp(step, [0.0, *steps[known]], [0.0, *values[known]]))


def _cell(value) -> Value:
    """`value` as a cell of a table, which knows neither NaN nor what is no number or text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else str(value)
    return value if math.isfinite(value) else None


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None
