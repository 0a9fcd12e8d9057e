"""The workbook's charts, and the thinned and smoothed series that they draw."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from openpyxl.chart import Reference, ScatterChart, Series
from openpyxl.chart.axis import ChartLines
from openpyxl.chart.shapes import GraphicalProperties
from openpyxl.chart.text import RichText
from openpyxl.drawing.line import LineProperties
from openpyxl.drawing.text import CharacterProperties, Paragraph, ParagraphProperties
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.axes import AUTO, FITTED, FROM_ZERO, fit_values, fit_way
from improved_diffusion.results.columns import GENERAL, title_of
from improved_diffusion.results.read import Table
from improved_diffusion.results.style import LONGEST_TITLE, clean

MAX_POINTS = 1500  # as many as pixels on a screen; Excel becomes slow with many more
WIDTH, HEIGHT = 775, 397  # of a chart, in pixels
HOURS = "hours"  # the title of an x axis
PIXELS_PER_CM = 96 / 2.54
LATE_FROM = 0.2  # share of the run before its late part
LATE_ROWS = 25  # rows from which on the late part has its own chart

DARK, LIGHT, GREY, PALE = "1F4E79", "A9CCEC", "D9D9D9", "EFEFEF"
QUARTILE_COLOURS = ("C00000", "ED7D31", "70AD47", "1F4E79")
PALETTE = (*QUARTILE_COLOURS, "7030A0", "00B0F0", "BF9000", "7F7F7F")
RAW_WIDTH, BOLD_WIDTH, GRID_WIDTH = 9525, 25400, 6350  # in EMU, of which a point has 12,700


class Curve(NamedTuple):
    """A curve: a column of the metrics, smoothed or as logged."""

    column: str
    smoothed: bool
    colour: str

    @property
    def title(self) -> str:
        return title_of(self.column, *(["smoothed"] if self.smoothed else []))


class Plot(NamedTuple):
    """A chart of metrics: its title, the title and scale of its y axis, its curves, and its first step."""

    title: str
    y_title: str
    scale: str
    curves: list[Curve]
    first_step: float = 0.0


class Line(NamedTuple):
    """A series of a chart: the cells that hold it, and the numbers in them."""

    title: str
    colour: str
    x_column: int
    y_column: int
    first_row: int
    x: np.ndarray  # float64 [N]
    y: np.ndarray  # float64 [N], NaN where there is none
    bold: bool = True
    markers: bool = False
    dashed: bool = False


def plots_of(table: Table) -> list[Plot]:
    """The charts for which `table` has numbers. The first is that of the loss."""
    steps = table.column("step")
    late = _late_step(steps)
    plots = [
        Plot("Loss", "loss", AUTO, _raw_and_smoothed("loss")),
        Plot("Loss, late part (smoothed)", "loss", FITTED, [Curve("loss", True, DARK)], late),
        Plot("MSE by timestep quartile (smoothed)", "mse", AUTO, _quartiles("mse")),
        Plot("Gradient norm", "grad_norm", AUTO, _raw_and_smoothed("grad_norm")),
        Plot("Training speed", "images per second", FROM_ZERO, _raw_and_smoothed("images_per_sec")),
        Plot("Variational bound", "vb, bits per dimension", AUTO, _raw_and_smoothed("vb")),
        Plot("Variational bound by timestep quartile (smoothed)", "vb", AUTO, _quartiles("vb")),
    ]
    with_numbers = []
    for plot in plots:
        curves = [
            curve
            for curve in plot.curves
            if np.isfinite(table.column(curve.column)[steps >= plot.first_step]).any()
        ]
        if curves:
            with_numbers.append(plot._replace(curves=curves))
    return with_numbers


def _late_step(steps: np.ndarray) -> float:
    """The first step of a run's late part; infinite if too few rows follow."""
    first = LATE_FROM * steps.max(initial=0.0)
    return first if np.count_nonzero(steps >= first) >= LATE_ROWS else math.inf


