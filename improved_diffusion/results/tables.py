"""Excel tables with fitting columns, and the arrangement of charts."""

from collections.abc import Sequence

from openpyxl.chart import ScatterChart
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.charts import WIDTH
from improved_diffusion.results.columns import describe
from improved_diffusion.results.read import Value
from improved_diffusion.results.style import (
    INDENTED,
    WRAPPED,
    make_table,
    put,
    put_header,
    set_row_height,
    set_up_page,
    set_widths,
    table_titles,
)

ROWS_PER_CHART = 22
CHARTS_PER_ROW, COLUMNS_PER_CHART = 2, 13
PRINTED_ROWS = 60  # of tables with a row for every `log_interval` steps
WIDEST = 100  # characters of a column


def put_rows(
    sheet: Worksheet,
    header_row: int,
    titles: Sequence[str],
    names: Sequence[str],
    rows: Sequence[Sequence[Value]],
) -> None:
    """Write an Excel table. Each column gets a fitting width and a number format.

    :param titles: the headers.
    :param names: the columns of `columns.describe` with the number formats.
    """
    titles = table_titles(titles)
    put_header(sheet, header_row, titles)
    formats = [describe(name).number_format for name in names]
    widths = [_width(title, [row[column] for row in rows]) for column, title in enumerate(titles)]
    for row_number, row in enumerate(rows, start=header_row + 1):
        for column, (value, number_format) in enumerate(zip(row, formats), start=1):
            if value is not None:
                cell = put(sheet, row_number, column, value, number_format)
                if isinstance(value, str):
                    cell.alignment = INDENTED
                    if len(value) > WIDEST:
                        cell.alignment = WRAPPED
                        set_row_height(sheet, row_number, [(value, WIDEST)])
    set_widths(sheet, widths)
    if rows:
        make_table(sheet, header_row, titles, len(rows))


def _width(title: str, values: Sequence[Value]) -> float:
    """The width for a column with `values` and `title`, which has two lines and the button of the filter."""
    words = title.split()
    line = min(
        (max(len(" ".join(words[:n])), len(" ".join(words[n:]))) for n in range(len(words) + 1)), default=0
    )
    longest_text = max((len(str(value)) for value in values if not isinstance(value, int | float)), default=0)
    return min(max(10, line + 4, longest_text + 2), WIDEST)


def print_last_rows(sheet: Worksheet, header_row: int, rows: int, columns: int) -> None:
    """Print the last `PRINTED_ROWS` rows only. For a view of hundreds of rows, there are the charts."""
    if rows > PRINTED_ROWS:
        last = header_row + rows
        sheet.print_area = f"A{last - PRINTED_ROWS + 1}:{get_column_letter(columns)}{last}"
        remark = f"the last {PRINTED_ROWS} of {rows:,} rows; to print all, clear the print area"
        set_up_page(sheet, pages_high=1, remark=remark)


def place_charts(
    sheet: Worksheet, charts: Sequence[ScatterChart], row: int, per_row: int = CHARTS_PER_ROW
) -> None:
    """Place charts from `row` on, `per_row` of them side by side."""
    for number, chart in enumerate(charts):
        column = _column_at(sheet, number % per_row * (WIDTH + 20))
        sheet.add_chart(chart, f"{column}{row + number // per_row * ROWS_PER_CHART}")


def _column_at(sheet: Worksheet, pixels: float) -> str:
    """The first column that begins at least `pixels` from the left edge of the sheet."""
    column = 1
    while pixels > 0:
        letter = get_column_letter(column)
        width = sheet.column_dimensions[letter].width if letter in sheet.column_dimensions else 8.43
        pixels -= 7 * width + 5
        column += 1
    return get_column_letter(column)


def as_cell(value) -> Value:
    """The value of a flag as a cell: numbers as numbers, anything else as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or value is None else str(value)
