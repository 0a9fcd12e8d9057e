"""The comparison of runs as one workbook and one picture."""

import io
from collections.abc import Sequence

import blobfile as bf
import numpy as np
from openpyxl import Workbook
from openpyxl.drawing.image import Image as SheetImage
from openpyxl.worksheet.worksheet import Worksheet
from PIL import Image

from improved_diffusion.comparison import runs as compare
from improved_diffusion.comparison.picture import SEAM, side_by_side
from improved_diffusion.comparison.runs import Chart, Compared
from improved_diffusion.results.charts import draw
from improved_diffusion.results.columns import title_of
from improved_diffusion.results.figures import Dot, Path, Shape, Text, chart, text_width, to_picture
from improved_diffusion.results.read import Table
from improved_diffusion.results.style import (
    NOTE,
    SECTION,
    SUBTLE,
    TITLE,
    WRAPPED,
    clean,
    make_table,
    place_picture,
    put,
    put_header,
    set_row_height,
    set_up_page,
    set_widths,
    table_titles,
)
from improved_diffusion.results.tables import PRINTED_ROWS, as_cell, place_charts, put_rows
from improved_diffusion.results.workbook import save_workbook
from improved_diffusion.storage import open_atomic

WORKBOOK, PICTURE = "runs.xlsx", "runs.png"
FIGURE = (440, 300)  # a chart of the picture, in pixels
PER_ROW = len(compare.WAYS)
MARGIN, LINE, LARGEST_SIDE = 12, 22, 128  # in pixels; images are enlarged or shrunk to the last
# The columns of the tables that have the number format of another one.
FORMATS = {
    "run": "files",
    "hours": "loss",
    "steps done": "step",
    "steps planned": "step",
    "parameters": "step",
    "best at step": "step",
    "evaluations": "step",
}


def write_workbook(path: str, compared: Sequence[Compared], notes: Sequence[str]) -> None:
    """Write the workbook. :param notes: on all runs (see `compare.general_notes`)."""
    book = Workbook()
    book.properties.title, book.properties.creator = "Runs side by side", "improved_diffusion"
    first = book.active
    first.title = "Runs"
    _fill_runs(first, compared, notes)
    curves = compare.learning_curves(compared)
    heldout = compare.heldout_losses(compared)
    measured = compare.evaluations(compared)
    _fill(
        book,
        "Curves",
        "Learning curves",
        curves,
        compare.curve_charts(curves, compared),
        "No run has logged any rows.",
    )
    losses = compare.heldout_charts(heldout, compared)
    _fill(
        book,
        "HeldOut",
        "Held-out loss",
        heldout,
        losses,
        "No run has measured a held-out loss (--heldout_dir).",
    )
    distances = compare.evaluation_charts(measured, compared)
    nothing = "No evaluation is recorded (image_eval.py --run_dir)."
    _fill(book, "Evaluations", "Evaluations", measured, distances, nothing)
    _fill_samples(book.create_sheet("Samples"), compared)
    _fill_flags(book.create_sheet("Flags"), compare.differing_flags(compared))
    save_workbook(book, path)


def write_picture(path: str, compared: Sequence[Compared]) -> None:
    """Write the picture: the charts, and below them what each run has drawn."""
    curves, heldout = compare.learning_curves(compared), compare.heldout_losses(compared)
    measured = compare.evaluations(compared)
    charts = [
        *compare.curve_charts(curves, compared),
        *compare.heldout_charts(heldout, compared),
        *compare.evaluation_charts(measured, compared),
    ]
    parts = [_legend(compared), *_panels(charts, {one.name for one in compared}), *_strips(compared)]
    width, height = max(part.width for part in parts), sum(part.height for part in parts)
    picture = Image.new("RGB", (width, height + MARGIN), "white")
    top = 0
    for part in parts:
        picture.paste(part, (0, top))
        top += part.height
    with open_atomic(path) as file:
        picture.save(file, format="PNG")


def _fill_runs(sheet: Worksheet, compared: Sequence[Compared], notes: Sequence[str]) -> None:
    """A row for each run, and below it what to keep in mind."""
    set_up_page(sheet, pages_high=1)
    table = compare.summary(compared)
    _put_table(sheet, table)
    row = len(table.rows) + 3
    put(sheet, row, 1, "Loss and mse are the last values of the smoothed curves.").font = SUBTLE
    row += 2
    for title, lines in [("All runs", notes), *((one.name, one.notes) for one in compared)]:
        if lines:
            put(sheet, row, 1, title).font = SECTION
            for line in lines:
                row += 1
                put(sheet, row, 1, line).font = NOTE
            row += 2


def _fill(book: Workbook, name: str, title: str, table: Table, charts: Sequence[Chart], nothing: str) -> None:
    """The charts on a sheet of their own; `name` has the numbers that they draw."""
    shown = book.create_sheet(f"{name}Charts") if charts else None
    sheet = book.create_sheet(name)
    set_up_page(sheet, pages_high=1 if len(table.rows) <= PRINTED_ROWS else 0)
    if not table.rows:
        put(sheet, 1, 1, nothing).font = SUBTLE
        return
    _put_table(sheet, table)
    if shown is not None:
        shown.sheet_view.showGridLines = False
        set_up_page(shown, pages_high=1)
        put(shown, 1, 1, title).font = TITLE
        drawn = [
            draw(sheet, one.title, one.y_title, one.scale, one.lines, x_title=one.x_title) for one in charts
        ]
        place_charts(shown, drawn, 3, PER_ROW)


