"""Flags, their defaults and the factories that turn them into models and diffusions: the one place where parts meet."""

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import blobfile as bf
import torch as th

from improved_diffusion import checkpoint, dist_util
from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion.checkpoint import Checkpoint
from improved_diffusion.image_datasets import read_images
from improved_diffusion.image_set import ImageSet
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.storage import absolute, new_directory, open_atomic
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

HELP = {
    # model
    "image_size": "side of the square images in pixels",
    "num_channels": "channels of the UNet's first level, a multiple of 32",
    "num_res_blocks": "residual blocks per level",
    "num_heads": "attention heads",
    "num_heads_upsample": "attention heads on the way up; -1: as on the way down",
    "attention_resolutions": "comma-separated resolutions, in pixels, at which there is attention; the default "
    "means all levels of at most 16 pixels where the image size has no levels of 16 and 8",
    "channel_mult": "comma-separated channel multipliers, one per level (1,2,2,2); empty: chosen by image size",
    "dropout": "dropout probability",
    "learn_sigma": "let the model predict the variance too",
    "class_cond": "condition the model on the class of the image",
    "num_classes": "number of classes with --class_cond True; 0: as many as the data have",
    "class_dropout": "share of training images whose class is withheld, for guidance in sampling; 0.1 is usual",
    "use_checkpoint": "recompute activations in the backward pass: less memory, about a third more time",
    "use_scale_shift_norm": "let the timestep scale and shift the normalisation instead of being added",
    "ddpm_details": "compute as the code of Ho et al. 2020 does in detail; set by convert_checkpoint.py where needed",
    "large_size": "side of the high-resolution images in pixels",
    "small_size": "side of the low-resolution images in pixels",
    # diffusion
    "diffusion_steps": "number of diffusion steps T",
    "noise_schedule": "linear or cosine",
    "timestep_respacing": 'use fewer steps: a count ("250"), counts per section ("10,15,20") or "ddim50"; empty: all',
    "sigma_small": "the smaller of the two fixed variances in sampling",
    "use_kl": "train on the variational bound itself",
    "predict_xstart": "the model predicts the clean image instead of the noise",
    "rescale_timesteps": "hand the model timesteps scaled to 0..1000",
    "rescale_learned_sigmas": "with --learn_sigma, weigh the variational term against the mean squared error",
    # data
    "data_dir": "folder of images or .npz file; 'builtin': the built-in shapes; empty, in training: "
    "CIFAR-10, or else the shapes",
    "random_flip": "mirror each training image left-right with probability 1/2",
    "cache_limit_gb": "data sets up to this size, decoded, live in memory; larger ones are streamed",
    "data_workers": "processes that decode images of a streamed data set",
    # training
    "schedule_sampler": "how timesteps are drawn: uniform or loss-second-moment",
    "lr": "learning rate of AdamW",
    "weight_decay": "decoupled weight decay of AdamW",
    "lr_anneal_steps": "anneal the learning rate linearly to zero over this many steps; 0: do not",
    "use_fp16": "train in 16 bits; not available: it is said so, and the training is in 32 bits",
    "fp16_scale_growth": "with --use_fp16, how fast the loss scale grows; without effect in 32 bits",
    "lr_warmup_steps": "raise the learning rate linearly from zero over this many steps",
    "grad_clip": "clip the gradient's norm to this; 0: do not",
    "batch_size": "images per optimizer step (training) or at a time (drawing, measuring), in each process",
    "microbatch": "images per forward and backward pass; -1: the whole batch; changes memory, not the result",
    "ema_rate": "comma-separated rates of the moving averages of the weights",
    "total_steps": "stop after this many optimizer steps in total",
    "seed": "of everything random",
    # running
    "log_dir": "where the output goes; empty: $OPENAI_LOGDIR, or else a new dated directory",
    "log_interval": "steps per row of progress.csv",
    "save_interval": "steps between checkpoints",
    "keep_last": "delete all but this many of the newest checkpoints; 0: keep all",
    "keep_every": "with --keep_last, also keep the checkpoints whose step this divides",
    "max_hours": "save and stop after this many hours of this session; 0: do not",
    "resume_checkpoint": "continue from this run directory (its newest intact checkpoint) or checkpoint file",
    "allow_changed_flags": "resume although flags that change the result differ from the checkpoint's",
    "skip_nonfinite": "skip up to this many steps in a row whose loss or gradient is not finite; 0: stop",
    "tensorboard": "also write TensorBoard event files",
    # conversion
    "to_diffusers": "new folder for the model of --model_path, as diffusers saves its models",
    "from_diffusers": "folder of a model that diffusers has saved; it becomes a run in --log_dir",
    # sampling
    "model_path": "run directory (its newest EMA weights are used) or .pt file",
    "num_samples": "number of images; where they are made or measured from others, at most as many as there are",
    "base_samples": "images to enlarge: an .npz file (such as image_sample.py writes) or a folder",
    "use_ddim": "sample with DDIM (deterministic) instead of ancestral sampling",
    "clip_denoised": "clip the predicted clean image to [-1, 1] in every step",
    "class_label": "comma-separated class names or numbers to draw; empty: all classes in turn",
    "guidance_scale": "strengthen the class's influence (classifier-free guidance, needs --class_dropout in training); "
    "1: as trained",
    "save_png": "also write every image as a PNG of its own",
}

