"""Drawing images from a trained model: each image has its own random stream, so batches do not matter."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th
from PIL import Image
from tqdm import tqdm

from improved_diffusion import seeding
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.seeding import Purpose


def sample_images(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    *,
    num_samples: int,
    batch_size: int,
    image_size: int,
    seed: int = 0,
    use_ddim: bool = False,
    clip_denoised: bool = True,
    labels: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[np.ndarray]:
    """Draw images, batch by batch.

    Image i is a function of (`seed`, i), its label and the model, not of `batch_size`, up to rounding.

    :param labels: the class of each image, for a class-conditional model.
    :yield: uint8 [n, image_size, image_size, 3], n = `batch_size` but for the last batch.
    """
    loop = diffusion.ddim_sample_loop_progressive if use_ddim else diffusion.p_sample_loop_progressive
    batches = range(0, num_samples, batch_size)
    bar = tqdm(
        total=len(batches) * diffusion.num_timesteps, desc="sampling", unit="step", disable=not progress
    )
    with bar:
        for start in batches:
            numbers = range(start, min(start + batch_size, num_samples))
            randn_like = per_image_noise(seed, numbers)
            noise = randn_like(th.empty(len(numbers), 3, image_size, image_size))
            model_kwargs = {} if labels is None else {"y": th.tensor([labels[i] for i in numbers])}
            steps = loop(
                model,
                tuple(noise.shape),
                noise=noise,
                clip_denoised=clip_denoised,
                model_kwargs=model_kwargs,
                randn_like=randn_like,
            )
            for state in steps:
                x = state["sample"]
                bar.update()
            yield to_uint8(x)


def guide(model: Callable[..., th.Tensor], scale: float, null_label: int) -> Callable[..., th.Tensor]:
    """`model` with classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is `scale` - 1).

    Its prediction is moved from that without a class towards, and for `scale` > 1 beyond, that for the class
    given. A learned variance is taken from the latter as it is.

    :param model: a class-conditional model that was trained with class dropout.
    :param null_label: the label that stands for "no class".
    """

    def guided(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
        both = th.cat([y, th.full_like(y, null_label)])
        given, free = model(th.cat([x, x]), th.cat([timesteps, timesteps]), y=both).float().chunk(2)
        channels = x.shape[1]
        prediction = th.lerp(free[:, :channels], given[:, :channels], scale)
        return th.cat([prediction, given[:, channels:]], dim=1)

    return guided


def per_image_noise(seed: int, numbers: Sequence[int]) -> Callable[[th.Tensor], th.Tensor]:
    """A stand-in for `torch.randn_like` on a batch whose image k gets the random stream of image `numbers[k]`."""
    streams = [seeding.generator(seed, Purpose.SAMPLE, number) for number in numbers]

    def randn_like(x: th.Tensor) -> th.Tensor:
        return th.stack([seeding.normal(stream, tuple(x.shape[1:])) for stream in streams]).to(x)

    return randn_like


def to_uint8(x: th.Tensor) -> np.ndarray:
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3], clipped."""
    scaled = ((x.float() + 1) * 127.5).clamp(0, 255).to(th.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def image_grid(images: np.ndarray, columns: int | None = None, padding: int = 2) -> Image.Image:
    """One picture of all images, row by row, enlarged when they are small enough to strain the eye.

    :param images: uint8 [N, H, W, 3].
    :param columns: images per row; about as many as rows by default.
    :param padding: pixels between images.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (padding + n * (side + padding) for n, side in zip(divmod(i, columns), (height, width)))
        canvas[top : top + height, left : left + width] = image
    factor = max(1, 64 // max(height, width))
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def parse_class_labels(text: str, num_classes: int, class_names: Sequence[str]) -> list[int]:
    """Class numbers from a comma-separated list of names or numbers; all classes when `text` is empty.

    :raises ValueError: one is neither; the message lists what there is.
    """
    if not text:
        return list(range(num_classes))
    by_name = {name: number for number, name in enumerate(class_names)}
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in by_name:
            labels.append(by_name[part])
        elif part.isdecimal() and int(part) < num_classes:
            labels.append(int(part))
        else:
            known = ", ".join(class_names) if class_names else f"0 to {num_classes - 1}"
            raise ValueError(f"--class_label {part!r}: no such class; this model knows {known}")
    return labels
