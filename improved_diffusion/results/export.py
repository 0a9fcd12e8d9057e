"""Turn the directory of a run, finished or still being written, into an Excel workbook."""

import io
import math
import os
from collections.abc import Sequence
from zipfile import ZIP_DEFLATED, ZipFile

from openpyxl import Workbook
from openpyxl.drawing.image import Image
from openpyxl.worksheet.pagebreak import Break
from openpyxl.worksheet.worksheet import Worksheet
from openpyxl.writer.excel import ExcelWriter
from PIL import Image as PillowImage

from improved_diffusion.results.charts import MAX_POINTS, chart_data, draw, half_window, plots_of
from improved_diffusion.results.columns import describe
from improved_diffusion.results.overview import CHART_COLUMN, fill_overview
from improved_diffusion.results.read import Run, Table, Value, read_run
from improved_diffusion.results.style import (
    INDENTED,
    SECTION,
    SUBTLE,
    TITLE,
    WRAPPED,
    put,
    put_header,
    set_row_height,
    set_up_page,
    set_widths,
)
from improved_diffusion.storage import absolute, open_atomic

MAX_PREVIEWS = 50
PIXELS_PER_ROW, PIXELS_PER_CHARACTER = 20, 7  # of heights and widths
PAGE_PIXELS = 1200  # so wide are the pictures on a printed page
PAGE_ROWS = 38  # which is then so high
ROWS_PER_CHART = 22
CHARTS_PER_ROW, COLUMNS_PER_CHART = 2, 13


def export(run_dir: str, output: str | None = None) -> str:
    """Write the workbook of the run in `run_dir` and return its absolute path.

    The run directory is only read, whatever state it is in: rows that cannot be read are left out and
    counted on the first sheet, and missing files are named there.

    :param output: the workbook's path; by default ``results.xlsx`` in `run_dir`. It appears complete or
        not at all: a workbook that was there before stays as it was when this one cannot be written.
    :raises ValueError: `run_dir` is not a run's directory, or `output` does not end in ``.xlsx``.
    :raises OSError: `output` cannot be written. On Windows that is so while Excel has it open.
    """
    run = read_run(run_dir)
    output = os.path.join(run.dir, "results.xlsx") if output is None else absolute(output)
    if not output.lower().endswith(".xlsx"):
        raise ValueError(f"--output {output}: the name of a workbook must end in .xlsx")

    book = Workbook()
    overview = book.active
    chart_row = fill_overview(overview, run)
    _fill_table(book.create_sheet("Metrics"), run.metrics, "No rows have been logged yet.")
    _add_charts(book, run.metrics, overview, chart_row)
    _fill_table(book.create_sheet("Checkpoints"), run.checkpoints, "No checkpoint has been saved yet.")
    if run.evaluations.rows:
        _fill_table(book.create_sheet("Evaluation"), run.evaluations, "")
    if run.previews:
        _fill_samples(book.create_sheet("Samples"), run.previews)
    _fill_arguments(book.create_sheet("Arguments"), run.arguments)
    _fill_explained(book.create_sheet("Explained"), run)
    if "Smoothed" in book.sheetnames:  # last, as the least interesting
        book.move_sheet("Smoothed", len(book.sheetnames))
    # As `book.save`, except that the archive is closed before the file when a signal ends this in the middle.
    with open_atomic(output) as file, ZipFile(file, "w", ZIP_DEFLATED) as archive:
        ExcelWriter(book, archive).save()
    return output


def _fill_table(sheet: Worksheet, table: Table, if_empty: str) -> None:
    """Every row of `table` under a header with filters."""
    set_up_page(sheet)
    if not table.rows:
        put(sheet, 1, 1, if_empty).font = SUBTLE
        return
    _put_rows(sheet, 1, table.columns, table.rows)
    sheet.auto_filter.ref = sheet.dimensions


def _put_rows(sheet: Worksheet, header_row: int, titles: list[str], rows: Sequence[Sequence[Value]]) -> None:
    """A header and the rows below it, each column as wide and in the number format that it needs."""
    put_header(sheet, header_row, titles)
    formats = [describe(title.removesuffix(" (smoothed)")).number_format for title in titles]
    for row_number, row in enumerate(rows, start=header_row + 1):
        for column, (value, number_format) in enumerate(zip(row, formats), start=1):
            if value is not None:
                cell = put(sheet, row_number, column, value, number_format)
                if isinstance(value, str):
                    cell.alignment = INDENTED
    set_widths(sheet, [_width(title, [row[column] for row in rows]) for column, title in enumerate(titles)])


def _width(title: str, values: Sequence[Value]) -> float:
    """The width that shows `title`, beside it the button of its filter, and `values`, within limits."""
    longest_text = max((len(str(value)) for value in values if not isinstance(value, int | float)), default=0)
    return min(max(12, len(title) + 5, longest_text + 2), 80)


