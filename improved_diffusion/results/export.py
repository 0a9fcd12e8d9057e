"""The export of a run, which may be unfinished, to an Excel workbook or a web page."""

import math
import os
from collections.abc import Callable

from openpyxl import Workbook
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.charts import (
    FITTED,
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Plot,
    chart_data,
    draw,
    half_window,
    lines_of,
    plots_of,
)
from improved_diffusion.results.columns import BEST, HELD_OUT_LOSS, describe, title_of
from improved_diffusion.results.evaluations import evaluation_plots, heldout_plots
from improved_diffusion.results.overview import (
    RIGHT,
    best_checkpoint,
    fill_overview,
    link_sheets,
)
from improved_diffusion.results.page import write_page
from improved_diffusion.results.read import Run, Table, read_run
from improved_diffusion.results.samples import description_of, fill_samples, newest_picture
from improved_diffusion.results.style import (
    BOLD,
    MARK_FILL,
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
    row_below,
    set_row_height,
    set_up_page,
    set_widths,
)
from improved_diffusion.results.tables import (
    CHARTS_PER_ROW,
    COLUMNS_PER_CHART,
    PRINTED_ROWS,
    ROWS_PER_CHART,
    as_cell,
    place_charts,
    print_last_rows,
    put_rows,
)
from improved_diffusion.results.workbook import save_workbook
from improved_diffusion.storage import absolute

WORKBOOK, PAGE = "results.xlsx", "index.html"
HALF_CHART = (376, 376)  # size in pixels of the picture and the small chart on the first sheet
HALF_COLUMNS = 6  # their width in columns


def export(run_dir: str, output: str | None = None) -> str:
    """Write the workbook of the run in `run_dir`, or its web page.

    No other file is changed. Rows that cannot be read are left out. The report gives their number, and the names of
    missing files.

    :param output: the path of a workbook (``.xlsx``) or a page (``.html``); by default ``results.xlsx`` in `run_dir`.
        If it cannot be written, an older report stays as it was.
    :return: the absolute path of the report.
    :raises ValueError: `run_dir` is not the directory of a run, or `output` has another ending.
    :raises OSError: `output` cannot be written. On Windows this happens if it is open in Excel.
    """
    run = read_run(run_dir)
    output = os.path.join(run.dir, WORKBOOK) if output is None else absolute(output)
    write = {".xlsx": write_workbook, ".html": write_page}.get(os.path.splitext(output)[1].lower())
    if write is None:
        raise ValueError(f"{output}: the name must end in .xlsx, for a workbook, or in .html, for a page")
    write(run, output)
    return output


def export_all(
    run_dir: str, check_folder: Callable[[], object] = lambda: None
) -> tuple[list[str], list[tuple[str, Exception]]]:
    """Write the page and the workbook of the run in `run_dir` into this directory. If one fails, write the other.

    :param check_folder: called before each is written. Raises an OSError if it must not be written.
    :return: the paths of the written reports; the names of the failed ones, with the errors.
    :raises ValueError, OSError: as `read_run`.
    """
    run = read_run(run_dir)
    written, failed = [], []
    for name, what, write in ((PAGE, "page", write_page), (WORKBOOK, "workbook", write_workbook)):
        path = os.path.join(run.dir, name)
        try:
            write(run, path, check_folder)
            written.append(path)
        except Exception as error:  # an error in one report must not prevent the other
            failed.append((what, error))
    return written, failed


def write_workbook(run: Run, output: str, check_folder: Callable[[], object] = lambda: None) -> None:
    """Write the workbook of `run` into the file `output`, once `check_folder` has not raised an error."""
    book = Workbook()
    book.properties.title = clean(f"Training run {os.path.basename(run.dir)}")
    book.properties.creator = "improved_diffusion"
    overview = book.active
    free_row = fill_overview(overview, run)
    _fill_metrics(book.create_sheet("Metrics"), run.metrics)
    _add_charts(book, run, overview, free_row)
    _fill_checkpoints(book.create_sheet("Checkpoints"), run.checkpoints)
    if run.evaluations.rows:
        _fill_evaluations(book.create_sheet("Evaluation"), run.evaluations, run.evaluation_notes)
    if run.previews:
        fill_samples(book.create_sheet("Samples"), run.previews)
    _fill_arguments(book.create_sheet("Arguments"), run.arguments, run.defaults)
    _fill_explained(book.create_sheet("Explained"), run)
    if "Smoothed" in book.sheetnames:  # last, because it is the least interesting
        book.move_sheet("Smoothed", len(book.sheetnames))
    link_sheets(overview, book.sheetnames[1:])
    save_workbook(book, output, check_folder)


