"""Images that a model has drawn with several samplers. Each image is drawn once and kept in a folder."""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion.comparison.plan import cell_name
from improved_diffusion.data.decode import height_width
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.progress import Progress
from improved_diffusion.sample_util import Plan, Subject, draw, to_uint8
from improved_diffusion.storage import open_atomic

SAVE_SECONDS = 60  # of drawing that a killed process may lose, or one batch


class Gallery:
    """The images that one model draws, kept in `folder`, which is made if it does not exist.

    A file holds the first images of one plan and seed; later calls append to it. ``arr_0``: uint8 [N, S, S, C];
    ``seconds``: the time that drawing them took; ``drawn_with``: JSON.

    :param labels: the classes to draw in turn, for a class-conditional model.
    :param drawn_with: the settings that the images depend on, by name, ready for JSON.
    """

    def __init__(
        self,
        folder: str,
        model: Callable[..., th.Tensor],
        diffusion: GaussianDiffusion,
        *,
        image_size: int | tuple[int, int],
        channels: int,
        labels: Sequence[int] | None,
        batch_size: int,
        drawn_with: dict[str, Any],
    ):
        bf.makedirs(folder)
        self._folder = folder
        self._model = model
        self._diffusion = diffusion
        self._image_size = image_size
        self._channels = channels
        self._labels = labels
        self._batch_size = batch_size
        self._drawn_with = drawn_with

    def images(self, plan: Plan, seed: int, count: int) -> tuple[np.ndarray, float]:
        """The first `count` images of `seed`, uint8 [count, S, S, C], and the seconds that drawing one took.

        Missing images are drawn first. The images of a damaged file are drawn again.

        :raises ValueError: the images in the file were drawn with other settings than `drawn_with`.
        """
        path = bf.join(self._folder, f"{cell_name(plan, seed)}.npz")
        images, seconds = self._read(path)
        if len(images) < count:
            images, seconds = self._draw(path, plan, seed, count, images, seconds)
        return images[:count], seconds / len(images)

    def _read(self, path: str) -> tuple[np.ndarray, float]:
        nothing = np.empty((0, *height_width(self._image_size), self._channels), np.uint8)
        if not bf.exists(path):
            return nothing, 0.0
        try:
            with bf.BlobFile(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                images, seconds = arrays["arr_0"], float(arrays["seconds"])
                drawn_with = json.loads(str(arrays["drawn_with"]))
            if images.dtype != np.uint8 or images.ndim != 4 or not isinstance(drawn_with, dict):
                raise ValueError("holds no such images")
        except Exception as error:  # on damaged files, zipfile and NumPy raise almost anything
            print(f"{path}: damaged ({error or type(error).__name__}); its images are drawn again")
            return nothing, 0.0
        for name, value in self._drawn_with.items():
            if drawn_with.get(name) != value:
                raise ValueError(
                    f"--log_dir {os.path.dirname(self._folder)}: holds images that were drawn with other {name}; "
                    "give another folder"
                )
        return images, seconds

    def _draw(
        self, path: str, plan: Plan, seed: int, count: int, images: np.ndarray, seconds: float
    ) -> tuple[np.ndarray, float]:
        labels = None if self._labels is None else np.resize(self._labels, count)
        subject = Subject(self._image_size, seed, labels, channels=self._channels)
        saved = time.monotonic()
        with Progress(count - len(images), plan.count_steps(self._diffusion), "drawing") as shown:
            while len(images) < count:
                numbers = range(len(images), min(len(images) + self._batch_size, count))
                started = time.monotonic()
                states = draw(self._model, self._diffusion, plan, subject, numbers)
                x = next(states)  # the noise
                for state in states:
                    x = state
                    shown.step(len(numbers))
                seconds += time.monotonic() - started
                images = np.concatenate([images, to_uint8(x)])
                shown.finish(len(numbers))
                if len(images) == count or time.monotonic() - saved > SAVE_SECONDS:
                    with open_atomic(path) as file:
                        np.savez(file, images, seconds=seconds, drawn_with=json.dumps(self._drawn_with))
                    saved = time.monotonic()
        return images, seconds
