"""The picture of a comparison: images by every sampler from the same noise, for each number of steps."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from improved_diffusion.comparison.plan import BASELINE, Solver, cell_name, exact_plan
from improved_diffusion.sample_util import Plan

SHOWN = 4  # images of a cell
SIDE = 64  # in pixels; smaller images are enlarged to it
TEXT, LINE = 15, 24  # height of letters, and of a line of them
GAP, SEAM = 12, 2  # space between cells, and between images

Band = tuple[list[str], list[tuple[str, list[np.ndarray | None]]]]  # headings, and rows of a label and cells


def comparison_picture(record: dict[str, Any], images: dict[str, np.ndarray]) -> Image.Image:
    """Rows are samplers, columns numbers of steps; below are the exact solution and the baseline.

    :param record, images: as in `report.write`. The place of a cell without images stays empty.
    """
    seed, exact = record["seeds"][0], exact_plan(record["timesteps"])

    def strip(plan: Plan) -> np.ndarray | None:
        cell = images.get(cell_name(plan, seed))
        return None if cell is None else side_by_side(cell[:SHOWN])

    samplers = [
        (f"{solver}, {solver.spacing}", [strip(solver.plan(steps)) for steps in record["steps"]])
        for solver in (Solver(*entry) for entry in record["samplers"])
    ]
    others = {
        f"{exact.sampler}, {exact.steps} steps": strip(exact),
        f"{BASELINE.sampler}, {record['timesteps']} steps": strip(BASELINE),
    }
    others = {heading: cell for heading, cell in others.items() if cell is not None}
    return _draw(
        [
            ([f"{steps} steps" for steps in record["steps"]], samplers),
            (list(others), [("for comparison", list(others.values()))]),
        ]
    )


def side_by_side(images: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Images in a row, uint8 [height, width, 3]; small ones are enlarged up to `side` pixels.

    :param images: uint8 [N, H, W, C]; with one channel, they are shown in grey.
    """
    factor = max(1, side // images.shape[1])
    coloured = np.broadcast_to(images, (*images.shape[:3], 3))
    large = coloured.repeat(factor, axis=1).repeat(factor, axis=2)
    seamed = np.pad(large, [(0, 0), (0, 0), (0, SEAM), (0, 0)], constant_values=255)
    return np.concatenate(list(seamed), axis=1)[:, :-SEAM]


def _draw(bands: list[Band]) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    strips = [strip for _, rows in bands for _, cells in rows for strip in cells if strip is not None]
    labels = [label for _, rows in bands for label, _ in rows]
    headings = [heading for band, _ in bands for heading in band]
    left = GAP + round(max(map(font.getlength, labels))) + GAP
    width = max(strips[0].shape[1], round(max(map(font.getlength, headings)))) + GAP
    height = strips[0].shape[0] + GAP
    canvas = Image.new(
        "RGB",
        (
            left + width * max(len(band) for band, _ in bands),
            GAP + sum(LINE + height * len(rows) for _, rows in bands),
        ),
        "white",
    )
    pen = ImageDraw.Draw(canvas)
    y = GAP
    for band, rows in bands:
        for column, heading in enumerate(band):
            pen.text((left + column * width, y), heading, "black", font)
        y += LINE
        for label, cells in rows:
            pen.text((GAP, y + (height - GAP - TEXT) // 2), label, "black", font)
            for column, strip in enumerate(cells):
                if strip is not None:
                    canvas.paste(Image.fromarray(strip), (left + column * width, y))
            y += height
    return canvas
