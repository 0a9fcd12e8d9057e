"""Files of drawn images: an .npz file for programs, and a grid, single PNGs and an animation to look at."""

import math
from collections.abc import Iterable

import blobfile as bf
import numpy as np
from PIL import Image, features

from improved_diffusion import dist_util
from improved_diffusion.run.interrupts import Interrupts, Stoppable
from improved_diffusion.storage import open_atomic

MAX_IN_GRID = 400
# An animation shows the first images; its frames must fit in the memory.
MAX_IN_ANIMATION = 64
MAX_PIXELS_IN_ANIMATION = 1_000_000
# durations of all frames but the last together, and of the last frame
MILLISECONDS_OF_WAY, MILLISECONDS_OF_LAST = 3000, 2500


def save_samples(
    batches: Iterable[np.ndarray],
    out_dir: str,
    *,
    labels: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    save_png: bool = False,
    save_trajectory: bool = False,
) -> int:
    """Write images into `out_dir`, and print the paths of the files.

    The files are ``samples_NxHxWx3.npz`` (arr_0: the images; arr_1: `labels`, if there are any) and ``grid.png``.
    Ctrl-C, SIGTERM and SIGHUP end the drawing; the finished batches are still written. Of several processes, only
    rank 0 writes.

    :param batches: uint8 [n, F, H, W, 3 or 1] each: F frames from noise to image, or only the image.
    :param labels: the class of each image, [N].
    :param rows: the row of each image in the grid (see `image_grid`).
    :param save_png: also write every image as a PNG file, as soon as it is drawn.
    :param save_trajectory: also write the frames of the first images as an animation.
    :return: the exit code: 0, or that of the signal that has ended the drawing (see `Stoppable`).
    """
    if dist_util.get_rank() > 0:
        for _ in batches:
            pass
        return 0
    images: list[np.ndarray] = []
    frames: list[np.ndarray] = []
    with Stoppable() as stoppable:
        for batch in batches:
            finished = batch[:, -1]
            if save_png:
                for number, image in enumerate(finished, start=sum(map(len, images))):
                    with open_atomic(bf.join(out_dir, f"{number:06d}.png")) as file:
                        to_picture(image).save(file, format="PNG")
            if save_trajectory:
                missing = _count_in_animation(batch) - sum(map(len, frames))
                frames.append(batch[: max(0, missing)])
            images.append(finished)
    with Interrupts():  # a signal must not prevent these files from being written
        if images:
            drawn = np.concatenate(images)
            path = bf.join(out_dir, f"samples_{'x'.join(map(str, drawn.shape))}.npz")
            with open_atomic(path) as file:
                np.savez(file, *([drawn] if labels is None else [drawn, labels[: len(drawn)]]))
            grid = bf.join(out_dir, "grid.png")
            with open_atomic(grid) as file:
                image_grid(drawn, rows).save(file, format="PNG")
            print(f"{len(drawn)} images: {path}\npicture:   {grid}")
            if save_trajectory:
                print(f"animation: {save_animation(np.concatenate(frames), out_dir, rows)}")
        if stoppable.exit_code:
            dist_util.leave()  # the others may wait in the batch that was not finished
    return stoppable.exit_code


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Pixels, uint8 [H, W, 3 or 1], as a picture, in colour or grey."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def image_grid(images: np.ndarray, rows: np.ndarray | None = None, padding: int = 2) -> Image.Image:
    """One picture of all images, enlarged by the largest whole factor that leaves them at 64 pixels or less.

    :param images: uint8 [N, H, W, 3 or 1]; only the first `MAX_IN_GRID` are shown.
    :param rows: a number for each image, [N], such as its class. Images with the same number share a row. None: the
        grid is about square.
    :param padding: pixels between images.
    """
    images = images[:MAX_IN_GRID]
    count, height, width, _ = images.shape
    if rows is None:
        columns = math.ceil(math.sqrt(count))
        places = [divmod(i, columns) for i in range(count)]
    else:
        row_of = {key: row for row, key in enumerate(dict.fromkeys(rows[:count].tolist()))}
        filled = [0] * len(row_of)
        places = []
        for row in (row_of[key] for key in rows[:count].tolist()):
            places.append((row, filled[row]))
            filled[row] += 1
    height_in_images, width_in_images = (max(place) + 1 for place in zip(*places))
    canvas = np.full(
        (height_in_images * (height + padding) + padding, width_in_images * (width + padding) + padding, 3),
        255,
        np.uint8,
    )
    for image, (row, column) in zip(images, places):
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        canvas[top : top + height, left : left + width] = image
    factor = max(1, 64 // max(height, width))
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_animation(frames: np.ndarray, out_dir: str, rows: np.ndarray | None = None) -> str:
    """Write an animation from noise to images: ``trajectory.webp``, or ``trajectory.gif`` if Pillow has no WebP.

    :param frames: uint8 [N, F, H, W, 3 or 1].
    :param rows: as in `image_grid`.
    :return: the path of the file.
    """
    kind = "WebP" if features.check("webp") else "GIF"
    path = bf.join(out_dir, f"trajectory.{kind.lower()}")
    first, *others = (image_grid(frame, rows) for frame in frames.swapaxes(0, 1))
    durations = [MILLISECONDS_OF_WAY // frames.shape[1]] * len(others) + [MILLISECONDS_OF_LAST]
    with open_atomic(path) as file:
        first.save(file, format=kind, save_all=True, append_images=others, duration=durations, loop=0)
    return path


def _count_in_animation(batch: np.ndarray) -> int:
    """How many images an animation shows, given a batch [n, F, H, W, 3] of them."""
    return max(1, min(MAX_IN_ANIMATION, MAX_PIXELS_IN_ANIMATION // (batch.shape[2] * batch.shape[3])))
