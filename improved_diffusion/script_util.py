"""The flags' defaults, and the factories that turn flags into models, diffusions and data."""

import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util, weighting
from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion.cpu.machine import usable_cores
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.flags import add_dict_to_argparser, args_to_dict, check_range, one_line, str2bool  # noqa: F401
from improved_diffusion.image_datasets import read_images
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.run import terminal
from improved_diffusion.unet import SuperResModel, UNetModel

DEFAULT_NUM_CLASSES = 1000
DEFAULT_ATTENTION = "16,8"
# Channel multipliers of improved-diffusion (32, 64, 256) and, for other sizes, of the same taste.
CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 1, 2, 2, 4, 4),
}
# What a model can predict, by the names of --prediction.
PREDICTIONS = {
    "epsilon": gd.ModelMeanType.EPSILON,
    "x_start": gd.ModelMeanType.START_X,
    "v": gd.ModelMeanType.VELOCITY,
    "edm": gd.ModelMeanType.EDM,
}
LOSS_WEIGHTINGS = ("none", "min_snr", "edm")
SIGMA_DATA = 0.5  # standard deviation of images in [-1, 1], as in Karras et al. 2022
# Where to read from may be another place on each machine.
MACHINE_PATHS = ("data_dir", "model_path", "base_samples")
MAX_LEVELS = 10  # of --channel_mult
MAX_MULTIPLIER = 64
MAX_ATTENTION_SIDE = 128  # pixels; attention there holds 2^28 numbers per head and image
MAX_PARAMETERS = 2_000_000_000
MAX_IMAGES_GB = 16


def diffusion_defaults() -> dict[str, Any]:
    """Flags of the diffusion process, with their defaults."""
    return {
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "sigma_small": False,
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": True,
        "rescale_learned_sigmas": True,
    }


def model_defaults() -> dict[str, Any]:
    """Flags of the UNet, with their defaults: the CIFAR-10 model of the README."""
    return {
        "image_size": 32,
        "num_channels": 64,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "attention_resolutions": DEFAULT_ATTENTION,
        "channel_mult": "",
        "dropout": 0.0,
        "learn_sigma": False,
        "class_cond": False,
        "num_classes": 0,
        "class_dropout": 0.0,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "ddpm_details": False,
    }


def sr_model_defaults() -> dict[str, Any]:
    """Flags of the super-resolution UNet, with their defaults."""
    sizes = {"large_size": 256, "small_size": 64}
    return {**sizes, **{name: value for name, value in model_defaults().items() if name != "image_size"}}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """All arguments of `create_model_and_diffusion`, with their defaults."""
    return {**model_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """All arguments of `sr_create_model_and_diffusion`, with their defaults."""
    return {**sr_model_defaults(), **diffusion_defaults()}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Build the model and its diffusion.

    :param flags: any of `model_and_diffusion_defaults`; those left out take their default.
    :raises ValueError: a flag's value is impossible; the message names it.
    """
    flags = {**model_and_diffusion_defaults(), **flags}
    return (
        create_model(**args_to_dict(flags, model_defaults())),
        create_gaussian_diffusion(**_diffusion_arguments(flags)),
    )


def sr_create_model_and_diffusion(**flags: Any) -> tuple[SuperResModel, SpacedDiffusion]:
    """Build a super-resolution model and its diffusion; see `sr_model_and_diffusion_defaults`."""
    flags = {**sr_model_and_diffusion_defaults(), **flags}
    model_flags = {key: flags[key] for key in model_defaults() if key != "image_size"}
    return (
        sr_create_model(large_size=flags["large_size"], small_size=flags["small_size"], **model_flags),
        create_gaussian_diffusion(**_diffusion_arguments(flags)),
    )


def is_super_resolution(flags: dict[str, Any]) -> bool:
    """Whether `flags`, of a command or a checkpoint, are those of a super-resolution model."""
    return "large_size" in flags


def output_size(flags: dict[str, Any]) -> int:
    """The side in pixels of the images that the model described by `flags` makes."""
    return flags["large_size"] if is_super_resolution(flags) else flags["image_size"]


def create_from_flags(flags: dict[str, Any]) -> tuple[UNetModel, SpacedDiffusion]:
    """Build the model, super-resolution or not, and the diffusion that the flags of a script describe."""
    if is_super_resolution(flags):
        return sr_create_model_and_diffusion(**args_to_dict(flags, sr_model_and_diffusion_defaults()))
    return create_model_and_diffusion(**args_to_dict(flags, model_and_diffusion_defaults()))


def create_model(**flags: Any) -> UNetModel:
    """Build a UNet from any of the flags of `model_defaults`."""
    return _build(UNetModel, {**model_defaults(), **flags})


def sr_create_model(large_size: int, small_size: int, **flags: Any) -> SuperResModel:
    """Build a UNet that sees an image of `small_size` pixels while it makes one of `large_size`."""
    if not 0 < small_size < large_size:
        raise ValueError(f"--small_size {small_size}: must be positive and below --large_size {large_size}")
    try:
        return _build(SuperResModel, {**model_defaults(), **flags, "image_size": large_size})
    except ValueError as error:
        raise ValueError(str(error).replace("--image_size", "--large_size")) from None


def _build(model: type[UNetModel], flags: dict[str, Any]) -> UNetModel:
    arguments = {"in_channels": 3, **_unet_arguments(flags)}
    with th.device("meta"):  # a model without numbers, which takes no memory
        # Embeddings apart: to initialise one there, torch loads its compiler.
        skeleton = model(**{**arguments, "num_classes": None})
    parameters = sum(p.numel() for p in skeleton.parameters())
    parameters += 4 * arguments["model_channels"] * (arguments["num_classes"] or 0)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"--num_channels, --channel_mult, --num_res_blocks: this model would have {parameters:,} parameters; "
            f"{MAX_PARAMETERS:,} are the limit"
        )
    return model(**arguments)


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
    """Build the diffusion process; the arguments are the flags of `diffusion_defaults`.

    :param prediction: what the model predicts, a name in `PREDICTIONS`; `predict_xstart` stands for "x_start".
    :param loss_weighting: "none", "min_snr" or "edm"; see `weighting`.
    :param sigma_mean, sigma_std, uniform_share: how often "edm" looks at which noise; see `log_normal_shares`.
    :raises ValueError: a value is unknown, or two contradict each other.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"--prediction {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
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
        model_mean_type=PREDICTIONS["x_start" if predict_xstart else prediction],
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        sigma_data=SIGMA_DATA,
        loss_weighting=weights,
    )


