"""The style of the workbook, and writing values, tables and pictures into it."""

import datetime
import math
from collections.abc import Sequence

from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, Cell
from openpyxl.drawing.fill import Blip
from openpyxl.drawing.geometry import PresetGeometry2D
from openpyxl.drawing.image import Image
from openpyxl.drawing.picture import PictureFrame
from openpyxl.drawing.spreadsheet_drawing import AnchorMarker, OneCellAnchor
from openpyxl.drawing.xdr import XDRPositiveSize2D
from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
from openpyxl.utils import get_column_letter
from openpyxl.utils.units import pixels_to_EMU
from openpyxl.worksheet.filters import AutoFilter
from openpyxl.worksheet.hyperlink import Hyperlink
from openpyxl.worksheet.table import Table, TableColumn, TableStyleInfo
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.columns import DURATION, GENERAL

LONGEST_TEXT = 32_000  # characters; a cell can hold 32,767
LONGEST_TITLE = 200  # characters; the header of a table can hold 255
SECONDS_PER_DAY = 86_400
POINTS_PER_ROW, PIXELS_PER_POINT = 15, 4 / 3

FONT = "Calibri"  # which all programs use for cells without a style
TITLE = Font(FONT, size=20, bold=True, color="1F4E79")
SECTION = Font(FONT, size=12, bold=True, color="1F4E79")
HEADER = Font(FONT, bold=True, color="FFFFFF")
HEADER_FILL = PatternFill("solid", fgColor="1F4E79")
SUBTLE = Font(FONT, color="7F7F7F")
LINK = Font(FONT, color="0563C1", underline="single")
BOLD = Font(FONT, bold=True)
WARNING = Font(FONT, size=13, bold=True, color="9C0006")
WARNING_FILL = PatternFill("solid", fgColor="FFC7CE")
NOTE = Font(FONT, color="7F6000")
NOTE_FILL = PatternFill("solid", fgColor="FFF2CC")
MARK_FILL = PatternFill("solid", fgColor="E2EFDA")
RULE = Border(bottom=Side(style="thin", color="9DC3E6"))
CENTRED = Alignment(horizontal="center", vertical="center", wrap_text=True)
RIGHT = Alignment(horizontal="right")
WRAPPED = Alignment(horizontal="left", vertical="center", wrap_text=True)
INDENTED = Alignment(horizontal="left", indent=1)


def clean(text: str) -> str:
    """`text` without control characters and lone surrogates, which a workbook cannot store."""
    return ILLEGAL_CHARACTERS_RE.sub("?", text).encode("utf-8", "replace").decode()


def put(sheet: Worksheet, row: int, column: int, value, number_format: str = GENERAL) -> Cell:
    """Write `value` into a cell: numbers as numbers, anything else as text, never as a formula.

    NaN and infinities, which Excel does not have, become text. With the format `DURATION`, `value` is in seconds.
    """
    cell = sheet.cell(row, column)
    if isinstance(value, float) and not math.isfinite(value):
        cell.value = "NaN" if math.isnan(value) else str(value)
        cell.alignment = RIGHT
    elif isinstance(value, int | float | datetime.datetime):
        cell.value = value / SECONDS_PER_DAY if number_format == DURATION else value
        if number_format != GENERAL:
            cell.number_format = number_format
    elif value is not None:
        cell.value = clean(str(value))[:LONGEST_TEXT]
        cell.data_type = "s"  # even if it begins with "="
    return cell


def put_header(sheet: Worksheet, row: int, titles: Sequence[str]) -> None:
    """Write the header of a table, freeze it and the first column, and repeat it on every printed page."""
    for column, title in enumerate(titles, start=1):
        cell = put(sheet, row, column, title)
        cell.font, cell.fill, cell.alignment = HEADER, HEADER_FILL, CENTRED
    sheet.row_dimensions[row].height = 34
    sheet.freeze_panes = sheet.cell(row + 1, 2)
    sheet.print_title_rows = f"{row}:{row}"


def put_link(sheet: Worksheet, row: int, column: int, target: str) -> None:
    """Write the name of the sheet `target` into a cell, as a link to it."""
    cell = put(sheet, row, column, target)
    cell.hyperlink = Hyperlink(ref=cell.coordinate, location=f"'{target}'!A1", display=target)
    cell.font = LINK


