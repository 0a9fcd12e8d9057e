"""The workbook's sheet with the pictures that a run has drawn."""

import io
import math
import os

from openpyxl.drawing.image import Image
from openpyxl.worksheet.pagebreak import Break
from openpyxl.worksheet.worksheet import Worksheet
from PIL import Image as PillowImage

from improved_diffusion.results.style import (
    SECTION,
    SUBTLE,
    TITLE,
    place_picture,
    put,
    set_up_page,
    set_widths,
)

MAX_PICTURES = 50
PIXELS_PER_ROW, PIXELS_PER_CHARACTER = 20, 7  # of heights and widths
PAGE_PIXELS = 1200  # width of the pictures on a printed page
PAGE_ROWS = 38  # height of a printed page of this width


def fill_samples(sheet: Worksheet, previews: list[tuple[int, str]]) -> None:
    """Fill the sheet with the pictures, the newest first, each below its step, in as many columns as fit on a page.

    :param previews: step and path of each, the newest first.
    """
    sheet.sheet_view.showGridLines = False
    set_up_page(sheet)
    put(sheet, 1, 1, "Samples").font = TITLE
    if len(previews) > MAX_PICTURES:
        put(sheet, 2, 1, f"The newest {MAX_PICTURES} of {len(previews)}.").font = SUBTLE
    shown = [(step, path, read_picture(path)) for step, path in previews[:MAX_PICTURES]]
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
            place_picture(sheet, row + 1, column, picture, description_of(step))


def newest_picture(previews: list[tuple[int, str]]) -> tuple[int, Image] | None:
    """The newest picture that can be read, and its step."""
    for step, path in previews:
        if picture := read_picture(path):
            return step, picture
    return None


def description_of(step: int) -> str:
    """The alternative text of a picture."""
    return f"Grid of images drawn by the model after {step:,} steps of training"


def read_picture(path: str) -> Image | None:
    """The picture for the workbook; None if it cannot be decoded, for example because it is incomplete."""
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
        with PillowImage.open(content) as picture:
            picture.load()
        return Image(content)
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError):
        return None
