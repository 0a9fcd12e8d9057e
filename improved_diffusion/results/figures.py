"""Charts outside of Excel: as SVG for a web page, or as a picture."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from improved_diffusion.results.axes import LARGEST, Axis, fit_values, fit_way
from improved_diffusion.results.charts import GREY, HOURS, Line
from improved_diffusion.results.style import clean

INK, FAINT = "404040", "6E6E6E"
TITLE_SIZE, TEXT_SIZE, LEGEND_ROW = 15, 12, 18  # heights in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 50, 44  # margins in pixels
KEY = 22  # width in pixels of a stroke in the legend
LONGEST_NAME = 60  # characters in the legend
DASH = (6, 4)
SMOOTH = 3  # a picture is drawn larger by this factor, and then shrunk


class Path(NamedTuple):
    """A line through `points`, float64 [N, 2]."""

    points: np.ndarray
    colour: str
    width: float
    dashed: bool = False


class Dot(NamedTuple):
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str


class Text(NamedTuple):
    """A line of text. `y` is its baseline, `x` its "start", "middle" or "end", by `anchor`."""

    x: float
    y: float
    text: str
    size: int = TEXT_SIZE
    anchor: str = "start"
    colour: str = INK


Shape = Path | Dot | Text


def chart(
    title: str,
    y_title: str,
    scale: str,
    lines: Sequence[Line],
    from_zero: bool = True,
    size: tuple[int, int] = (440, 300),
    x_title: str = "step",
    legend: bool = True,
) -> list[Shape]:
    """The shapes of a chart. The parameters are those of `charts.draw`, without the sheet.

    :param legend: whether there is a legend, if there are several lines.
    """
    width, height = size
    names = [clean(line.title)[:LONGEST_NAME] for line in lines]
    places = _legend(names, width) if legend and len(lines) > 1 else []
    bottom = height - BOTTOM - LEGEND_ROW * (places[-1][1] + 1 if places else 0)
    shapes: list[Shape] = [
        Text(8, 20, clean(title), TITLE_SIZE),
        Text(8, 38, clean(y_title), colour=FAINT),
        Text(width - RIGHT, bottom + 34, x_title, anchor="end", colour=FAINT),
    ]
    drawn = [np.isfinite(line.x) & (np.abs(line.y) <= LARGEST) for line in lines]
    x_all, y_all = (
        np.concatenate([values[kept] for values, kept in zip(columns, drawn)])
        for columns in ([line.x for line in lines], [line.y for line in lines])
    )
    if not len(x_all):
        return [*shapes, Text(width / 2, height / 2, "no numbers yet", anchor="middle", colour=FAINT)]
    x_axis = fit_way(x_all, from_zero, x_title != HOURS)
    y_axis = fit_values(y_all, scale) or _around(float(y_all[0]))

    def x_pixels(values):
        return LEFT + x_axis.place(values) * (width - RIGHT - LEFT)

    def y_pixels(values):
        return bottom - y_axis.place(values) * (bottom - TOP)

    for value, label in y_axis.labels():
        y = float(y_pixels(value))
        shapes.append(Path(np.array([[LEFT, y], [width - RIGHT, y]]), GREY, 1))
        shapes.append(Text(LEFT - 6, y + 4, label, anchor="end", colour=FAINT))
    base = np.array([[LEFT, bottom], [width - RIGHT, bottom]])
    shapes.append(Path(base.astype(np.float64), "7F7F7F", 1))
    labels = x_axis.labels()
    widest = 1.2 * max(text_width(label) for _, label in labels)
    for value, label in labels[:: math.ceil(widest * len(labels) / (width - RIGHT - LEFT))]:
        shapes.append(Text(float(x_pixels(value)), bottom + 18, label, anchor="middle", colour=FAINT))
    # The smoothed curve is drawn last, in front.
    for line, kept in sorted(zip(lines, drawn), key=lambda pair: pair[0].bold):
        points = np.stack([x_pixels(line.x[kept]), y_pixels(line.y[kept])], axis=1)
        points = points[np.isfinite(points).all(axis=1)]
        if not line.markers and len(points) > width:  # more points than pixels cannot be seen
            points = points[np.linspace(0, len(points) - 1, width).round().astype(np.int64)]
        if len(points) > 1:
            shapes.append(Path(points, line.colour, 2 if line.bold else 1, line.dashed))
        if line.markers or len(points) == 1:
            shapes += [Dot(x, y, 3, line.colour) for x, y in points.tolist()]
    for line, name, (column, row) in zip(lines, names, places):
        y = bottom + BOTTOM + LEGEND_ROW * row + 8.0
        shapes.append(Path(np.array([[column, y], [column + KEY - 6, y]]), line.colour, 3, line.dashed))
        shapes.append(Text(column + KEY, y + 4, name))
    return shapes


def to_svg(shapes: Sequence[Shape], size: tuple[int, int], label: str) -> str:
    """An ``svg`` element, as wide as the element around it.

    :param label: the alternative text.
    """
    width, height = size
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(clean(label))}">']
    for shape in shapes:
        if isinstance(shape, Text):
            parts.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" text-anchor="{shape.anchor}" '
                f'fill="#{shape.colour}">{html.escape(shape.text)}</text>'
            )
        elif isinstance(shape, Dot):
            parts.append(
                f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}" fill="#{shape.colour}"/>'
            )
        else:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points.tolist())
            dashes = f' stroke-dasharray="{DASH[0]} {DASH[1]}"' if shape.dashed else ""
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="#{shape.colour}" '
                f'stroke-width="{shape.width:g}"{dashes}/>'
            )
    return "\n".join([*parts, "</svg>"])


def to_picture(shapes: Sequence[Shape], size: tuple[int, int]) -> Image.Image:
    """A picture of `shapes` on a white background. :param size: width and height in pixels."""
    canvas = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), "white")
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        if isinstance(shape, Path):
            for part in _dashes(shape.points) if shape.dashed else [shape.points]:
                corners = [(x * SMOOTH, y * SMOOTH) for x, y in part.tolist()]
                pen.line(corners, f"#{shape.colour}", round(shape.width * SMOOTH), joint="curve")
        elif isinstance(shape, Dot):
            x, y, radius = (SMOOTH * side for side in (shape.x, shape.y, shape.radius))
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), f"#{shape.colour}")
    picture = canvas.resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in shapes:
        if isinstance(shape, Text):
            place = (round(shape.x), round(shape.y))
            pen.text(place, shape.text, f"#{shape.colour}", _font(shape.size), anchor=anchors[shape.anchor])
    return picture


def text_width(text: str, size: int = TEXT_SIZE) -> int:
    """The width of `text` in pixels, rounded up."""
    return math.ceil(_font(size).getlength(text))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _around(value: float) -> Axis:
    """An axis for a single value."""
    reach = abs(value) / 10 or 1.0
    return fit_values(np.array([value - reach, value + reach]), "fitted")


def _legend(names: Sequence[str], width: int) -> list[tuple[float, int]]:
    """The position of each name in the legend: x in pixels, and the number of the row."""
    places, x, row = [], 8.0, 0
    for name in names:
        needed = KEY + 1.1 * text_width(name) + 14  # some fonts of browsers are wider
        if x > 8 and x + needed > width:
            x, row = 8.0, row + 1
        places.append((x, row))
        x += needed
    return places


def _dashes(points: np.ndarray) -> list[np.ndarray]:
    """The dashes of a line through `points`, each as float64 [4, 2]."""
    lengths = np.hypot(*np.diff(points, axis=0).T)
    way = np.concatenate([[0.0], np.cumsum(lengths)])
    starts = np.arange(0.0, way[-1], sum(DASH))
    ends = np.minimum(starts + DASH[0], way[-1])
    return [
        np.stack([np.interp(piece, way, points[:, axis]) for axis in (0, 1)], axis=1)
        for piece in np.linspace(starts, ends, 4, axis=1)
    ]
