"""Previews: pictures that a model draws during its training, always from the same noise."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch as th
import torch.nn.functional as F

from improved_diffusion import logger
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.pictures import image_grid
from improved_diffusion.run.remote import PICTURES
from improved_diffusion.sample_util import DEFAULT_PLAN, Subject, draw, suitable_spacing, to_uint8
from improved_diffusion.storage import open_atomic

COUNT = 16
PER_ROW = 4
MAX_CLASSES = 10
BATCH = 16


def preview_labels(num_classes: int) -> np.ndarray:
    """The classes to draw, int64 [N]: `PER_ROW` images of each of the first `MAX_CLASSES` classes."""
    return np.repeat(np.arange(min(num_classes, MAX_CLASSES)), PER_ROW)


def count_images(subject: Subject) -> int:
    """How many images a preview of `subject` has (see `draw_preview`)."""
    if subject.low_res is not None:
        return len(subject.low_res)
    return COUNT if subject.labels is None else len(subject.labels)


def create_preview(
    diffusion: GaussianDiffusion,
    subject: Subject,
    run_dir: str,
) -> Callable[[Callable[..., th.Tensor], int], None]:
    """A function for the training loop. Called with a model and a step, it draws ``samples/step_NNNNNN.png``.

    :param subject: see `draw_preview`.
    :param run_dir: the directory of the run, with the folder ``samples``.
    """

    def preview(model: Callable[..., th.Tensor], step: int) -> None:
        path = os.path.join(run_dir, PICTURES, f"step_{step:06d}.png")
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path))  # not makedirs: if `run_dir` is gone, it must not come back
        draw_preview(model, diffusion, subject, path)
        logger.log_picture("pictures", path, step)  # a column is called samples

    return preview


def draw_preview(
    model: Callable[..., th.Tensor], diffusion: GaussianDiffusion, subject: Subject, path: str
) -> None:
    """Draw a grid of images into the PNG file `path`.

    The global random state is neither used nor changed.

    :param model: in eval mode.
    :param subject: `COUNT` images are drawn, or one for each of its labels or of its images to enlarge. Each class has
        its own row. Each small image is shown to the left of the enlarged one.
    :raises OSError: the file cannot be written.
    """
    labels, low_res = subject.labels, subject.low_res
    count = count_images(subject)
    spacing = suitable_spacing(DEFAULT_PLAN.sampler, DEFAULT_PLAN.eta, diffusion)
    plan = replace(DEFAULT_PLAN, steps=min(DEFAULT_PLAN.steps, diffusion.num_timesteps), spacing=spacing)
    parts = []
    for start in range(0, count, BATCH):
        *_, x = draw(model, diffusion, plan, subject, range(start, min(start + BATCH, count)))
        parts.append(to_uint8(x))
    images, rows = np.concatenate(parts), labels
    if low_res is not None:
        shown = to_uint8(F.interpolate(low_res, images.shape[1:3], mode="nearest"))
        images = np.stack([shown, images], axis=1).reshape(-1, *images.shape[1:])
        rows = np.arange(len(images)) // (2 * PER_ROW)
    with open_atomic(path) as file:
        image_grid(images, rows).save(file, format="PNG")