# Flags that define what is learned. They travel with the checkpoint and cannot be contradicted.
ARCHITECTURE = (
    "image_size",
    "num_channels",
    "num_res_blocks",
    "num_heads",
    "num_heads_upsample",
    "attention_resolutions",
    "channel_mult",
    "learn_sigma",
    "class_cond",
    "num_classes",
    "class_dropout",
    "use_scale_shift_norm",
    "ddpm_details",
    "large_size",
    "small_size",
)
PROCESS = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps")
# Flags that a resumed run cannot change without becoming another run.
TRAINED_WITH = (
    "data_dir",
    "random_flip",
    "seed",
    "schedule_sampler",
    "use_kl",
    "rescale_learned_sigmas",
    "dropout",
)

# Where to read from may be another place on each machine.
MACHINE_PATHS = ("data_dir", "model_path", "base_samples")

# Beyond these, a flag is a slip of the keyboard, and would fill the memory before anybody notices.
AT_MOST = {
    "image_size": 1024,
    "num_channels": 4096,
    "num_res_blocks": 32,
    "num_heads": 1024,
    "num_heads_upsample": 1024,
    "num_classes": 100_000,
    "batch_size": 10_000_000,
    "microbatch": 10_000_000,
    "num_samples": 10_000_000,
    "diffusion_steps": 100_000,
    "total_steps": 10**9,
    "data_workers": 256,
    "seed": 2**63 - 1,
}
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
) -> SpacedDiffusion:
    """Build the diffusion process; the arguments are the flags of `diffusion_defaults`."""
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
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=betas,
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
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
    return (flags["num_classes"] or DEFAULT_NUM_CLASSES) + (flags["class_dropout"] > 0)


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


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, and remembers which flags were given."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {_one_line(message)}; --help explains every flag\n")

    def parse_flags(self, argv: list[str] | None = None) -> tuple[dict[str, Any], set[str]]:
        """Parse `argv`. :return: all flags with their values, and the names of those that were given."""
        flags = vars(self.parse_args(argv))
        defaults = {name: self.get_default(name) for name in flags}
        unset = argparse.Namespace(**dict.fromkeys(flags, _UNSET))
        given = {name for name, value in vars(self.parse_args(argv, unset)).items() if value is not _UNSET}
        assert flags.keys() == defaults.keys()
        return flags, given


_UNSET = object()


def add_dict_to_argparser(
    parser: argparse.ArgumentParser, default_dict: dict[str, Any], title: str | None = None
) -> None:
    """Add a flag for every key, typed by its default, explained by `HELP` and listed under `title`."""
    group = parser.add_argument_group(title) if title else parser
    for name, default in default_dict.items():
        kind = str2bool if isinstance(default, bool) else str if default is None else type(default)
        text = HELP.get(name, "").replace("%", "%%")
        group.add_argument(f"--{name}", default=default, type=kind, help=text or None, metavar=_METAVAR[kind])


