"""Drawing images from a trained model: each image has its own random stream, so batches do not matter."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import blobfile as bf
import numpy as np
import torch as th
from PIL import Image
from tqdm import tqdm

from improved_diffusion import dist_util, seeding
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.image_set import ImageSet
from improved_diffusion.seeding import Purpose
from improved_diffusion.storage import open_atomic

MAX_IN_GRID = 400


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
    low_res: th.Tensor | None = None,
    progress: bool = True,
) -> Iterator[np.ndarray]:
    """Draw images, batch by batch.

    Image i is a function of (`seed`, i), its label, `low_res[i]` and the model, not of `batch_size`, up to
    rounding.

    :param labels: the class of each image, for a class-conditional model.
    :param low_res: the images to enlarge, [N, 3, s, s] in [-1, 1], for a super-resolution model.
    With several processes each draws its share, `batch_size` images at a time, and rank 0 gets them all.

    :yield: uint8 [n, image_size, image_size, 3], n = `batch_size` times the number of processes but for the last
        batch; on other ranks than 0, their share of these.
    """
    loop = diffusion.ddim_sample_loop_progressive if use_ddim else diffusion.p_sample_loop_progressive
    batches = range(0, num_samples, batch_size * dist_util.get_world_size())
    bar = tqdm(
        total=len(batches) * diffusion.num_timesteps,
        desc="sampling",
        unit="step",
        disable=not progress or dist_util.get_rank() > 0,
    )
    with bar:
        for start in batches:
            mine = dist_util.share(range(start, min(start + batches.step, num_samples)))
            numbers = mine or range(
                start, start + 1
            )  # a process without a share draws something, and drops it
            randn_like = per_image_noise(seed, numbers)
            noise = randn_like(th.empty(len(numbers), 3, image_size, image_size))
            model_kwargs = {} if labels is None else {"y": th.tensor([labels[i] for i in numbers])}
            if low_res is not None:
                model_kwargs["low_res"] = low_res[numbers.start : numbers.stop]
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
            yield dist_util.gather_arrays(to_uint8(x)[: len(mine)])


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


def from_uint8(pixels: np.ndarray) -> th.Tensor:
    """Images uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [-1, 1]: what models are trained on."""
    return th.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def save_samples(
    batches: Iterable[np.ndarray], out_dir: str, *, labels: np.ndarray | None = None, save_png: bool = False
) -> bool:
    """Write images into `out_dir`, and say where they are.

    They become ``samples_NxHxWx3.npz`` (arr_0: the images; arr_1: `labels`, where there are any) and the
    picture ``grid.png``. Ctrl-C ends the drawing; what is finished by then is written all the same. Only rank 0
    of several processes writes.

    :param batches: uint8 [n, H, W, 3] each.
    :param save_png: also write every image as a PNG file of its own, at once.
    :return: whether all batches were drawn.
    """
    if dist_util.get_rank() > 0:
        for _ in batches:
            pass
        return True
    images: list[np.ndarray] = []
    complete = False
    try:
        for batch in batches:
            if save_png:
                for number, image in enumerate(batch, start=sum(map(len, images))):
                    with open_atomic(bf.join(out_dir, f"{number:06d}.png")) as file:
                        Image.fromarray(image).save(file, format="PNG")
            images.append(batch)
        complete = True
    except KeyboardInterrupt:
        if not images:
            return False
    drawn = np.concatenate(images)
    path = bf.join(out_dir, f"samples_{'x'.join(map(str, drawn.shape))}.npz")
    with open_atomic(path) as file:
        np.savez(file, *([drawn] if labels is None else [drawn, labels[: len(drawn)]]))
    grid = bf.join(out_dir, "grid.png")
    with open_atomic(grid) as file:
        image_grid(drawn, labels).save(file, format="PNG")
    print(f"{len(drawn)} images: {path}\npicture:   {grid}")
    return complete


def image_grid(images: np.ndarray, labels: np.ndarray | None = None, padding: int = 2) -> Image.Image:
    """One picture of all images, enlarged when they are small enough to strain the eye.

    :param images: uint8 [N, H, W, 3]; of more than `MAX_IN_GRID` the first are shown.
    :param labels: their classes [N]; each class then has a row of its own.
    :param padding: pixels between images.
    """
    images = images[:MAX_IN_GRID]
    count, height, width, _ = images.shape
    if labels is None:
        columns = math.ceil(math.sqrt(count))
        places = [divmod(i, columns) for i in range(count)]
    else:
        row_of = {label: row for row, label in enumerate(dict.fromkeys(labels[:count].tolist()))}
        filled = [0] * len(row_of)
        places = []
        for row in (row_of[label] for label in labels[:count].tolist()):
            places.append((row, filled[row]))
            filled[row] += 1
    rows, columns = (max(place) + 1 for place in zip(*places))
    canvas = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8
    )
    for image, (row, column) in zip(images, places):
        top, left = padding + row * (height + padding), padding + column * (width + padding)
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


def labels_of(images: ImageSet, num_classes: int, class_names: Sequence[str]) -> np.ndarray:
    """The class of each image, int64 [N], as a model counts its classes.

    :param num_classes: the model's.
    :param class_names: their names, by which the classes of `images` are recognized; without any names,
        they are taken to be counted in the same way.
    :raises ValueError: `images` tell no classes, or one that the model does not know.
    """
    source = images.summary["source"]
    if images.labels is None:
        raise ValueError(
            f"{source}: the model was trained with classes, and the images there tell none: name the files "
            "<class>_<anything>.png or put each class into a folder of its own"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    table = np.arange(images.num_classes)
    for label in np.unique(images.labels):
        name = images.class_names[label]
        number = label
        if class_names:
            # The classes of an .npz file have numbers for names.
            number = numbers.get(name, int(name) if name.isdecimal() else num_classes)
        if number >= num_classes:
            known = ", ".join(class_names) if class_names else f"classes 0 to {num_classes - 1}"
            raise ValueError(f"{source}: holds images of class {name!r}, and the model knows {known}")
        table[label] = number
    return table[images.labels]
