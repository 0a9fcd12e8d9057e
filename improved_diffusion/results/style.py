"""How the workbook looks, and how a value becomes a cell."""

import datetime
import math

from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, Cell
from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.columns import DURATION, GENERAL

LONGEST_TEXT = 32_000  # of the 32,767 characters that a cell can hold
SECONDS_PER_DAY = 86_400

FONT = "Calibri"  # that of the cells without a style of their own, in every program
TITLE = Font(FONT, size=20, bold=True, color="1F4E79")
SECTION = Font(FONT, size=12, bold=True, color="1F4E79")
HEADER = Font(FONT, bold=True, color="FFFFFF")
HEADER_FILL = PatternFill("solid", fgColor="1F4E79")
SUBTLE = Font(FONT, color="7F7F7F")
WARNING = Font(FONT, size=13, bold=True, color="9C0006")
WARNING_FILL = PatternFill("solid", fgColor="FFC7CE")
NOTE = Font(FONT, color="7F6000")
NOTE_FILL = PatternFill("solid", fgColor="FFF2CC")
RULE = Border(bottom=Side(style="thin", color="9DC3E6"))
CENTRED = Alignment(horizontal="center", vertical="center")
RIGHT = Alignment(horizontal="right")
WRAPPED = Alignment(horizontal="left", vertical="center", wrap_text=True)
INDENTED = Alignment(horizontal="left", indent=1)


def put(sheet: Worksheet, row: int, column: int, value, number_format: str = GENERAL) -> Cell:
    """Write `value` into a cell: numbers as numbers, anything else as text, never as a formula.

    NaN and infinities, which Excel's numbers are not, become text. A `DURATION` is given in seconds.
    """
    cell = sheet.cell(row, column)
    if isinstance(value, float) and not math.isfinite(value):
        cell.value = "NaN" if math.isnan(value) else str(value)
        cell.alignment = RIGHT
    elif isinstance(value, int | float | datetime.datetime):
        cell.value = value / SECONDS_PER_DAY if number_format == DURATION else value
        cell.number_format = number_format
    elif value is not None:
        # Neither control characters nor halves of surrogate pairs can be stored in a workbook.
        text = ILLEGAL_CHARACTERS_RE.sub("?", str(value)).encode("utf-8", "replace").decode()
        cell.value = text[:LONGEST_TEXT]
        cell.data_type = "s"  # even where it begins with "="
    return cell


def put_header(sheet: Worksheet, row: int, names: list[str]) -> None:
    """Write the header of a table, and freeze what is above its first row and left of its second column."""
    for column, name in enumerate(names, start=1):
        cell = put(sheet, row, column, name)
        cell.font, cell.fill, cell.alignment = HEADER, HEADER_FILL, CENTRED
    sheet.row_dimensions[row].height = 22
    sheet.freeze_panes = sheet.cell(row + 1, 2)
    sheet.print_title_rows = f"{row}:{row}"


def set_widths(sheet: Worksheet, widths: list[float]) -> None:
    """Set the widths of the columns from A on, in characters."""
    for column, width in enumerate(widths, start=1):
        sheet.column_dimensions[get_column_letter(column)].width = width


def set_row_height(sheet: Worksheet, row: int, texts_and_widths: list[tuple[str, float]]) -> None:
    """Make a row as high as the text that takes most lines in a cell of its width."""
    # A letter is a little narrower than a digit, of which widths are multiples.
    lines = max(math.ceil(0.95 * len(text) / width) for text, width in texts_and_widths)
    sheet.row_dimensions[row].height = 15 * max(lines, 1) + 3


def set_up_page(sheet: Worksheet, pages_high: int = 0) -> None:
    """Print in landscape, as wide as the paper, on `pages_high` pages or, when that is 0, on any number."""
    sheet.page_setup.orientation = "landscape"
    sheet.page_setup.paperSize = sheet.PAPERSIZE_A4
    sheet.page_setup.fitToWidth, sheet.page_setup.fitToHeight = 1, pages_high
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.oddFooter.center.text = "&A, page &P of &N"
