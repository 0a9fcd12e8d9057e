"""Reading the images to edit (--init_image) and the mask (--mask) of image_sample.py."""

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.config import SampleConfig
from improved_diffusion.data.decode import (
    EXTENSIONS,
    UnusableImage,
    height_width,
    inspect_image,
    read_image,
    to_grey,
)
from improved_diffusion.editing import Edit
from improved_diffusion.image_datasets import describe
from improved_diffusion.pictures import image_grid
from improved_diffusion.sample_util import Plan, from_uint8, to_uint8
from improved_diffusion.script_util import read_images_alike
from improved_diffusion.storage import open_atomic


def read_edit(config: SampleConfig, given: set[str], plan: Plan) -> Edit:
    """The images, the mask and the strength of the flags.

    :raises ValueError: images or mask are unusable, or the sampler takes no mask; the message names the flag.
    """
    mask = None
    if config.mask:
        if not plan.is_random:
            raise ValueError(
                f"--mask {config.mask}: needs a sampler that adds noise: ddpm, or ddim or sde_dpmpp_2m with --eta "
                f"above 0, not {plan.sampler}"
                + (" with --eta 0" if plan.sampler in ("ddim", "sde_dpmpp_2m") else "")
            )
        mask = read_mask(config.mask, config.output_size)
    # By default, the part that is drawn anew does not depend on its old content.
    strength = 1.0 if config.mask and "strength" not in given else config.strength
    pixels = _read_images(config, at_most=config.num_samples if "num_samples" in given else None)
    return Edit(from_uint8(pixels), strength, mask, config.mask_rounds)


def read_mask(path: str, image_size: int | tuple[int, int]) -> th.Tensor:
    """The mask in an image file: bool [S, S], True for white. Grey counts as white if it is lighter than half.

    :raises ValueError: it is unusable, of another size than the images, or of one colour.
    """
    wanted = height_width(image_size)[::-1]
    try:
        size, _ = inspect_image(path)
        if size != wanted:
            raise ValueError(
                "is {}x{} pixels, and the images are {}x{}; give a mask of that size".format(*size, *wanted)
            )
        white = read_image(path, image_size)[0].mean(axis=2) > 127
    except ValueError as error:  # an `UnusableImage` too
        raise ValueError(f"--mask {path}: {error}") from None
    if white.all() or not white.any():
        raise ValueError(
            f"--mask {path}: is {'white' if white.all() else 'black'} everywhere; it must be white where to draw anew "
            "and black where to keep the image"
        )
    return th.from_numpy(white)


def save_originals(edit: Edit, out_dir: str) -> None:
    """Write a picture of the images to edit. The part that is drawn anew is grey."""
    if dist_util.get_rank() > 0:
        return
    images = edit.merge(th.zeros_like(edit.images), edit.images) if edit.mask is not None else edit.images
    path = bf.join(out_dir, "originals.png")
    with open_atomic(path) as file:
        image_grid(to_uint8(images)).save(file, format="PNG")
    print(f"the images that are edited: {path}")


def _read_images(config: SampleConfig, at_most: int | None) -> np.ndarray:
    """The images of --init_image, uint8 [N, S, S, C]."""
    place, channels = config.init_image, config.colour_channels
    if place.lower().endswith(tuple(EXTENSIONS)):
        try:
            pixels = read_image(place, config.output_size)[0]
        except UnusableImage as error:
            raise ValueError(f"--init_image {place}: {error}") from None
        return np.stack([to_grey(pixels) if channels == 1 else pixels])
    images = read_images_alike(place, config.output_size, flag_name="init_image", channels=channels)
    print(describe(images))
    return images.get(np.arange(min(len(images), at_most or len(images))))
