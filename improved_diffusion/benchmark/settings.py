"""What scripts/benchmark.py measures: a configuration, its model and its training loops."""

from dataclasses import dataclass
from typing import Any

import torch as th

from improved_diffusion.benchmark.plain import layer_by_layer, make_plain
from improved_diffusion.benchmark.timing import Contender
from improved_diffusion.config import ImageFlags
from improved_diffusion.cpu.compute import Compute
from improved_diffusion.data.decode import height_width
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.flags import pick
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.script_util import create_model_and_diffusion, read_images_alike
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel

NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Settings:
    """A configuration to measure.

    :param model: flags of `config.ImageFlags` and `config.UNetFlags`.
    :param compute: the precision and cores that training would choose.
    :param rounds: number of measurements of everything.
    """

    model: dict[str, Any]
    batch_size: int
    microbatch: int
    data_dir: str
    compute: Compute
    rounds: int

    def read_images(self) -> ImageSet:
        """The training images of `data_dir`."""
        flags = pick(ImageFlags, self.model)
        return read_images_alike(self.data_dir, flags.output_size, channels=flags.colour_channels)

    @property
    def precisions(self) -> list[str]:
        """The precisions of the fast path to measure: 32 bits, and 16 if `compute` has chosen them."""
        return ["fp32"] if self.compute.precision == "fp32" else ["fp32", "bf16"]

    @property
    def cores(self) -> list[int]:
        """One core, and all."""
        return sorted({1, self.compute.workers})


def build(settings: Settings) -> tuple[UNetModel, GaussianDiffusion]:
    """The model, the same in every call, and its diffusion."""
    th.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**settings.model)
    for p in model.parameters():
        if not p.any():  # a new model has layers of zeros, a trained model has none
            th.nn.init.normal_(p, std=0.02)
    return model, diffusion


def random_images(settings: Settings, count: int) -> th.Tensor:
    """`count` images of noise, [count, C, H, W] in [-1, 1]."""
    shown = pick(ImageFlags, settings.model)
    shape = (count, shown.colour_channels, *height_width(shown.output_size))
    return th.rand(shape, generator=th.Generator().manual_seed(0)) * 2 - 1


def training_loop(
    settings: Settings, precision: str, workers: int | None = None, plain=(), layered=False, **arguments
) -> TrainLoop:
    """A loop on the fast path.

    :param workers: by default, the cores of `settings`.
    :param plain: kinds of modules that compute the plain way (see `make_plain`).
    :param layered: whether each layer is an operation of its own (see `layer_by_layer`).
    :param arguments: of `TrainLoop`, in addition.
    """
    model, diffusion = build(settings)
    model = make_plain(model, plain)
    return TrainLoop(
        model=layer_by_layer(model) if layered else model,
        diffusion=diffusion,
        batch_size=settings.batch_size,
        microbatch=settings.microbatch,
        precision=precision,
        num_workers=workers or settings.compute.workers,
        **{"data": iter(()), **arguments},
    )


def stepping(settings: Settings, loop: TrainLoop) -> Contender:
    """Steps of `loop` on the same images every time."""
    batch = random_images(settings, settings.batch_size)
    return Contender(lambda: loop.run_step(batch, {}))
