"""Pictures that a model draws while it is being trained, from the same noise every time, so that one sees it grow."""

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
from improved_diffusion.sample_util import DEFAULT_PLAN, Subject, draw, to_uint8
from improved_diffusion.storage import open_atomic

COUNT = 16
PER_ROW = 4
MAX_CLASSES = 10
BATCH = 16


def preview_labels(num_classes: int) -> np.ndarray:
    """The classes to draw, int64 [N]: a row for each of at most `MAX_CLASSES`."""
    return np.repeat(np.arange(min(num_classes, MAX_CLASSES)), PER_ROW)


def create_preview(
    diffusion: GaussianDiffusion, subject: Subject, run_dir: str
) -> Callable[[Callable[..., th.Tensor], int], None]:
    """What a training loop calls with its model and step, to have ``samples/step_NNNNNN.png`` drawn in `run_dir`.

    A picture that cannot be drawn is reported; it is no reason to end a training.
    """

    def preview(model: Callable[..., th.Tensor], step: int) -> None:
        path = os.path.join(run_dir, PICTURES, f"step_{step:06d}.png")
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.dirname(path))  # and not `run_dir`, should that be gone
            draw_preview(model, diffusion, subject, path)
            logger.log_picture("samples", path, step)
        except Exception as error:  # whatever is wrong with a picture, training goes on
            logger.log(f"WARNING: {path} could not be drawn ({error}); training goes on")

    return preview


def draw_preview(
    model: Callable[..., th.Tensor], diffusion: GaussianDiffusion, subject: Subject, path: str
) -> None:
    """Draw a grid of images into the PNG file `path`.

    It is a function of the arguments alone: no global random state is used, or changed.

    :param model: in eval mode.
    :param subject: `COUNT` images, or one for each of its labels or images to enlarge. Each class has a row of
        its own; what is to be enlarged is shown left of what becomes of it.
    """
    labels, low_res = subject.labels, subject.low_res
    count = len(low_res) if low_res is not None else COUNT if labels is None else len(labels)
    plan = replace(DEFAULT_PLAN, steps=min(DEFAULT_PLAN.steps, diffusion.num_timesteps))
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