def _fill_metrics(sheet: Worksheet, metrics: Table) -> None:
    """Fill the sheet with all logged rows. Columns that are equal to others are hidden."""
    set_up_page(sheet, pages_high=1)
    if not metrics.rows:
        put(sheet, 1, 1, "No rows have been logged yet.").font = SUBTLE
        return
    put_rows(sheet, 1, [title_of(name) for name in metrics.columns], metrics.columns, metrics.rows)
    for name in metrics.repeated:
        sheet.column_dimensions[get_column_letter(metrics.columns.index(name) + 1)].hidden = True
    print_last_rows(sheet, 1, len(metrics.rows), len(metrics.columns))


def _add_charts(book: Workbook, run: Run, overview: Worksheet, free_row: int) -> None:
    """Add the sheets `Charts` and `Smoothed`, which has the numbers for the charts.

    The chart of the loss and the newest picture are also on the first sheet, from `free_row` on.
    """
    sheet = book.create_sheet("Charts")
    sheet.sheet_view.showGridLines = False
    set_up_page(sheet, pages_high=1)
    put(sheet, 1, 1, "Charts").font = TITLE
    metrics = run.metrics
    plots = plots_of(metrics)
    if not plots:
        put(sheet, 2, 1, "No numbers have been logged yet.").font = SUBTLE
        _add_newest_picture(overview, run, free_row)
        return

    titles, points = chart_data(metrics, plots)
    curves = {curve.title: curve.column for plot in plots for curve in plot.curves}
    numbers = book.create_sheet("Smoothed")
    explanation = _explain_points(len(metrics.rows), len(points))
    put(sheet, 2, 1, explanation).font = SUBTLE
    put(numbers, 1, 1, f"What the charts draw. {explanation}").font = SUBTLE
    header_row = 2
    cells = [[None if math.isnan(value) else value for value in row] for row in points.tolist()]
    set_up_page(numbers, pages_high=1)
    put_rows(numbers, header_row, titles, ["step", *curves.values()], cells)
    print_last_rows(numbers, header_row, len(cells), len(titles))

    def chart(plot: Plot, size: tuple[int, int] = (WIDTH, HEIGHT)):
        lines = lines_of(plot, titles, points, header_row)
        return draw(numbers, plot.title, plot.y_title, plot.scale, lines, not plot.first_step, size)

    for number, plot in enumerate(plots):
        row, column = divmod(number, CHARTS_PER_ROW)
        anchor = sheet.cell(4 + ROWS_PER_CHART * row, 1 + COLUMNS_PER_CHART * column).coordinate
        sheet.add_chart(chart(plot), anchor)
    overview.add_chart(chart(plots[0]), overview.cell(free_row, RIGHT).coordinate)
    below = row_below(overview, free_row, HEIGHT) + 1
    has_picture = _add_newest_picture(overview, run, below)
    late = next((plot for plot in plots if plot.first_step), None)
    if late is not None:
        column = RIGHT + HALF_COLUMNS if has_picture else RIGHT
        size = HALF_CHART if has_picture else (WIDTH, HEIGHT)
        overview.add_chart(chart(late, size), overview.cell(below + has_picture, column).coordinate)


def _add_newest_picture(sheet: Worksheet, run: Run, row: int) -> bool:
    """Add the newest picture and its step. :return: whether there is one."""
    newest = newest_picture(run.previews)
    if newest is None:
        return False
    step, picture = newest
    put(sheet, row, RIGHT, f"Samples at step {step:,}").font = SECTION
    place_picture(sheet, row + 1, RIGHT, picture, description_of(step), HALF_CHART)
    return True


def _explain_points(rows: int, points: int) -> str:
    text = (
        f"Smoothed values are means over up to {half_window(rows)} rows on either side; of fewer "
        "near the first row."
    )
    if points < rows:
        text += f" To keep Excel quick, {MAX_POINTS:,} evenly chosen rows of {rows:,} are drawn."
    return text