def _add_charts(book: Workbook, metrics: Table, overview: Worksheet, overview_row: int) -> None:
    """The sheets `Charts` and `Smoothed`, whose numbers the charts draw, and the loss on the first sheet."""
    sheet = book.create_sheet("Charts")
    sheet.sheet_view.showGridLines = False
    set_up_page(sheet, pages_high=1)
    put(sheet, 1, 1, "Charts").font = TITLE
    plots = plots_of(metrics)
    if not plots:
        put(sheet, 2, 1, "No numbers have been logged yet.").font = SUBTLE
        return

    titles, points = chart_data(metrics, plots)
    numbers = book.create_sheet("Smoothed")
    explanation = _explain_points(len(metrics.rows), len(points))
    put(sheet, 2, 1, explanation).font = SUBTLE
    put(numbers, 1, 1, f"What the charts draw. {explanation}").font = SUBTLE
    header_row = 2
    cells = [[None if math.isnan(value) else value for value in row] for row in points.tolist()]
    _put_rows(numbers, header_row, titles, cells)
    set_up_page(numbers)

    for number, plot in enumerate(plots):
        row, column = divmod(number, CHARTS_PER_ROW)
        anchor = sheet.cell(4 + ROWS_PER_CHART * row, 1 + COLUMNS_PER_CHART * column).coordinate
        sheet.add_chart(draw(plot, numbers, titles, points, header_row), anchor)
    overview.add_chart(draw(plots[0], numbers, titles, points, header_row), f"{CHART_COLUMN}{overview_row}")


def _explain_points(rows: int, points: int) -> str:
    text = (
        f"Smoothed values are means over up to {half_window(rows)} rows on either side; of fewer "
        "near the first row."
    )
    if points < rows:
        text += f" To keep Excel quick, {MAX_POINTS:,} evenly chosen rows of {rows:,} are drawn."
    return text


def _fill_samples(sheet: Worksheet, previews: list[tuple[int, str]]) -> None:
    """The pictures, the newest first, each below its step; as many beside each other as a page is wide."""
    sheet.sheet_view.showGridLines = False
    set_up_page(sheet)
    put(sheet, 1, 1, "Samples").font = TITLE
    if len(previews) > MAX_PREVIEWS:
        put(sheet, 2, 1, f"The newest {MAX_PREVIEWS} of {len(previews)}.").font = SUBTLE
    shown = [(step, path, _read_picture(path)) for step, path in previews[:MAX_PREVIEWS]]
    sizes = [(picture.width, picture.height) for *_, picture in shown if picture] or [(PAGE_PIXELS, 0)]
    columns = max(1, PAGE_PIXELS // (max(width for width, _ in sizes) + PIXELS_PER_ROW))
    set_widths(sheet, [PAGE_PIXELS / columns / PIXELS_PER_CHARACTER] * columns)
    rows = math.ceil(max(height for _, height in sizes) / PIXELS_PER_ROW) + 3
    first, page = 4, 1
    for number, (step, path, picture) in enumerate(shown):
        row, column = first + number // columns * rows, 1 + number % columns
        if row + rows > page + PAGE_ROWS and column == 1 and number:
            sheet.row_breaks.append(Break(row - 1))
            page = row
        put(sheet, row, column, f"Step {step:,}").font = SECTION
        if picture is None:
            put(sheet, row + 1, column, f"{os.path.basename(path)} cannot be read.").font = SUBTLE
        else:
            sheet.add_image(picture, sheet.cell(row + 1, column).coordinate)


def _read_picture(path: str) -> Image | None:
    """The picture for the workbook; None when it cannot be decoded, or is still being written."""
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
        with PillowImage.open(content) as picture:
            picture.load()
        return Image(content)
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError):
        return None


def _fill_arguments(sheet: Worksheet, arguments: dict) -> None:
    """Every flag and its value, in alphabetical order."""
    set_up_page(sheet)
    if not arguments:
        put(sheet, 1, 1, "The arguments of this run are not known.").font = SUBTLE
        return
    put_header(sheet, 1, ["Flag", "Value"])
    set_widths(sheet, [30, 80])
    for row, (flag, value) in enumerate(sorted(arguments.items()), start=2):
        put(sheet, row, 1, f"--{flag}").alignment = WRAPPED
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        put(sheet, row, 2, value if is_number else str(value)).alignment = WRAPPED
    sheet.auto_filter.ref = sheet.dimensions


def _fill_explained(sheet: Worksheet, run: Run) -> None:
    """Every column in words: what it is, its unit, what is normal."""
    set_up_page(sheet)
    put_header(sheet, 1, ["Column", "Unit", "What it is", "What is normal"])
    widths = [18, 22, 70, 70]
    set_widths(sheet, widths)
    names = dict.fromkeys(run.metrics.columns + run.checkpoints.columns + run.evaluations.columns)
    for row, name in enumerate(names, start=2):
        column = describe(name, run.diffusion_steps)
        texts = [name, column.unit, column.meaning, column.normal]
        for number, text in enumerate(texts, start=1):
            put(sheet, row, number, text).alignment = WRAPPED
        set_row_height(sheet, row, list(zip(texts, widths)))
