"""Flags become models, diffusions and data, under the names of improved-diffusion."""

import argparse
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th

from improved_diffusion import dist_util, weighting
from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion.config import (
    LOSS_WEIGHTINGS,
    ClassFlags,
    DiffusionFlags,
    ModelAndDiffusion,
    ModelFlags,
    SuperResModelAndDiffusion,
    SuperResModelFlags,
    SuperResSizes,
    TrainConfig,
    check_classes,
    levels_of,
)
from improved_diffusion.data.decode import height_width
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.flags import Flags, declared, defaults, errors_about, named, pick, str2bool
from improved_diffusion.image_datasets import read_images
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.unet import SuperResModel, UNetModel

DEFAULT_NUM_CLASSES = 1000
# the values of --prediction
MEAN_TYPES = {
    "epsilon": gd.ModelMeanType.EPSILON,
    "x_start": gd.ModelMeanType.START_X,
    "v": gd.ModelMeanType.VELOCITY,
    "edm": gd.ModelMeanType.EDM,
}
SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1], as in Karras et al. 2022
MIN_MEASURED = 4  # images that a metric needs
MAX_PARAMETERS = 2_000_000_000
MAX_IMAGES_GB = 16


def model_and_diffusion_defaults() -> dict[str, Any]:
    """All arguments of `create_model_and_diffusion`, with their defaults."""
    return defaults(ModelAndDiffusion)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """All arguments of `sr_create_model_and_diffusion`, with their defaults."""
    return defaults(SuperResModelAndDiffusion)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag for every key, with the type of its default. The flags of the training scripts also get their help."""
    known = declared(TrainConfig)
    for name, default in default_dict.items():
        kind = str2bool if isinstance(default, bool) else str if default is None else type(default)
        text = known[name].help.replace("%", "%%") if name in known else None
        parser.add_argument(f"--{name}", default=default, type=kind, help=text)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The values of `keys` in parsed arguments, by name."""
    return {key: getattr(args, key) for key in keys}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Build the model and its diffusion.

    :param flags: any of `model_and_diffusion_defaults`; the others have their defaults.
    :raises ValueError: a value is unusable; the message names the flag.
    """
    return create_from_flags(ModelAndDiffusion(**flags))


def sr_create_model_and_diffusion(**flags: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """Build a super-resolution model and its diffusion.

    :param flags: any of `sr_model_and_diffusion_defaults`; the others have their defaults.
    :raises ValueError: a value is unusable; the message names the flag.
    """
    return create_from_flags(SuperResModelAndDiffusion(**flags))


def create_model(**flags: Any) -> UNetModel:
    """Build a UNet from the flags of `config.ModelFlags`; see `create_model_and_diffusion`."""
    return _build(ModelFlags(**flags))


def sr_create_model(large_size: int, small_size: int, **flags: Any) -> SuperResModel:
    """Build a UNet that enlarges images from `small_size` to `large_size` pixels; see `create_model`."""
    return _build(SuperResModelFlags(large_size=large_size, small_size=small_size, **flags))


def is_super_resolution(config: Flags) -> bool:
    """Whether `config` describes a super-resolution model."""
    return isinstance(config, SuperResSizes)


def describe_model(arguments: dict[str, Any]) -> ModelAndDiffusion | SuperResModelAndDiffusion:
    """The flags of the model and its diffusion, from the arguments that are stored with a checkpoint."""
    return pick(SuperResModelAndDiffusion if "large_size" in arguments else ModelAndDiffusion, arguments)


def create_from_flags(config: ModelAndDiffusion) -> tuple[UNetModel, SpacedDiffusion]:
    """Build the model and the diffusion that `config` describes.

    :param config: flags that include those of `ModelAndDiffusion` or `SuperResModelAndDiffusion`.
    :raises ValueError: a value is unusable; the message names the flag.
    """
    return _build(config), create_diffusion(config)


def _build(config: ModelFlags | SuperResModelFlags) -> UNetModel:
    kind = UNetModel
    if is_super_resolution(config):
        kind = SuperResModel
        if config.small_size >= config.large_size:
            raise ValueError(
                f"--small_size {config.small_size}: must be below --large_size {config.large_size}"
            )
    arguments = {"in_channels": config.colour_channels, **_unet_arguments(config)}
    try:
        with th.device("meta"):  # tensors without memory
            # Without classes: to initialise an embedding on this device, torch would load its compiler.
            skeleton = kind(**{**arguments, "num_classes": None})
    except ValueError as error:
        raise named(error, {"num_heads": "num_heads", "channels": "num_channels / --channel_mult"}) from None
    parameters = sum(p.numel() for p in skeleton.parameters())
    parameters += 4 * arguments["model_channels"] * (arguments["num_classes"] or 0)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"--num_channels, --channel_mult, --num_res_blocks: this model would have {parameters:,} parameters; "
            f"{MAX_PARAMETERS:,} are the limit"
        )
    return kind(**arguments)


def create_diffusion(config: DiffusionFlags) -> SpacedDiffusion:
    """Build the diffusion that `config` describes. :raises ValueError: it is impossible; the message names the flag."""
    try:
        return create_gaussian_diffusion(
            steps=config.diffusion_steps,
            learn_sigma=config.learn_sigma,
            sigma_small=config.sigma_small,
            noise_schedule=config.noise_schedule,
            use_kl=config.use_kl,
            predict_xstart=config.predict_xstart,
            rescale_timesteps=config.rescale_timesteps,
            rescale_learned_sigmas=config.rescale_learned_sigmas,
            # Commands that do not sample, such as a conversion, do not have this flag.
            timestep_respacing=getattr(config, "timestep_respacing", ""),
            prediction=config.prediction,
            loss_weighting=config.loss_weighting,
            sigma_mean=config.sigma_mean,
            sigma_std=config.sigma_std,
            uniform_share=config.uniform_share,
        )
    except ValueError as error:
        arguments = {
            "section_counts": "timestep_respacing",
            "loss_weighting": "loss_weighting",
            "mean": "sigma_mean",
        }
        raise named(error, arguments) from None


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | list[int] = "",
    prediction: str = "epsilon",
    loss_weighting: str = "none",
    sigma_mean: float = weighting.SIGMA_MEAN,
    sigma_std: float = weighting.SIGMA_STD,
    uniform_share: float = weighting.UNIFORM_SHARE,
) -> SpacedDiffusion:
    """Build the diffusion process; the arguments are the flags of `config.DiffusionFlags`.

    :param prediction: what the model predicts, a name in `MEAN_TYPES`. `predict_xstart` is the same as "x_start".
    :param loss_weighting: "none", "min_snr" or "edm"; see `weighting`.
    :param sigma_mean, sigma_std, uniform_share: the distribution of noise in the weights of "edm"; see
        `weighting.log_normal_shares`.
    :raises ValueError: a value is unknown or out of range, or two contradict each other.
    """
    if prediction not in MEAN_TYPES:
        raise ValueError(f"--prediction {prediction!r} is unknown; use one of {', '.join(MEAN_TYPES)}")
    if predict_xstart and prediction not in ("epsilon", "x_start"):
        raise ValueError(
            f"--predict_xstart True: contradicts --prediction {prediction}; leave one of them out"
        )
    if loss_weighting not in LOSS_WEIGHTINGS:
        raise ValueError(
            f"--loss_weighting {loss_weighting!r} is unknown; use one of {', '.join(LOSS_WEIGHTINGS)}"
        )
    betas = gd.get_named_beta_schedule(noise_schedule, steps)
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        variance = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        variance = gd.ModelVarType.FIXED_SMALL
    else:
        variance = gd.ModelVarType.FIXED_LARGE
    weights = None
    if loss_weighting == "min_snr":
        weights = weighting.min_snr
    elif loss_weighting == "edm":

        def weights(sigma: np.ndarray) -> np.ndarray:
            shares = weighting.log_normal_shares(sigma, sigma_mean, sigma_std, uniform_share)
            return weighting.edm(sigma, SIGMA_DATA, shares)

    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=MEAN_TYPES["x_start" if predict_xstart else prediction],
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        sigma_data=SIGMA_DATA,
        loss_weighting=weights,
    )


def _unet_arguments(config: ModelFlags | SuperResModelFlags) -> dict[str, Any]:
    """The arguments of `UNetModel` that these flags stand for."""
    channel_mult, attention_factors = levels_of(config)
    return {
        "model_channels": config.num_channels,
        "out_channels": (2 if config.learn_sigma else 1) * config.colour_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": attention_factors,
        "dropout": config.dropout,
        "channel_mult": channel_mult,
        "num_classes": _embedded_classes(config),
        "use_checkpoint": config.use_checkpoint,
        "num_heads": config.num_heads,
        "num_heads_upsample": config.num_heads_upsample,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "ddpm_details": config.ddpm_details,
        "patch_size": config.patch_size,
    }


def _embedded_classes(config: ClassFlags) -> int | None:
    """The number of labels: one for each class and, with class dropout, a last one for "no class". None: no labels."""
    check_classes(config)
    return count_classes(config) + (config.class_dropout > 0) if config.class_cond else None


def count_classes(config: ClassFlags) -> int:
    """The number of classes of a class-conditional model, without "no class"."""
    return config.num_classes or DEFAULT_NUM_CLASSES


def check_images_fit(config: Flags, name: str, bytes_per_number: int) -> None:
    """Check that the number of images that the flag `name` gives does not need an impossible amount of memory.

    :param bytes_per_number: of each of the 3 numbers of a pixel.
    :raises ValueError: all images together take more than `MAX_IMAGES_GB` GB; the message names the flag.
    """
    count, (height, width) = getattr(config, name), height_width(config.output_size)
    gigabytes = count * config.colour_channels * height * width * bytes_per_number / 1e9
    if gigabytes > MAX_IMAGES_GB:
        raise ValueError(
            f"--{name} {count}: this many images of {width}x{height} pixels take "
            f"{gigabytes:,.0f} GB of memory; {MAX_IMAGES_GB} GB are the limit"
        )


def join_processes(config: Flags) -> None:
    """Join the other processes of the job, if a launcher has started several (see `dist_util.setup_dist`).

    :raises ValueError: another process has other flags; only paths to read from may differ.
    """
    dist_util.setup_dist()
    known = declared(type(config))
    shared = {f"--{name}": value for name, value in config.to_dict().items() if not known[name].per_machine}
    dist_util.check_alike(shared, "start all processes with the same flags")


def read_flag(flag_name: str, path: str, image_size: int | tuple[int, int], channels: int = 3) -> ImageSet:
    """The images at `path` (see `read_images`), which are to be measured.

    :param flag_name: of the flag that names the path.
    :raises ValueError: they are unusable or too few; the message names the flag.
    """
    with errors_about(flag_name):
        images = read_images(path, image_size, channels=channels)
        if len(images) < MIN_MEASURED:
            raise ValueError(
                f"{path}: holds {len(images)} images, too few to measure; give at least {MIN_MEASURED}"
            )
        return images


def read_images_alike(
    place: str,
    image_size: int | tuple[int, int],
    cache_limit_gb: float = 2.0,
    flag_name: str = "data_dir",
    channels: int = 3,
) -> ImageSet:
    """Read the images at `place` (see `read_images`) in all processes of the job.

    Rank 0 reads first and makes a cache, which the other processes on its machine use.

    :param flag_name: the name of the flag that gives the place.
    :raises ValueError: the images are unusable, or not the same in all processes; the message names the flag.
    """
    with dist_util.rank_0_first(), errors_about(flag_name):
        images = read_images(
            place,
            image_size,
            channels=channels,
            cache_limit_gb=cache_limit_gb,
            progress=dist_util.get_rank() == 0,
        )
    contents = f"{len(images):,} images (fingerprint {images.fingerprint[:12]})"
    dist_util.check_alike({f"--{flag_name}": contents}, "all processes need the same images")
    return images