def _put_table(sheet: Worksheet, table: Table) -> None:
    titles = [title_of(name) for name in table.columns]
    put_rows(sheet, 1, titles, [FORMATS.get(name, name) for name in table.columns], table.rows)


def _fill_samples(sheet: Worksheet, compared: Sequence[Compared]) -> None:
    """What each run has drawn, below its name."""
    sheet.sheet_view.showGridLines = False
    set_up_page(sheet, pages_high=1)
    put(sheet, 1, 1, "The same noise, drawn by each run").font = TITLE
    row = 3
    for one in compared:
        put(sheet, row, 1, one.name).font = SECTION
        put(sheet, row + 1, 1, one.weights or "Nothing was drawn.").font = SUBTLE
        if one.images is not None:
            strip = _strip(one.images)
            content = io.BytesIO()
            strip.save(content, format="PNG")
            picture = SheetImage(content)
            place_picture(sheet, row + 2, 1, picture, f"Images drawn by {clean(one.name)}")
            row += strip.height // 20 + 1
        row += 4


def _fill_flags(sheet: Worksheet, table: Table) -> None:
    """The flags and facts in which the runs differ."""
    set_up_page(sheet, pages_high=1)
    if not table.rows:
        put(sheet, 1, 1, "The runs have the same flags, data and machines.").font = SUBTLE
        return
    titles = table_titles(table.columns)
    put_header(sheet, 1, titles)
    widths = [30, *[26] * (len(titles) - 1)]
    set_widths(sheet, widths)
    for number, row in enumerate(table.rows, start=2):
        for column, value in enumerate(row, start=1):
            put(sheet, number, column, as_cell(value)).alignment = WRAPPED
        set_row_height(sheet, number, [(str(value), width) for value, width in zip(row, widths)])
    make_table(sheet, 1, titles, len(table.rows))


def _legend(compared: Sequence[Compared]) -> Image.Image:
    """The name of each run beside the stroke that stands for it."""
    shapes: list[Shape] = []
    width, x, y = PER_ROW * FIGURE[0], MARGIN, LINE
    for one in compared:
        name = clean(one.name)
        needed = 30 + text_width(name) + 24
        if x > MARGIN and x + needed > width:
            x, y = MARGIN, y + LINE
        shapes.append(Path(np.array([[x, y - 4.0], [x + 22.0, y - 4.0]]), one.colour, 3, one.dashed))
        shapes.append(Text(x + 30, y, name))
        x += needed
    return to_picture(shapes, (width, y + MARGIN))


def _panels(charts: Sequence[Chart], names: set[str]) -> list[Image.Image]:
    """The charts, `PER_ROW` beside each other; only where a line is not simply a run, a chart names its lines."""
    rows = []
    for start in range(0, len(charts), PER_ROW):
        row = Image.new("RGB", (PER_ROW * FIGURE[0], FIGURE[1]), "white")
        for column, one in enumerate(charts[start : start + PER_ROW]):
            legend = any(line.title not in names for line in one.lines)
            shapes = chart(
                one.title, one.y_title, one.scale, one.lines, size=FIGURE, x_title=one.x_title, legend=legend
            )
            row.paste(to_picture(shapes, FIGURE), (column * FIGURE[0], 0))
        rows.append(row)
    return rows


def _strips(compared: Sequence[Compared]) -> list[Image.Image]:
    """For each run its name and, below, its images."""
    parts = []
    for one in compared:
        strip = None if one.images is None else _strip(one.images)
        text = clean(one.name) + ("" if strip else ": nothing was drawn")
        width = max(strip.width if strip else 0, text_width(text, 15) + 30) + 2 * MARGIN
        shapes = [Dot(MARGIN + 6, LINE + 1, 6, one.colour), Text(MARGIN + 20, LINE + 6, text, 15)]
        part = to_picture(shapes, (width, LINE + MARGIN + (strip.height if strip else 0) + MARGIN))
        if strip is not None:
            part.paste(strip, (MARGIN, LINE + MARGIN))
        parts.append(part)
    return parts


def _strip(images: np.ndarray) -> Image.Image:
    """Images in a row, about as large as `LARGEST_SIDE`, whatever their size."""
    strip = Image.fromarray(side_by_side(images, LARGEST_SIDE))
    side = (strip.width + SEAM) // len(images) - SEAM
    if side > LARGEST_SIDE:
        factor = LARGEST_SIDE / side
        strip = strip.resize(
            (round(strip.width * factor), round(strip.height * factor)), Image.Resampling.LANCZOS
        )
    return strip


def paths(out_dir: str) -> tuple[str, str]:
    """Where workbook and picture are."""
    return bf.join(out_dir, WORKBOOK), bf.join(out_dir, PICTURE)