def _fill_checkpoints(sheet: Worksheet, checkpoints: Table) -> None:
    """Fill the sheet with all checkpoints. The one with the lowest held-out loss is marked. Charts show this loss."""
    set_up_page(sheet, pages_high=1 if len(checkpoints.rows) <= PRINTED_ROWS else 0)
    if not checkpoints.rows:
        put(sheet, 1, 1, "No checkpoint has been saved yet.").font = SUBTLE
        return
    # The column of the files is the last one, because it is wide.
    names = sorted(checkpoints.columns, key="files".__eq__)
    rows = [[dict(zip(checkpoints.columns, row))[name] for name in names] for row in checkpoints.rows]
    best = best_checkpoint(checkpoints)
    if best is not None and BEST not in names:
        place = names.index(HELD_OUT_LOSS) + 1
        names.insert(place, BEST)
        for number, row in enumerate(rows):
            row.insert(place, BEST if number == best else None)
    put_rows(sheet, 1, [title_of(name) for name in names], names, rows)
    if best is not None:
        for column in range(1, len(names) + 1):
            cell = sheet.cell(2 + best, column)
            cell.fill, cell.font = MARK_FILL, BOLD

    charts = [
        draw(sheet, title, "held-out loss", scale, lines)
        for title, scale, lines in heldout_plots(checkpoints, names)
    ]
    place_charts(sheet, charts, len(rows) + 3)


def _fill_evaluations(sheet: Worksheet, evaluations: Table, notes: list[str]) -> None:
    """Fill the sheet with all evaluations, the notes on them, and charts of the metrics over the step."""
    set_up_page(sheet, pages_high=1)
    names, rows = evaluations.columns, evaluations.rows
    put_rows(sheet, 1, [title_of(name) for name in names], names, rows)
    row = len(rows) + 3
    if notes:
        put(sheet, row, 1, "Notes").font = SECTION
        for number, note in enumerate(notes, start=1):
            row += 1
            put(sheet, row, 1, f"{number}: {note}").font = NOTE
        row += 2
    charts = [
        draw(sheet, title, title.lower(), FITTED, lines) for title, lines in evaluation_plots(evaluations)
    ]
    place_charts(sheet, charts, row)


def _fill_arguments(sheet: Worksheet, arguments: dict, defaults: dict) -> None:
    """Fill the sheet with all flags and their values. Those that differ from the default are marked."""
    set_up_page(sheet, pages_high=1, landscape=False)
    if not arguments:
        put(sheet, 1, 1, "The arguments of this run are not known.").font = SUBTLE
        return
    titles, widths = ["flag", "value", "default", "changed"], [28, 60, 30, 12]
    if not defaults:  # a run of an earlier version, which did not record them
        titles, widths = titles[:2], widths[:2]
    put_header(sheet, 1, titles)
    set_widths(sheet, widths)
    for row, (flag, value) in enumerate(sorted(arguments.items()), start=2):
        changed = flag in defaults and value != defaults[flag]
        cells = [f"--{flag}", as_cell(value), as_cell(defaults.get(flag)), "changed" if changed else None]
        for column, content in enumerate(cells[: len(titles)], start=1):
            cell = put(sheet, row, column, content)
            cell.alignment = WRAPPED
            if changed:
                cell.font, cell.fill = BOLD, MARK_FILL
        set_row_height(sheet, row, [(str(text), width) for text, width in zip(cells, widths)])
    make_table(sheet, 1, titles, len(arguments))


def _fill_explained(sheet: Worksheet, run: Run) -> None:
    """Fill the sheet with the explanations of all columns."""
    set_up_page(sheet)
    titles, widths = ["column", "unit", "what it is", "what is normal"], [22, 14, 75, 70]
    put_header(sheet, 1, titles)
    set_widths(sheet, widths)
    repeated = run.metrics.repeated
    names = list(dict.fromkeys(run.metrics.columns + run.checkpoints.columns + run.evaluations.columns))
    if best_checkpoint(run.checkpoints) is not None and BEST not in names:
        names.insert(names.index(HELD_OUT_LOSS) + 1, BEST)
    for row, name in enumerate(names, start=2):
        column = describe(name, run.diffusion_steps)
        meaning = column.meaning
        if name in repeated:
            meaning += (
                f" In this run it equals {repeated[name]} in every row, and is hidden on the sheet Metrics."
            )
        texts = [name, column.unit, meaning, column.normal]
        for number, text in enumerate(texts, start=1):
            put(sheet, row, number, text or None).alignment = WRAPPED
        set_row_height(sheet, row, list(zip(texts, widths)))
    make_table(sheet, 1, titles, len(names))
