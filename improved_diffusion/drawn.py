"""Drawn images as an array that can be saved and looked at."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image

from improved_diffusion.pictures import image_grid, to_picture
from improved_diffusion.storage import open_atomic


class Images(np.ndarray):
    """Images as an array uint8 [N, H, W, 3], for NumPy like any other; a notebook shows them as a picture.

    Those of a model of grey images are [N, H, W, 1].

    :ivar labels: the class of each image, int64 [N]; None where there are no classes, and for a part of the images.

    Example::

        images = model.sample(16)
        images.mean(axis=0)         # NumPy
        images.save("grid.png")     # one picture of all
        images.pil()[3].show()      # Pillow
    """

    labels: np.ndarray | None

    def __new__(cls, pixels: np.ndarray, labels: np.ndarray | None = None) -> "Images":
        images = np.asarray(pixels).view(cls)
        images.labels = labels
        return images

    def __array_finalize__(self, source: Any) -> None:
        self.labels = None

    def __array_wrap__(self, result: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        # What is computed of images is no picture any more.
        return np.asarray(result)[()]

    def pil(self) -> list[Image.Image]:
        """The images one by one."""
        return [to_picture(image) for image in self._pixels()]

    def grid(self) -> Image.Image:
        """One picture of all images; each class has a row of its own."""
        return image_grid(self._pixels(), self.labels)

    def save(self, path: str | os.PathLike) -> None:
        """Write `grid` as a picture, or with the ending ``.npz`` the images themselves, as image_sample.py does.

        :raises ValueError: Pillow does not know the ending.
        """
        path, pixels = os.fspath(path), self._pixels()
        ending = os.path.splitext(path)[1].lower()
        if ending == ".npz":
            with open_atomic(path) as file:
                np.savez(file, *([pixels] if self.labels is None else [pixels, self.labels]))
            return
        kind = Image.registered_extensions().get(ending)
        if kind is None:
            raise ValueError(
                f"{path}: unknown kind of picture; use an ending such as .png, or .npz for the images"
            )
        with open_atomic(path) as file:
            self.grid().save(file, format=kind)

    def _pixels(self) -> np.ndarray:
        pixels = np.asarray(self)
        if pixels.ndim == 3:
            pixels = pixels[None]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise ValueError(
                f"an array {pixels.dtype} {list(pixels.shape)} is no picture any more; images are uint8 [N, H, W, 3]"
            )
        return pixels

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.grid().save(picture, format="PNG")
        return picture.getvalue()