def half_window(rows: int) -> int:
    """Half the width of the smoothing window: 2% of all rows, between 2 and 250."""
    return min(max(2, rows // 50), 250)


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Means over a window of `half` rows on either side, without the values that are not finite.

    At the beginning, where curves are steep, the window reaches at most a fifth of the way back to the first row, so
    that the smoothed curve follows the raw one. At the end, it is cut off at the last row.

    :param values: float64 [N].
    :return: float64 [N], NaN if a window has no finite value.
    """
    if not len(values):
        return values
    index = np.arange(len(values))
    left = np.minimum(index // 5, half)
    right = np.minimum(left, len(values) - 1 - index)
    finite = np.isfinite(values)
    # Each window is summed separately. Differences of running sums would lose all digits after a diverged loss.
    # `reduceat` sums from one bound to the next, so every other result is the sum of a window.
    bounds = np.stack([index - left, index + right + 1], axis=1).ravel()
    sums = np.add.reduceat(np.append(np.where(finite, values, 0.0), 0.0), bounds)[::2]
    count = np.add.reduceat(np.append(finite, False).astype(np.int64), bounds)[::2]
    means = sums / np.maximum(count, 1)
    return np.where(count > 0, means, np.nan)


def chart_data(table: Table, plots: Sequence[Plot]) -> tuple[list[str], np.ndarray]:
    """The points of the charts: all rows or, of more than `MAX_POINTS`, an even selection.

    :return: the titles of the columns (the step, then each curve once) and float64 [points, columns].
    """
    curves = {curve.title: curve for plot in plots for curve in plot.curves}
    half = half_window(len(table.rows))
    columns = [table.column("step")]
    for curve in curves.values():
        values = table.column(curve.column)
        columns.append(smooth(values, half) if curve.smoothed else values)
    count = len(table.rows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))
    return ["step", *curves], np.stack(columns, axis=1)[chosen]


def lines_of(plot: Plot, titles: Sequence[str], points: np.ndarray, header_row: int) -> list[Line]:
    """The series of `plot`. `titles` and `points` are those of `chart_data`, written from `header_row` on."""
    start = int(np.argmax(points[:, 0] >= plot.first_step))
    return [
        Line(
            curve.title,
            curve.colour,
            1,
            titles.index(curve.title) + 1,
            header_row + 1 + start,
            points[start:, 0],
            points[start:, titles.index(curve.title)],
            curve.smoothed,
        )
        for curve in plot.curves
    ]


def draw(
    sheet: Worksheet,
    title: str,
    y_title: str,
    scale: str,
    lines: Sequence[Line],
    from_zero: bool = True,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    x_title: str = "step",
) -> ScatterChart:
    """A chart for `Worksheet.add_chart`.

    :param sheet: the sheet with the numbers.
    :param scale: of the y axis: `AUTO`, `FROM_ZERO` or `FITTED`.
    :param from_zero: whether the x axis begins at 0, or at the first point.
    :param size: width and height in pixels.
    :param x_title: the title of the x axis; the labels are whole numbers, except for `HOURS`.
    """
    chart = ScatterChart(scatterStyle="lineMarker")
    chart.title = title
    chart.title.overlay = False
    chart.title.tx.rich.p[0].pPr = ParagraphProperties(
        defRPr=CharacterProperties(sz=1300, b=True, solidFill="404040")
    )
    chart.legend.position = "b"
    chart.legend.overlay = False
    chart.display_blanks = "span"
    chart.width, chart.height = (side / PIXELS_PER_CM for side in size)

    # The smoothed curve is drawn in front. In Excel this is the last one by `order`, in LibreOffice the first in the
    # file.
    for position, line in enumerate(sorted(lines, key=lambda line: not line.bold)):
        rows = {"min_row": line.first_row, "max_row": line.first_row + len(line.x) - 1}
        series = Series(
            Reference(sheet, min_col=line.y_column, **rows),
            Reference(sheet, min_col=line.x_column, **rows),
            title=clean(line.title)[:LONGEST_TITLE],
        )
        series.idx, series.order = position, lines.index(line)
        series.marker.symbol = "none"
        if line.markers:
            series.marker.symbol, series.marker.size = "circle", 6
            series.marker.graphicalProperties = GraphicalProperties(solidFill=line.colour)
            series.marker.graphicalProperties.line.solidFill = line.colour
        series.smooth = False
        width = BOLD_WIDTH if line.bold else RAW_WIDTH
        properties = LineProperties(solidFill=line.colour, w=width, prstDash="dash" if line.dashed else None)
        series.graphicalProperties = GraphicalProperties(ln=properties)
        chart.series.append(series)

    _style_axis(chart.x_axis, x_title)
    _style_axis(chart.y_axis, y_title)
    chart.x_axis.majorGridlines = None
    places = np.concatenate([line.x for line in lines])
    _scale_way(chart.x_axis, places[np.isfinite(places)], from_zero, x_title != HOURS)
    values = np.concatenate([line.y for line in lines])
    values = values[np.isfinite(values)]
    if len(values):
        _scale(chart.y_axis, values, scale)
    return chart


def _raw_and_smoothed(column: str) -> list[Curve]:
    return [Curve(column, False, LIGHT), Curve(column, True, DARK)]


def _quartiles(base: str) -> list[Curve]:
    return [Curve(f"{base}_q{index}", True, colour) for index, colour in enumerate(QUARTILE_COLOURS)]


def _style_axis(axis, title: str) -> None:
    axis.delete = False  # openpyxl's default hides the axis in recent versions of Excel
    axis.title = title
    axis.title.overlay = False
    axis.title.tx.rich.p[0].pPr = ParagraphProperties(
        defRPr=CharacterProperties(sz=1000, b=False, solidFill="404040")
    )
    axis.tickLblPos = "low"
    axis.majorTickMark = "out"
    axis.graphicalProperties = GraphicalProperties(ln=LineProperties(solidFill="7F7F7F", w=GRID_WIDTH))
    labels = CharacterProperties(sz=900, solidFill="404040")
    axis.txPr = RichText(p=[Paragraph(pPr=ParagraphProperties(defRPr=labels), endParaRPr=labels)])
    if axis.majorGridlines is not None:
        axis.majorGridlines.spPr = GraphicalProperties(ln=LineProperties(solidFill=GREY, w=GRID_WIDTH))


def _scale_way(axis, values: np.ndarray, from_zero: bool, whole: bool) -> None:
    """Set the limits and labels of an x axis of steps, images or hours. It ends exactly at the last one."""
    fitted = fit_way(values, from_zero, whole)
    axis.scaling.min, axis.scaling.max, axis.majorUnit = fitted.low, fitted.high, fitted.unit
    axis.number_format = _format(fitted.decimals)


def _scale(axis, values: np.ndarray, scale: str) -> None:
    """Set the limits and labels of a y axis. The labels are round numbers, and all different."""
    axis.number_format = GENERAL
    fitted = fit_values(values, scale)
    if fitted is None:
        return
    axis.scaling.min, axis.scaling.max, axis.majorUnit = fitted.low, fitted.high, fitted.unit
    if fitted.logarithmic:
        axis.scaling.logBase = 10
        lines = GraphicalProperties(ln=LineProperties(solidFill=PALE, w=GRID_WIDTH))
        axis.minorGridlines = ChartLines(spPr=lines)
    elif fitted.decimals <= 8 and values.max() < 1e7:
        axis.number_format = _format(fitted.decimals)


def _format(decimals: int) -> str:
    return f"#,##0.{'0' * decimals}" if decimals else "#,##0"