def args_to_dict(args: argparse.Namespace | dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values of `keys` in parsed arguments."""
    values = args if isinstance(args, dict) else vars(args)
    return {key: values[key] for key in keys}


def str2bool(text: str | bool) -> bool:
    """A truth value as people write it. :raises argparse.ArgumentTypeError: it is not one."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1", "on"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


_METAVAR = {str2bool: "True|False", str: "TEXT", int: "N", float: "X"}


def check_range(flags: dict[str, Any], least: dict[str, float]) -> None:
    """Check that flags are finite, not below `least` and not above `AT_MOST`.

    :raises ValueError: naming the first that is not.
    """
    for name, minimum in least.items():
        maximum = AT_MOST.get(name, math.inf)
        if not (minimum <= flags[name] <= maximum and flags[name] < math.inf):
            limits = f"at least {minimum}" + (f" and at most {maximum}" if maximum < math.inf else "")
            raise ValueError(f"--{name} {flags[name]}: must be {limits}")


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


def _stored_arguments(source: Checkpoint, flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a checkpoint. :raises ValueError: one is of another type than the flag of this name."""
    stored = source.state.get("arguments", {})
    for name, value in stored.items():
        kind = type(flags.get(name, value))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(
                f"{source.path('state')}: damaged (its --{name} {value!r} should be a {kind.__name__})"
            )
    return stored


def _check_same_kind(where: str, stored: dict[str, Any], flags: dict[str, Any]) -> None:
    """Refuse a super-resolution model where `flags` are those of a plain one, and the other way round."""
    if stored and is_super_resolution(stored) != is_super_resolution(flags):
        problem = "holds no super-resolution model; use the scripts image_..."
        if is_super_resolution(stored):
            problem = "holds a super-resolution model, which is for the scripts super_res_... only"
        raise ValueError(f"{where}: {problem}")


def merge_stored_flags(
    flags: dict[str, Any], given: set[str], stored: dict[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Let a checkpoint's arguments take the place of defaults.

    :param flags: the flags of this command; `given` names those that the user gave.
    :param stored: the checkpoint's arguments.
    :param names: the flags to take from there; those that define the model must not contradict it.
    :raises ValueError: a given flag of `ARCHITECTURE` or `PROCESS` differs from the checkpoint's.
    """
    merged = dict(flags)
    for name in names:
        if name not in stored:
            continue
        if name in given and name in ARCHITECTURE + PROCESS and flags[name] != stored[name]:
            raise ValueError(
                f"--{name} {flags[name]}: contradicts the checkpoint, which was trained with {stored[name]}; "
                "leave the flag out"
            )
        if name not in given:
            merged[name] = stored[name]
    return merged


def find_data(data_dir: str, datasets_dir: str, log: Callable[[str], None] = print) -> str:
    """The data to train on: what the user named, or CIFAR-10 if it can be had, or the built-in shapes.

    :param data_dir: the flag; returned as it is unless empty.
    :param datasets_dir: the folder with `cifar10.py` and what that has prepared.
    :return: a path, or "builtin".
    """
    if data_dir:
        return data_dir
    prepared = os.path.join(datasets_dir, "cifar_train")
    if os.path.exists(os.path.join(prepared, ".complete")):
        return prepared
    script = os.path.join(datasets_dir, "cifar10.py")
    if os.path.exists(script):
        log("No --data_dir given and CIFAR-10 is not prepared yet: preparing it now.")
        if subprocess.run([sys.executable, script]).returncode == 0:
            return prepared
    for line in (
        "*" * 78,
        "CIFAR-10 could not be had: TRAINING ON THE BUILT-IN SHAPES INSTEAD.",
        f"For CIFAR-10: python {script} --archive cifar-10-python.tar.gz",
        "For your own images: --data_dir FOLDER",
        "*" * 78,
    ):
        log(line)
    return "builtin"


def choose_log_dir(flags: dict[str, Any], runs_dir: str) -> str:
    """Where a training run lives: --log_dir, $OPENAI_LOGDIR, beside what it resumes, or new in `runs_dir`."""
    log_dir = flags["log_dir"] or os.environ.get("OPENAI_LOGDIR", "")
    resume = flags["resume_checkpoint"]
    if not log_dir and resume:
        log_dir = resume if bf.isdir(resume) else bf.dirname(absolute(resume))
    return absolute(log_dir or new_directory(runs_dir))


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


def choose_out_dir(flags: dict[str, Any], parent: str) -> str:
    """Where a script that reads a model writes: --log_dir, $OPENAI_LOGDIR, or new in `parent`; rank 0 makes it."""
    out_dir = absolute(flags["log_dir"] or os.environ.get("OPENAI_LOGDIR", "") or new_directory(parent))
    if dist_util.get_rank() == 0:
        bf.makedirs(out_dir)
    return out_dir


def check_model_path(flags: dict[str, Any], runs_dir: str) -> None:
    """Check that --model_path is given. :raises ValueError: naming the newest run in `runs_dir`, if any."""
    if flags["model_path"]:
        return
    found = [os.path.join(runs_dir, name) for name in os.listdir(runs_dir)] if os.path.isdir(runs_dir) else []
    found = [run for run in found if checkpoint.steps(run)]
    example = f", such as {max(found, key=os.path.getmtime)}" if found else ""
    raise ValueError(f"--model_path is missing: give a run directory or a .pt file{example}")


def choose_source(
    resume_checkpoint: str, log_dir: str, log: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint that a run in `log_dir` continues, or None for a new run.

    A directory that already holds checkpoints is continued, whatever that run had started from, so that the
    same command can be given again.

    :raises ValueError: there is no such checkpoint, or going on from it would overwrite newer ones.
    """
    present = checkpoint.steps(log_dir)
    if not resume_checkpoint:
        return checkpoint.find(log_dir, log=log) if present else None
    resume = absolute(resume_checkpoint)
    if present and (bf.isdir(resume) or bf.dirname(resume) != log_dir):
        return checkpoint.find(log_dir, log=log)
    try:
        source = checkpoint.find(resume, log=log)
    except ValueError as error:
        raise ValueError(f"--resume_checkpoint {error}") from None
    if present and source.step < present[-1]:
        raise ValueError(
            f"--resume_checkpoint {resume}: going on from step {source.step} would overwrite the newer checkpoints "
            f"up to step {present[-1]} beside it; give --log_dir a new directory to branch off, or give the "
            "directory to continue from the newest"
        )
    return source


def merge_for_resume(flags: dict[str, Any], given: set[str], source: Checkpoint) -> dict[str, Any]:
    """The flags of a resumed run: the checkpoint's, except for those given that may change.

    :raises ValueError: a given flag would make it another run; the message names it.
    """
    stored = _stored_arguments(source, flags)
    _check_same_kind(source.folder, stored, flags)
    stays = {"log_dir", "resume_checkpoint", "allow_changed_flags"}
    merged = {
        name: value if name in given | stays else stored.get(name, value) for name, value in flags.items()
    }
    for name in ARCHITECTURE + PROCESS + TRAINED_WITH:
        if name not in merged or name not in stored or merged[name] == stored[name]:
            continue
        if name in ARCHITECTURE or not flags["allow_changed_flags"]:
            hint = "" if name in ARCHITECTURE else ", or --allow_changed_flags True to go on all the same"
            raise ValueError(
                f"--{name} {merged[name]}: the run to resume was started with {stored[name]!r}; leave the flag "
                f"out{hint}"
            )
    return merged


def check_same_data(flags: dict[str, Any], source: Checkpoint, fingerprint: str) -> None:
    """Refuse to resume on other data. :raises ValueError: `fingerprint` is not that of `source`."""
    trained_on = source.state.get("data", {}).get("fingerprint", fingerprint)
    if trained_on != fingerprint and not flags["allow_changed_flags"]:
        raise ValueError(
            f"--data_dir {flags['data_dir']}: its images are not those that the run to resume was trained on; give "
            "the same data, or --allow_changed_flags True to go on all the same"
        )


def record_run(log_dir: str, flags: dict[str, Any], facts: dict[str, Any], step: int) -> None:
    """Write ``args.json`` and ``run.json``, which the workbook is made from, into `log_dir`.

    :param facts: what shall stand in ``run.json``; the list of sessions is continued here.
    :param step: the step at which this session begins.
    """
    path = os.path.join(log_dir, "run.json")
    before = []
    # A damaged record of earlier sessions is no reason not to train; what can be read of it is kept.
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        content = json.load(file)
        sessions = content.get("sessions") if isinstance(content, dict) else None
        before = (
            [s for s in sessions if isinstance(s, dict) and "started" in s]
            if isinstance(sessions, list)
            else []
        )
    now = datetime.datetime.now().isoformat(timespec="seconds")
    sessions = [*before, {"started": now, "step": step}] if step else [{"started": now, "step": 0}]
    facts = {
        **facts,
        "started": sessions[0]["started"],
        "sessions": sessions,
        "command": shlex.join(["python", *sys.argv]),
    }
    for name, content in (("args.json", flags), ("run.json", facts)):
        with open_atomic(os.path.join(log_dir, name), "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")


def load_trained(
    model_path: str, flags: dict[str, Any], given: set[str], log: Callable[[str], None] = print
) -> tuple[UNetModel, SpacedDiffusion, dict[str, Any], list[str]]:
    """Build the model that `model_path` holds the weights of, and its diffusion.

    :param model_path: a run directory, whose newest EMA weights (of the largest rate) are taken, or a .pt file.
    :param flags: the flags of this command; `given` names those that the user gave.
    :return: the model in eval mode, the diffusion, all flags after the checkpoint's have been taken over
        ("model_path" is the weights file), and the names of the classes (empty when unknown).
    :raises ValueError: there are no such weights, or a given flag contradicts them.
    """
    path = absolute(model_path)
    if not bf.exists(path):
        raise ValueError(f"--model_path {model_path}: there is no such file or directory")
    if bf.isdir(path):
        source = checkpoint.find(path, log=log)
        rates = sorted(source.ema_rates, key=float)
        kind = rates[-1] if rates else "model"
        path, weights = source.path(kind), source.load(kind)
    else:
        kind = checkpoint.kind_of(path)
        if kind in ("opt", "state"):
            raise ValueError(
                f"--model_path {model_path}: holds no weights; give a model or ema file, or the directory"
            )
        source = checkpoint.state_beside(path)
        weights = source.load(kind) if source else checkpoint.load_tensors(path)
    stored = _stored_arguments(source, flags) if source else {}
    _check_same_kind(f"--model_path {path}", stored, flags)
    if not stored:
        log(f"{path}: no arguments are stored beside it; the flags and their defaults describe the model")
    super_resolution = is_super_resolution(flags)
    described = sr_model_and_diffusion_defaults() if super_resolution else model_and_diffusion_defaults()
    flags = {**merge_stored_flags(flags, given, stored, described), "model_path": path}
    if "timestep_respacing" not in given:
        flags["timestep_respacing"] = ""
    model, diffusion = create_from_flags(flags)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1].strip()
        raise ValueError(
            f"--model_path {path}: its weights do not fit the model that the flags describe ({first}); give the "
            "flags it was trained with"
        ) from None
    log(
        f"weights: {path}"
        + (f" ({source.step:,} steps of {source.state.get('samples', 0):,} images)" if source else "")
    )
    class_names = source.state.get("data", {}).get("class_names", []) if source else []
    return model.eval(), diffusion, flags, class_names


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: users' mistakes in one line and code 2, without a traceback."""
    try:
        code = main() or 0
        dist_util.finish()
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, bf.Error) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


def _one_line(message: str) -> str:
    """`message` without line ends and what else a terminal might act upon; file names can hold anything."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]\s*", " ", message)
