"""The workbook's charts, and the thinned and smoothed series that they draw."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from openpyxl.chart import Reference, ScatterChart, Series
from openpyxl.chart.shapes import GraphicalProperties
from openpyxl.chart.text import RichText
from openpyxl.drawing.line import LineProperties
from openpyxl.drawing.text import CharacterProperties, Paragraph, ParagraphProperties
from openpyxl.worksheet.worksheet import Worksheet

from improved_diffusion.results.read import Table

MAX_POINTS = 1500  # a curve on a screen has no more pixels, and Excel becomes slow with many more

DARK, LIGHT, GREY = "1F4E79", "A9CCEC", "D9D9D9"
QUARTILE_COLOURS = ("C00000", "ED7D31", "70AD47", "1F4E79")
RAW_WIDTH, BOLD_WIDTH, GRID_WIDTH = 9525, 25400, 6350  # in EMU, of which a point has 12,700


class Curve(NamedTuple):
    """One series: a column of the metrics, smoothed or as it was logged."""

    column: str
    smoothed: bool
    colour: str

    @property
    def title(self) -> str:
        return f"{self.column} (smoothed)" if self.smoothed else self.column


class Plot(NamedTuple):
    """One chart: its title, the label of its y axis, the number format there, and its curves."""

    title: str
    y_title: str
    number_format: str
    curves: list[Curve]


def plots_of(table: Table) -> list[Plot]:
    """The charts that the columns of `table` have numbers for, the loss first."""
    plots = [
        Plot("Loss", "loss", "0.000", _raw_and_smoothed("loss")),
        Plot("MSE by timestep quartile (smoothed)", "mse", "0.000", _quartiles("mse")),
        Plot("Gradient norm", "grad_norm", "0.000", _raw_and_smoothed("grad_norm")),
        Plot("Training speed", "images per second", "#,##0.0", _raw_and_smoothed("images_per_sec")),
        Plot("Variational bound", "vb, bits per dimension", "0.0000", _raw_and_smoothed("vb")),
        Plot("Variational bound by timestep quartile (smoothed)", "vb", "0.0000", _quartiles("vb")),
    ]
    with_numbers = []
    for plot in plots:
        curves = [curve for curve in plot.curves if np.isfinite(table.column(curve.column)).any()]
        if curves:
            with_numbers.append(plot._replace(curves=curves))
    return with_numbers


def half_window(rows: int) -> int:
    """How many rows on either side belong to the mean that smooths a row: 2% of all, between 2 and 250."""
    return min(max(2, rows // 50), 250)


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """The mean of each value and its neighbours, `half` on either side; those that are not finite left out.

    At the beginning, where curves are steep, `half` is a fifth of the distance from the first row at most, so
    that the smoothed curve follows the raw one. At the end the window loses the rows that do not exist yet.

    :param values: float64 [N].
    :return: float64 [N], NaN where a window has no finite value.
    """
    if not len(values):
        return values
    index = np.arange(len(values))
    left = np.minimum(index // 5, half)
    right = np.minimum(left, len(values) - 1 - index)
    finite = np.isfinite(values)
    # Each window is summed by itself: differences of running sums would drown in one diverged loss.
    # `reduceat` sums from one bound to the next; every other result is a window.
    bounds = np.stack([index - left, index + right + 1], axis=1).ravel()
    sums = np.add.reduceat(np.append(np.where(finite, values, 0.0), 0.0), bounds)[::2]
    count = np.add.reduceat(np.append(finite, False).astype(np.int64), bounds)[::2]
    means = sums / np.maximum(count, 1)
    return np.where(count > 0, means, np.nan)


def chart_data(table: Table, plots: Sequence[Plot]) -> tuple[list[str], np.ndarray]:
    """The points that the charts draw: all rows up to `MAX_POINTS`, evenly chosen ones beyond that.

    :return: the titles of the columns (the step, then every curve) and float64 [points, columns].
    """
    curves = [curve for plot in plots for curve in plot.curves]
    half = half_window(len(table.rows))
    columns = [table.column("step")]
    for curve in curves:
        values = table.column(curve.column)
        columns.append(smooth(values, half) if curve.smoothed else values)
    count = len(table.rows)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))
    return ["step", *(curve.title for curve in curves)], np.stack(columns, axis=1)[chosen]


def draw(plot: Plot, sheet: Worksheet, titles: Sequence[str], points: np.ndarray, header_row: int):
    """The chart of `plot`, whose numbers (as `chart_data` gave them) stand in `sheet` below `header_row`.

    :return: a chart for `Worksheet.add_chart`.
    """
    chart = ScatterChart(scatterStyle="lineMarker")
    chart.title = plot.title
    chart.title.overlay = False
    chart.title.tx.rich.p[0].pPr = ParagraphProperties(
        defRPr=CharacterProperties(sz=1300, b=True, solidFill="404040")
    )
    chart.legend.position = "b"
    chart.legend.overlay = False
    chart.display_blanks = "span"
    chart.width, chart.height = 20.5, 10.5  # cm

    rows = {"min_row": header_row + 1, "max_row": header_row + len(points)}
    steps = Reference(sheet, min_col=1, **rows)
    # The smoothed curve belongs in front: for Excel that is the last by `order`, for LibreOffice the first in
    # the file.
    for position, curve in enumerate(sorted(plot.curves, key=lambda curve: not curve.smoothed)):
        column = titles.index(curve.title) + 1
        series = Series(Reference(sheet, min_col=column, **rows), steps, title=curve.title)
        series.idx, series.order = position, plot.curves.index(curve)
        series.marker.symbol = "none"
        series.smooth = False
        width = BOLD_WIDTH if curve.smoothed else RAW_WIDTH
        series.graphicalProperties = GraphicalProperties(ln=LineProperties(solidFill=curve.colour, w=width))
        chart.series.append(series)

    _style_axis(chart.x_axis, "step", "#,##0")
    _style_axis(chart.y_axis, plot.y_title, plot.number_format)
    chart.x_axis.majorGridlines = None
    chart.x_axis.scaling.min = 0
    chart.x_axis.scaling.max = max(float(points[:, 0].max()), 1.0)
    chart.x_axis.majorUnit = _round_unit(chart.x_axis.scaling.max / 6)
    values = points[:, [titles.index(curve.title) for curve in plot.curves]]
    _scale(chart.y_axis, values[np.isfinite(values)])
    return chart


def _raw_and_smoothed(column: str) -> list[Curve]:
    return [Curve(column, False, LIGHT), Curve(column, True, DARK)]


def _quartiles(base: str) -> list[Curve]:
    return [Curve(f"{base}_q{index}", True, colour) for index, colour in enumerate(QUARTILE_COLOURS)]


def _style_axis(axis, title: str, number_format: str) -> None:
    axis.delete = False  # openpyxl's default hides the axis in recent versions of Excel
    axis.title = title
    axis.title.overlay = False
    axis.title.tx.rich.p[0].pPr = ParagraphProperties(
        defRPr=CharacterProperties(sz=1000, b=False, solidFill="404040")
    )
    axis.number_format = number_format
    axis.tickLblPos = "low"
    axis.majorTickMark = "out"
    axis.graphicalProperties = GraphicalProperties(ln=LineProperties(solidFill="7F7F7F", w=GRID_WIDTH))
    labels = CharacterProperties(sz=900, solidFill="404040")
    axis.txPr = RichText(p=[Paragraph(pPr=ParagraphProperties(defRPr=labels), endParaRPr=labels)])
    if axis.majorGridlines is not None:
        axis.majorGridlines.spPr = GraphicalProperties(ln=LineProperties(solidFill=GREY, w=GRID_WIDTH))


def _scale(axis, values: np.ndarray) -> None:
    """Make a y axis logarithmic where its values span a factor of eight or more, else start it at zero.

    The base is 2, because a logarithmic axis labels only the powers of its base: with base 10, nothing
    between 0.01 and 0.1, where a diffusion model's loss spends its life.
    """
    low, high = float(values.min()), float(values.max())
    if low > 1e-100 and high < 1e100 and high / low >= 8:
        base = 2 if high / low <= 2**12 else 10
        axis.scaling.logBase = axis.majorUnit = base
        axis.scaling.min = float(base) ** math.floor(math.log(low, base))
        axis.scaling.max = float(base) ** math.ceil(math.log(high, base))
    elif low >= 0:
        axis.scaling.min = 0


def _round_unit(distance: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `distance`."""
    power = 10 ** max(math.floor(math.log10(distance)), 0) if distance > 1 else 1
    return next(unit * power for unit in (1, 2, 5, 10) if unit * power >= distance)