def _diffusion_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    check_range(flags, {"diffusion_steps": 1})
    arguments = {key: flags[key] for key in diffusion_defaults()}
    return {"steps": arguments.pop("diffusion_steps"), "learn_sigma": flags["learn_sigma"], **arguments}


def _unet_arguments(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `UNetModel` that the model flags stand for."""
    check_range(
        flags, {"image_size": 1, "num_channels": 1, "num_res_blocks": 1, "num_heads": 1, "num_classes": 0}
    )
    if not 0 <= flags["dropout"] < 1:
        raise ValueError(f"--dropout {flags['dropout']}: must lie in [0, 1)")
    if flags["num_heads_upsample"] != -1:
        check_range(flags, {"num_heads_upsample": 1})
    channel_mult = _channel_mult(flags["channel_mult"], flags["image_size"])
    return {
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "num_res_blocks": flags["num_res_blocks"],
        "attention_resolutions": _attention_factors(
            flags["attention_resolutions"], flags["image_size"], len(channel_mult)
        ),
        "dropout": flags["dropout"],
        "channel_mult": channel_mult,
        "num_classes": _embedded_classes(flags),
        "use_checkpoint": flags["use_checkpoint"],
        "num_heads": flags["num_heads"],
        "num_heads_upsample": flags["num_heads_upsample"],
        "use_scale_shift_norm": flags["use_scale_shift_norm"],
        "ddpm_details": flags["ddpm_details"],
    }


def _embedded_classes(flags: dict[str, Any]) -> int | None:
    """The labels that the model knows: its classes and, with class dropout, a last one for "no class"."""
    if not 0 <= flags["class_dropout"] < 1:
        raise ValueError(f"--class_dropout {flags['class_dropout']}: must lie in [0, 1)")
    if not flags["class_cond"]:
        if flags["class_dropout"]:
            raise ValueError(f"--class_dropout {flags['class_dropout']}: needs --class_cond True")
        return None
    return count_classes(flags) + (flags["class_dropout"] > 0)


def count_classes(flags: dict[str, Any]) -> int:
    """The classes that a class-conditional model described by `flags` can be asked for, "no class" not among them."""
    return flags["num_classes"] or DEFAULT_NUM_CLASSES


def _channel_mult(text: str | Iterable[int], image_size: int) -> tuple[int, ...]:
    if text:
        multipliers = _integers(text, "channel_mult")
        if len(multipliers) > MAX_LEVELS or max(multipliers) > MAX_MULTIPLIER:
            raise ValueError(
                f"--channel_mult: at most {MAX_LEVELS} levels and multipliers up to {MAX_MULTIPLIER}, please"
            )
        divisor = 2 ** (len(multipliers) - 1)
        if image_size % divisor:
            raise ValueError(
                f"--image_size {image_size}: the {len(multipliers)} levels of --channel_mult need a multiple "
                f"of {divisor}; try {image_size // divisor * divisor or divisor}, or fewer levels"
            )
        return multipliers
    if image_size in CHANNEL_MULT:
        return CHANNEL_MULT[image_size]
    nearest = min(CHANNEL_MULT, key=lambda size: abs(math.log(size / image_size)))
    halvings = (image_size & -image_size).bit_length() - 1
    if halvings == 0:
        raise ValueError(
            f"--image_size {image_size}: an odd size cannot be halved; try {image_size + 1}, or --channel_mult 1"
        )
    # Levels below 4 pixels have nothing left to see.
    while halvings > 1 and image_size >> halvings < 4:
        halvings -= 1
    return CHANNEL_MULT[nearest][: halvings + 1]


def _attention_factors(text: str, image_size: int, levels: int) -> tuple[int, ...]:
    """The downsampling factors at which there is attention, from resolutions in pixels."""
    sizes = [image_size >> level for level in range(levels)]
    resolutions = _integers(text, "attention_resolutions") if text else ()
    if text == DEFAULT_ATTENTION and any(image_size % r for r in resolutions if r <= image_size):
        resolutions = tuple(size for size in sizes if size <= 16)
    for resolution in resolutions:
        if resolution <= image_size and image_size % resolution:
            raise ValueError(
                f"--attention_resolutions {resolution}: does not divide the image size {image_size}; this model "
                f"has the resolutions {', '.join(map(str, sizes))}"
            )
    # The middle of the model, at its lowest resolution, always has attention.
    largest = max([sizes[-1], *(resolution for resolution in resolutions if resolution in sizes)])
    if largest > MAX_ATTENTION_SIDE:
        raise ValueError(
            f"--attention_resolutions, --channel_mult: attention at {largest}x{largest} pixels needs more memory "
            f"than there is; at most {MAX_ATTENTION_SIDE}x{MAX_ATTENTION_SIDE}"
        )
    return tuple(image_size // resolution for resolution in resolutions if resolution <= image_size)


def _integers(text: str | Iterable[int], flag: str) -> tuple[int, ...]:
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        numbers = tuple(int(part) for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--{flag} {text!r}: expected positive whole numbers separated by commas")
    return numbers


def check_images_fit(flags: dict[str, Any], name: str, bytes_per_number: int) -> None:
    """Check that the memory of some machine holds as many images as the flag `name` says, all at a time.

    :raises ValueError: naming the flag.
    """
    side = output_size(flags)
    gigabytes = flags[name] * 3 * side**2 * bytes_per_number / 1e9
    if gigabytes > MAX_IMAGES_GB:
        raise ValueError(
            f"--{name} {flags[name]}: so many images of {side}x{side} pixels take "
            f"{gigabytes:,.0f} GB of memory; {MAX_IMAGES_GB} GB are the limit"
        )


def join_processes(flags: dict[str, Any]) -> None:
    """Join the other processes of the job, if a launcher started several (see `dist_util.setup_dist`).

    :raises ValueError: they were started with other flags; only paths to read from may differ.
    """
    dist_util.setup_dist()
    shared = {name: value for name, value in flags.items() if name not in MACHINE_PATHS}
    dist_util.check_alike(shared, "start all processes with the same flags")


def read_images_alike(data_dir: str, image_size: int, cache_limit_gb: float = 2.0) -> ImageSet:
    """The images of `data_dir` (see `read_images`), in all processes of the job.

    Rank 0 reads first, so that the others on its machine find its cache.

    :raises ValueError: they are unusable, or not the same in all processes.
    """
    with dist_util.rank_0_first():
        images = read_images(
            data_dir, image_size, cache_limit_gb=cache_limit_gb, progress=dist_util.get_rank() == 0
        )
    contents = f"{len(images):,} images (fingerprint {images.fingerprint[:12]})"
    dist_util.check_alike({"data_dir": contents}, "all processes need the same images")
    return images


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: users' mistakes in one line and code 2, without a traceback."""
    terminal.clean_up_on_ctrl_c()
    if th.get_num_threads() > usable_cores():  # PyTorch does not look at a container's CPU quota
        th.set_num_threads(usable_cores())
    try:
        code = main() or 0
        dist_util.finish()
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, bf.Error) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
