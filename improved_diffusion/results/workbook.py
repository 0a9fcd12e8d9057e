"""Writing a workbook so that a full disk or a signal costs nothing but the workbook."""

from collections.abc import Callable
from io import BytesIO
from zipfile import ZIP_DEFLATED, ZipFile

from openpyxl import Workbook
from openpyxl.drawing.spreadsheet_drawing import SpreadsheetDrawing
from openpyxl.worksheet._writer import WorksheetWriter
from openpyxl.worksheet.worksheet import Worksheet
from openpyxl.writer.excel import ExcelWriter

from improved_diffusion.storage import open_atomic


def save_workbook(book: Workbook, path: str, check_folder: Callable[[], object] = lambda: None) -> None:
    """Write `book` into the file `path`, all at once.

    :param check_folder: called before the file is written. Raises an OSError if it must not be written.
    :raises OSError: the file cannot be written. An older one stays as it was.
    """
    content = BytesIO()
    # Not `book.save`: if a signal interrupts that, it leaves the archive open, which fails later.
    with ZipFile(content, "w", ZIP_DEFLATED) as archive:
        _MemoryWriter(book, archive).save()
    check_folder()
    with open_atomic(path) as file:
        file.write(content.getbuffer())


class _MemoryWriter(ExcelWriter):
    """Writes every sheet in memory.

    openpyxl writes them to temporary files. If the disk is full, these stay until the process ends, and an XML writer
    that is left open prints its error as a traceback.
    """

    def write_worksheet(self, ws: Worksheet) -> None:
        ws._drawing = SpreadsheetDrawing()
        ws._drawing.charts, ws._drawing.images = ws._charts, ws._images
        writer = WorksheetWriter(ws, BytesIO())
        writer.write()
        ws._rels = writer._rels
        self._archive.writestr(ws.path[1:], writer.read())
        self.manifest.append(ws)