def table_titles(titles: Sequence[str]) -> list[str]:
    """`titles` as Excel requires them for a table: none empty, and all different, even without regard to case."""
    unique: dict[str, str] = {}
    for number, title in enumerate(titles, start=1):
        title = " ".join(clean(title).split())[:LONGEST_TITLE] or f"column {number}"
        if title.casefold() in unique:
            title = f"{title} (column {number})"
        unique[title.casefold()] = title
    return list(unique.values())


def make_table(sheet: Worksheet, header_row: int, titles: Sequence[str], rows: int) -> None:
    """Make an Excel table of the header and the `rows` rows below it. It has the name of the sheet.

    :param titles: the texts in the header, from `table_titles`.
    """
    ref = f"A{header_row}:{get_column_letter(len(titles))}{header_row + rows}"
    table = Table(displayName=sheet.title, ref=ref, autoFilter=AutoFilter(ref=ref))
    table.tableColumns = [TableColumn(id=number, name=title) for number, title in enumerate(titles, start=1)]
    table.tableStyleInfo = TableStyleInfo(name="TableStyleLight9", showRowStripes=True)
    sheet.add_table(table)


def place_picture(
    sheet: Worksheet,
    row: int,
    column: int,
    picture: Image,
    description: str,
    fit: tuple[int, int] | None = None,
) -> None:
    """Place `picture` at a cell, with `description` as its alternative text.

    :param fit: width and height in pixels of the area to fill; the aspect ratio stays.
    """
    factor = min(fit[0] / picture.width, fit[1] / picture.height) if fit else 1
    size = XDRPositiveSize2D(
        *(pixels_to_EMU(round(factor * side)) for side in (picture.width, picture.height))
    )
    frame = PictureFrame()
    number = len(sheet._images) + 1
    properties = frame.nvPicPr.cNvPr
    # Numbers within a drawing must be unique, and openpyxl uses low numbers for charts.
    properties.id, properties.name, properties.descr = 1000 + number, f"Picture {number}", description
    frame.blipFill.blip = Blip(cstate="print")
    frame.spPr.prstGeom = PresetGeometry2D(prst="rect")
    frame.spPr.ln = None
    marker = AnchorMarker(col=column - 1, row=row - 1)
    picture.anchor = OneCellAnchor(_from=marker, ext=size, pic=frame)
    sheet.add_image(picture)


def set_widths(sheet: Worksheet, widths: Sequence[float]) -> None:
    """Set the widths of the columns from A on, in characters."""
    for column, width in enumerate(widths, start=1):
        sheet.column_dimensions[get_column_letter(column)].width = width


def count_lines(text: str, width: float) -> int:
    """The number of lines that `text` needs in a cell of `width` characters."""
    # Widths are counted in digits, and a letter is a little narrower than a digit.
    return sum(max(1, math.ceil(0.95 * len(line) / width)) for line in text.split("\n"))


def set_row_height(sheet: Worksheet, row: int, texts_and_widths: Sequence[tuple[str, float]]) -> None:
    """Set the height of a row to that of its highest text."""
    lines = max(count_lines(text, width) for text, width in texts_and_widths)
    sheet.row_dimensions[row].height = POINTS_PER_ROW * lines + 3


def row_below(sheet: Worksheet, row: int, pixels: float) -> int:
    """The first row that begins at least `pixels` below the top of `row`."""
    while pixels > 0:
        pixels -= (sheet.row_dimensions[row].height or POINTS_PER_ROW) * PIXELS_PER_POINT
        row += 1
    return row


def set_up_page(sheet: Worksheet, pages_high: int = 0, landscape: bool = True, remark: str = "") -> None:
    """Print on A4 in the width of the paper.

    :param pages_high: the number of pages; 0: as many as needed.
    :param remark: a text for the footer, after the page number.
    """
    sheet.page_setup.orientation = "landscape" if landscape else "portrait"
    sheet.page_setup.paperSize = sheet.PAPERSIZE_A4
    sheet.page_setup.fitToWidth, sheet.page_setup.fitToHeight = 1, pages_high
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.print_options.horizontalCentered = True
    sheet.page_margins.left = sheet.page_margins.right = 0.4
    sheet.page_margins.top, sheet.page_margins.bottom, sheet.page_margins.footer = 0.5, 0.7, 0.3
    sheet.oddFooter.center.text = "&A, page &P of &N" + (f" ({remark})" if remark else "")
