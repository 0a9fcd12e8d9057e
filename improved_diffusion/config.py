"""Every flag of every script, declared once: name, type, default, range, help, and its role in a resumed run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from improved_diffusion.flags import Flags, Role, flag, named, with_defaults
from improved_diffusion.learning_rate import LR_DECAYS, check_lr_schedule
from improved_diffusion.levels import DEFAULT_ATTENTION, attention_factors, channel_multipliers, check_width
from improved_diffusion.recipes import RECIPES, explain

NOISE_SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("epsilon", "x_start", "v", "edm")
SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment", "log-normal")
OPTIMIZERS = ("adamw", "muon")
LOSS_WEIGHTINGS = ("none", "min_snr", "edm")
PRECISIONS = ("auto", "fp32", "bf16")
EXCHANGES = ("float32", "bfloat16")
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_3m", "sde_dpmpp_2m", "unipc", "deis", "ipndm")
SPACINGS = ("uniform", "quadratic", "logsnr", "karras")
AUTO = "auto"
MOST_IMAGES = 10_000_000
SHORTEST, LONGEST = 0.01, 0.28  # of --ema_lengths; a flat profile, with gamma 0, has 0.2887
MOST_STEPS = 10**9
MOST_GUIDANCE = 1000


def _problem(parse: Callable[[Any], object]) -> Callable[[Any], str | None]:
    """A function that returns the message of the ValueError that `parse` raises for a value, or None."""

    def check(value: Any) -> str | None:
        try:
            parse(value)
        except ValueError as error:
            return str(error)
        return None

    return check


def ema_rates(text: str | float) -> list[str]:
    """The rates in a comma-separated list, as texts for file names.

    :raises ValueError: a rate is not a number in [0, 1), or stands there twice. The message is the end of a sentence.
    """
    rates = [part.strip() for part in str(text).split(",")]
    for rate in rates:
        try:
            # Few characters, because a rate is a part of file names.
            valid = re.fullmatch(r"[0-9.e-]{1,20}", rate) and 0 <= float(rate) < 1
        except ValueError:
            valid = False
        if not valid:
            raise ValueError("expected numbers from 0 to below 1, separated by commas")
    if len(set(rates)) != len(rates):
        raise ValueError("a rate is given twice")
    return rates


def power_lengths(text: str) -> list[str]:
    """The lengths of power-function averages in a comma-separated list, as texts for file names; none in "".

    :raises ValueError: a length is not a number from `SHORTEST` to `LONGEST`, or stands there twice. The message is
        the end of a sentence.
    """
    lengths = [part.strip() for part in text.split(",")] if text.strip() else []
    for length in lengths:
        if not (re.fullmatch(r"0\.[0-9]{1,8}", length) and SHORTEST <= float(length) <= LONGEST):
            raise ValueError(f"expected numbers from {SHORTEST} to {LONGEST}, separated by commas")
    if len({float(length) for length in lengths}) != len(lengths):
        raise ValueError("a length is given twice")
    return lengths


def _check_length(length: float) -> str | None:
    if length == 0 or SHORTEST <= length <= LONGEST:
        return None
    return f"expected a number from {SHORTEST} to {LONGEST}, or 0"


def interval(text: str) -> tuple[float, float] | None:
    """The two numbers in a text such as "0.2,3"; None for an empty text.

    :raises ValueError: they are not two increasing numbers from 0 on. The message is the end of a sentence.
    """
    if not text:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 <= low < high < float("inf"):
        raise ValueError("expected two numbers, the first one smaller, separated by a comma")
    return low, high


def _check_cores(text: str) -> str | None:
    if text == AUTO or (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= 1024):
        return None
    return "use auto, or a number of cores from 1 on"


def _check_microbatch(size: int) -> str | None:
    return None if size else "give the images per pass, or -1 for the whole batch"


# -- what describes a model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColourFlags(Flags):
    """The colours of the images."""

    TITLE: ClassVar[str] = "images"
    channels: int = flag(
        0,
        "channels of the images: 1 for shades of grey, 3 for colours; 0: 1 if all training images are grey",
        check=lambda channels: None if channels in (0, 1, 3) else "use 1, 3, or 0 for those of the data",
        role=Role.ARCHITECTURE,
    )

    @property
    def colour_channels(self) -> int:
        """The channels of the images that the model makes; 3 where they are neither given nor found in the data."""
        return self.channels or 3


@dataclass(frozen=True)
class ImageFlags(ColourFlags):
    """The size of the images."""

    TITLE: ClassVar[str] = "images"
    image_size: int = flag(
        32, "side of the square images in pixels", low=1, high=1024, role=Role.ARCHITECTURE
    )
    image_width: int = flag(
        0,
        "width in pixels of images that are not square, whose height is --image_size; 0: square",
        low=0,
        high=1024,
        role=Role.ARCHITECTURE,
    )

    @property
    def output_size(self) -> int | tuple[int, int]:
        """The size of the images that the model makes: the side of squares, or (height, width)."""
        square = self.image_width in (0, self.image_size)
        return self.image_size if square else (self.image_size, self.image_width)

    @property
    def output_height(self) -> int:
        """Their height, which decides the levels of the model."""
        return self.image_size


@dataclass(frozen=True)
class SuperResSizes(ColourFlags):
    """The sizes of the images of a super-resolution model."""

    TITLE: ClassVar[str] = "images"
    large_size: int = flag(
        256, "side of the high-resolution images in pixels", low=1, high=1024, role=Role.ARCHITECTURE
    )
    small_size: int = flag(
        64, "side of the low-resolution images in pixels", low=1, high=1024, role=Role.ARCHITECTURE
    )

    @property
    def output_size(self) -> int:
        """The side in pixels of the images that the model makes."""
        return self.large_size

    @property
    def output_height(self) -> int:
        """Their height, which decides the levels of the model."""
        return self.large_size


@dataclass(frozen=True)
class ClassFlags(Flags):
    """The classes of the images."""

    TITLE: ClassVar[str] = "images"
    class_cond: bool = flag(False, "tell the model the class of each image", role=Role.ARCHITECTURE)
    num_classes: int = flag(
        0,
        "number of classes with --class_cond True; 0: as many as the data have",
        low=0,
        high=100_000,
        role=Role.ARCHITECTURE,
    )
    class_dropout: float = flag(
        0.0,
        "share of the training images whose class is hidden from the model, which image_sample.py --guidance_scale "
        "needs; usually 0.1",
        low=0,
        below=1,
        role=Role.ARCHITECTURE,
    )


@dataclass(frozen=True)
class UNetFlags(Flags):
    """The network, apart from the size of its images and their classes."""

    TITLE: ClassVar[str] = "model"
    num_channels: int = flag(
        64,
        "channels of the UNet's first level, a multiple of 32",
        low=1,
        high=4096,
        role=Role.ARCHITECTURE,
    )
    num_res_blocks: int = flag(2, "residual blocks per level", low=1, high=32, role=Role.ARCHITECTURE)
    patch_size: int = flag(
        1,
        "side of the squares of pixels that become the channels of one position of the UNet: 2 saves the cost of the "
        "level of full resolution; --channel_mult and --attention_resolutions then refer to the smaller image",
        low=1,
        high=64,
        role=Role.ARCHITECTURE,
    )
    channel_mult: str = flag(
        "",
        "comma-separated channel multipliers, one per level (1,2,2,2); if not given, chosen by the image size",
        role=Role.ARCHITECTURE,
    )
    attention_resolutions: str = flag(
        DEFAULT_ATTENTION,
        "comma-separated resolutions with attention, in pixels; if the image size has no levels of 16 and 8 pixels, "
        "the default means all levels of at most 16",
        role=Role.ARCHITECTURE,
    )
    num_heads: int = flag(4, "attention heads", low=1, high=1024, role=Role.ARCHITECTURE)
    num_heads_upsample: int = flag(
        -1,
        "attention heads in the upsampling half; -1: as many as --num_heads",
        low=-1,
        high=1024,
        check=lambda heads: None if heads else "give at least 1, or -1 for as many as --num_heads",
        role=Role.ARCHITECTURE,
    )
    dropout: float = flag(0.0, "dropout probability", low=0, below=1, role=Role.TRAINING)
    learn_sigma: bool = flag(False, "let the model predict the variance too", role=Role.ARCHITECTURE)
    use_scale_shift_norm: bool = flag(
        True, "let the timestep scale and shift the normalised activations", role=Role.ARCHITECTURE
    )
    ddpm_details: bool = flag(
        False,
        "compute as the code of Ho et al. 2020 in all details; convert_checkpoint.py sets it for their models",
        role=Role.ARCHITECTURE,
    )
    use_checkpoint: bool = flag(
        False, "gradient checkpointing: less memory, about a third more time; the result is the same"
    )


@dataclass(frozen=True)
class ProcessFlags(Flags):
    """The diffusion process."""

    TITLE: ClassVar[str] = "diffusion"
    diffusion_steps: int = flag(1000, "number of diffusion steps T", low=1, high=100_000, role=Role.PROCESS)
    noise_schedule: str = flag(
        "linear", "how the noise grows over the steps", choices=NOISE_SCHEDULES, role=Role.PROCESS
    )
    predict_xstart: bool = flag(
        False, "the model predicts the clean image instead of the noise", role=Role.PROCESS
    )
    prediction: str = flag(
        "epsilon",
        "what the model predicts: the noise, the clean image, v (Salimans & Ho 2022) or EDM's F (Karras et al. 2022)",
        choices=PREDICTIONS,
        role=Role.PROCESS,
    )
    loss_weighting: str = flag(
        "none",
        "weights of the timesteps in the loss: none, min_snr (Hang et al. 2023) or edm (Karras et al. 2022)",
        choices=LOSS_WEIGHTINGS,
        role=Role.TRAINING,
    )
    sigma_mean: float = flag(
        -1.2,
        "mean of ln sigma, for --schedule_sampler log-normal and --loss_weighting edm; sigma is the noise relative to "
        "the image",
        low=-20,
        high=20,
        role=Role.TRAINING,
    )
    sigma_std: float = flag(
        1.2,
        "standard deviation of ln sigma, for --schedule_sampler log-normal and --loss_weighting edm",
        low=0.01,
        high=100,
        role=Role.TRAINING,
    )
    uniform_share: float = flag(
        0.1,
        "share of the timesteps that are uniform instead of log-normal, for the same flags",
        low=0,
        high=1,
        role=Role.TRAINING,
    )
    rescale_timesteps: bool = flag(True, "scale the timesteps to 0..1000 for the model", role=Role.PROCESS)
    sigma_small: bool = flag(False, "sample with the smaller of the two fixed variances")
    use_kl: bool = flag(False, "train on the variational bound itself", role=Role.TRAINING)
    rescale_learned_sigmas: bool = flag(
        True,
        "with --learn_sigma True, weigh the variational term against the mean squared error",
        role=Role.TRAINING,
    )


@dataclass(frozen=True)
class DiffusionFlags(ProcessFlags):
    """The diffusion process, and which of its timesteps are used."""

    TITLE: ClassVar[str] = "diffusion"
    timestep_respacing: str = flag(
        "", 'use fewer steps: a number (250), numbers per section (10,15,20) or "ddim50"; all if not given'
    )


@dataclass(frozen=True)
class ModelFlags(ImageFlags, ClassFlags, UNetFlags):
    """The arguments of `script_util.create_model`."""


@dataclass(frozen=True)
class SuperResModelFlags(SuperResSizes, ClassFlags, UNetFlags):
    """The arguments of `script_util.sr_create_model`."""


@dataclass(frozen=True)
class ModelAndDiffusion(ModelFlags, DiffusionFlags):
    """A model and its diffusion."""


@dataclass(frozen=True)
class SuperResModelAndDiffusion(SuperResModelFlags, DiffusionFlags):
    """A super-resolution model and its diffusion."""


MODEL_CLASSES = (ColourFlags, ImageFlags, SuperResSizes, ClassFlags, UNetFlags, ProcessFlags, DiffusionFlags)


# -- training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComputeFlags(Flags):
    """The precision and the cores for the computation."""

    TITLE: ClassVar[str] = "computing"
    precision: str = flag(
        AUTO,
        "number format: bf16 computes in 16 bits and keeps the weights in 32; auto measures which is faster here",
        choices=PRECISIONS,
    )
    num_workers: str = flag(AUTO, "cores to compute on: a number, or auto for all", check=_check_cores)


@dataclass(frozen=True)
class FirstFlags(Flags):
    """The flags that people set first."""

    TITLE: ClassVar[str] = "what to set first"
    data_dir: str = flag(
        "",
        "training images: a folder, an .npz file, or builtin (drawn shapes); if not given, CIFAR-10",
        per_machine=True,
    )
    log_dir: str = flag(
        "",
        "run directory for all output; if it holds a run, that run is continued; if not given, $OPENAI_LOGDIR or a "
        "new directory runs/DATE",
        role=Role.SESSION,
    )
    init_from: str = flag(
        "",
        "start from the weights of another model, at step 0 with a new optimizer: a run, one of its files, a .pt file "
        "of improved-diffusion, a folder of diffusers, or the name of a model that comes with the code, cifar10 or "
        "cifar10_recipe",
        role=Role.TRAINING,
    )
    total_steps: int = flag(
        30000, "stop after this many training steps in total, all sessions together", low=1, high=MOST_STEPS
    )
    batch_size: int = flag(8, "images per training step, in each process", low=1, high=MOST_IMAGES)
    microbatch: int = flag(
        4,
        "images per forward and backward pass and core; less takes less memory; -1: the whole batch",
        low=-1,
        high=MOST_IMAGES,
        check=_check_microbatch,
    )
    lr: float = flag(1e-4, "learning rate", low=0)
    seed: int = flag(
        0,
        "seed of everything random: initial weights, order of the images, timesteps, noise, dropout",
        low=-(2**63),
        high=2**63 - 1,
        role=Role.TRAINING,
    )


@dataclass(frozen=True)
class DataFlags(Flags):
    """How images are read."""

    TITLE: ClassVar[str] = "images"
    random_flip: bool = flag(
        False, "mirror each training image left-right with probability 1/2", role=Role.TRAINING
    )
    cache_limit_gb: float = flag(
        2.0, "keep data sets of up to this many GB in memory; read larger ones from the disk", low=0
    )
    data_workers: int = flag(
        1, "processes that decode the images of data sets larger than --cache_limit_gb", low=0, high=256
    )


@dataclass(frozen=True)
class LearningFlags(Flags):
    """How the model learns."""

    TITLE: ClassVar[str] = "learning"
    ema_rate: str = flag(
        "0.9999",
        "comma-separated rates of the moving averages of the weights; in step n, a rate is at most (1 + n) / (10 + n): "
        "until step 8,990 that is below 0.999, and until step 89,990 below 0.9999, and the average is about as long as "
        "the last tenth of the run",
        check=_problem(ema_rates),
    )
    lr_warmup_steps: int = flag(
        0, "raise the learning rate linearly from zero over this many steps", low=0, high=MOST_STEPS
    )
    lr_anneal_steps: int = flag(
        0, "lower the learning rate linearly to zero over this many steps; 0: do not", low=0, high=MOST_STEPS
    )
    lr_decay: str = flag(
        "none", "how the learning rate falls to zero at the end of --total_steps", choices=LR_DECAYS
    )
    lr_decay_share: float = flag(
        1.0,
        "share of the run, at its end, over which --lr_decay lowers the learning rate; 1: from the end of the warm-up",
        low=0,
        high=1,
        check=lambda share: None if share else "must be above 0",
    )
    ema_lengths: str = flag(
        "",
        "comma-separated lengths, relative to the run so far, of power-function averages to keep in addition, such as "
        "0.05,0.1; from them, --ema_length of image_sample.py and publish_model.py makes an average of any length",
        check=_problem(power_lengths),
    )
    optimizer: str = flag(
        "adamw",
        "what updates the weights: adamw, or muon (Jordan et al. 2024) for all convolutions and attention layers but "
        "the first and the last, with updates as large as those of AdamW",
        choices=OPTIMIZERS,
        role=Role.TRAINING,
    )
    weight_decay: float = flag(0.0, "decoupled weight decay", low=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no limit", low=0)
    schedule_sampler: str = flag(
        "uniform", "how timesteps are drawn", choices=SCHEDULE_SAMPLERS, role=Role.TRAINING
    )
    skip_nonfinite: int = flag(
        0,
        "skip up to this many steps in a row whose loss or gradient is not finite; 0: stop at the first",
        low=0,
        high=MOST_STEPS,
    )


@dataclass(frozen=True)
class RunFlags(Flags):
    """When to write what, and when to stop."""

    TITLE: ClassVar[str] = "saving and stopping"
    log_interval: int = flag(10, "steps per row of progress.csv", low=1, high=MOST_STEPS)
    save_interval: int = flag(1000, "steps between checkpoints", low=1, high=MOST_STEPS)
    sample_interval: int = flag(
        1000,
        "steps between previews, in samples/ and the workbook; the last step always has one; 0: none",
        low=0,
        high=MOST_STEPS,
    )
    heldout_dir: str = flag(
        "",
        "images that are not trained on, whose loss is measured at every checkpoint: a folder, an .npz file, or none; "
        "if not given, CIFAR-10's test images where CIFAR-10 is trained on",
        per_machine=True,
    )
    heldout_share: float = flag(
        0.0,
        "instead of --heldout_dir, withhold this share of the training images, such as 0.02",
        low=0,
        high=0.5,
        role=Role.TRAINING,
    )
    keep_last: int = flag(
        0,
        "delete all but this many of the newest checkpoints; the --ema_lengths averages of up to 24 deleted ones stay; "
        "0: keep all",
        low=0,
        high=MOST_STEPS,
    )
    keep_every: int = flag(
        0,
        "with --keep_last, also keep the checkpoints whose step is a multiple of this; 0: none",
        low=0,
        high=MOST_STEPS,
    )
    hours: float = flag(
        0.0,
        "train for this many hours, all sessions together: after a minute, --total_steps is set by the speed so far; "
        "0: train for --total_steps",
        low=0,
        high=100_000,
    )
    max_hours: float = flag(0.0, "save and stop after this many hours of this session; 0: no limit", low=0)
    resume_checkpoint: str = flag(
        "",
        "continue from this run directory (its newest intact checkpoint) or checkpoint file",
        role=Role.SESSION,
    )
    allow_changed_flags: bool = flag(
        False,
        "resume even if flags that change the result differ from the checkpoint's",
        role=Role.SESSION,
    )
    tensorboard: bool = flag(False, "also write TensorBoard event files, with numbers and pictures")


@dataclass(frozen=True)
class ExchangeFlags(Flags):
    """Several processes, and what they exchange."""

    TITLE: ClassVar[str] = "several processes"
    processes: int = flag(
        1,
        "processes to start on this machine, each with --batch_size images per step and a share of the cores",
        low=1,
        high=1024,
        role=Role.SESSION,
    )
    sync_interval: int = flag(
        1,
        "steps between exchanges: 1 exchanges gradients in every step; with more, for slow networks, each process "
        "takes these steps on its own, and then all continue from common weights (DiLoCo, Douillard et al. 2023)",
        low=1,
        high=MOST_STEPS,
        role=Role.TRAINING,
    )
    gradient_exchange: str = flag(
        EXCHANGES[0],
        "number format of what is exchanged; bfloat16 halves the traffic, and sums are in float32",
        choices=EXCHANGES,
    )


@dataclass(frozen=True)
class HalfPrecisionFlags(Flags):
    """The 16 bits of improved-diffusion."""

    TITLE: ClassVar[str] = "flags of improved-diffusion"
    use_fp16: bool = flag(False, "compute in 16 bits; on a CPU this means --precision bf16")
    fp16_scale_growth: float = flag(
        1e-3, "without effect, because bfloat16 needs no scaling of the loss", low=0
    )


@dataclass(frozen=True)
class TrainingFlags(
    ClassFlags,
    DataFlags,
    LearningFlags,
    RunFlags,
    ComputeFlags,
    ExchangeFlags,
    UNetFlags,
    DiffusionFlags,
    HalfPrecisionFlags,
):
    """The flags that both training scripts have, without `FirstFlags`."""

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if "fp16_scale_growth" in given and not self.use_fp16:
            raise ValueError("--fp16_scale_growth: belongs to --use_fp16 True; leave it out")
        if self.use_fp16 and self.precision == "fp32":
            raise ValueError("--use_fp16 True and --precision fp32 contradict each other; leave one out")
        if self.hours and "total_steps" in given:
            raise ValueError(
                f"--total_steps {self.total_steps}: contradicts --hours {self.hours}; leave one of them out"
            )
        if self.loss_weighting != "none" and self.use_kl:
            raise ValueError(
                f"--loss_weighting {self.loss_weighting}: contradicts --use_kl True; leave one of them out"
            )
        if self.predict_xstart and self.prediction != "x_start" and "prediction" in given:
            raise ValueError(
                f"--predict_xstart True: contradicts --prediction {self.prediction}; leave one of them out"
            )
        for name in ("sigma_mean", "sigma_std", "uniform_share"):
            if name not in given or self.schedule_sampler == "log-normal":
                continue
            needed = "--schedule_sampler log-normal"
            if name != "uniform_share":
                needed += " or --loss_weighting edm"
            if name == "uniform_share" or self.loss_weighting != "edm":
                raise ValueError(f"--{name} {getattr(self, name)}: needs {needed}")
        if self.heldout_share and self.heldout_dir:
            raise ValueError(
                f"--heldout_share {self.heldout_share}: contradicts --heldout_dir {self.heldout_dir}; leave one of "
                "them out"
            )
        if {"init_from", "resume_checkpoint"} <= given:
            raise ValueError(
                f"--init_from {self.init_from}: begins a new run, and --resume_checkpoint continues one; leave one of "
                "them out"
            )
        if not self.init_from:  # else they depend on the other model too, and building the model checks them
            check_classes(self)
            levels_of(self)
        names = ("lr_warmup_steps", "lr_anneal_steps", "lr_decay", "lr_decay_share", "total_steps")
        schedule = {name: getattr(self, name) for name in names}
        if self.hours:
            schedule["total_steps"] = MOST_STEPS  # not known yet
        try:
            check_lr_schedule(*schedule.values())
        except ValueError as error:
            raise named(error, {name: name for name in names}) from None


def check_classes(config: ClassFlags) -> None:
    """:raises ValueError: --class_dropout is given for a model without classes."""
    if config.class_dropout and not config.class_cond:
        raise ValueError(f"--class_dropout {config.class_dropout}: needs --class_cond True")


def check_guidance(config: "TrainConfig") -> None:
    """:raises ValueError: --guidance_scale is given for a training without class dropout."""
    if config.guidance_scale != 1 and not config.class_dropout:
        raise ValueError(f"--guidance_scale {config.guidance_scale}: needs --class_dropout, such as 0.1")


def levels_of(config: UNetFlags) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channel multipliers of all levels, and the downsampling factors of the levels with attention.

    :param config: also has the sizes of `ImageFlags` or `SuperResSizes`.
    :raises ValueError: they do not fit the size; the message names the flag.
    """
    size, width = config.output_height, getattr(config, "image_width", 0)
    if size % config.patch_size:
        raise ValueError(f"--patch_size {config.patch_size}: must divide the image size {size}")
    size //= config.patch_size
    try:
        multipliers = channel_multipliers(config.channel_mult, size)
        factors = attention_factors(config.attention_resolutions, size, len(multipliers))
        if width:
            check_width(width, size, len(multipliers), factors, config.patch_size)
        return multipliers, factors
    except ValueError as error:
        image_size = "large_size" if isinstance(config, SuperResSizes) else "image_size"
        same = {name: name for name in ("channel_mult", "attention_resolutions", "image_width")}
        raise named(error, {**same, "image_size": image_size}) from None


@dataclass(frozen=True)
class TrainConfig(FirstFlags, ImageFlags, TrainingFlags):
    """image_train.py."""

    TITLE: ClassVar[str] = "what to set first"
    recipe: str = flag(
        "",
        "settings that learned best within hours on a CPU, for all flags that are not given: cifar10, or small for "
        f"other images of 32 to 64 pixels; {explain()}",
        choices=("", *RECIPES),
        role=Role.TRAINING,
    )
    guidance_scale: float = flag(
        1.0,
        "guidance scale of the previews, for runs with --class_dropout, and the default "
        "--guidance_scale of image_sample.py for this model; 1: as trained",
        low=0,
        high=MOST_GUIDANCE,
    )

    def completed(self, given: set[str]) -> "TrainConfig":
        """See `Flags.completed`."""
        recipe = dict(RECIPES.get(self.recipe, {}))
        # What is given also overrides what it contradicts.
        for name, contradicted in (
            ("lr_anneal_steps", "lr_decay"),
            ("predict_xstart", "prediction"),
            ("use_kl", "loss_weighting"),
        ):
            if name in given and getattr(self, name):
                recipe.pop(contradicted, None)
        if "class_cond" in given and not self.class_cond:
            recipe["class_dropout"] = 0.0
        if not with_defaults(self, given, recipe).class_dropout:
            recipe["guidance_scale"] = 1.0
        return with_defaults(self, given, recipe)

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        try:
            super().check(given)
            if not self.init_from:
                check_guidance(self)
        except ValueError as error:
            by_recipe = [name for name in RECIPES.get(self.recipe, {}) if f"--{name} " in f"{error} "]
            sets = " ".join(f"--{name} {getattr(self, name)}" for name in by_recipe if name not in given)
            raise ValueError(
                f"{error} (--recipe {self.recipe} sets {sets})" if sets else str(error)
            ) from None


@dataclass(frozen=True)
class SuperResTrainConfig(FirstFlags, SuperResSizes, TrainingFlags):
    """super_res_train.py."""

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if self.small_size >= self.large_size:
            raise ValueError(f"--small_size {self.small_size}: must be below --large_size {self.large_size}")


# -- using a model --------------------------------------------------------------------------------------------

MODEL_PATH = (
    "the model: a run directory, for its newest moving average of the weights, or a .pt file; if not given, the model "
    "that comes with the code"
)
SEED_RANGE = {"low": -(2**63), "high": 2**63 - 1}


@dataclass(frozen=True)
class DrawingFlags(Flags):
    """What to draw, with which model."""

    TITLE: ClassVar[str] = "drawing"
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = MODEL_CLASSES
    model_path: str = flag("", MODEL_PATH, per_machine=True)
    num_samples: int = flag(
        64,
        "number of images to draw; if not given, enough for full rows of all classes (70 for ten)",
        low=1,
        high=MOST_IMAGES,
    )
    ema_length: float = flag(
        0.0,
        "draw with the power-function average of this length, relative to the run, from 0.01 to 0.28; it is made from "
        "all checkpoints of a run with --ema_lengths; 0: draw with the average of --ema_rate",
        check=_check_length,
    )
    batch_size: int = flag(16, "images drawn at a time; less takes less memory", low=1, high=MOST_IMAGES)
    log_dir: str = flag(
        "", "directory for the images; if not given, $OPENAI_LOGDIR or a new directory samples/DATE"
    )
    seed: int = flag(0, "seed of all noise; the same seed gives the same images", **SEED_RANGE)
    class_label: str = flag(
        "", "comma-separated names or numbers of the classes to draw; if not given, all classes in turn"
    )
    save_png: bool = flag(False, "also write every image as a separate PNG file")
    save_trajectory: bool = flag(False, "also write trajectory.webp, an animation from noise to image")


@dataclass(frozen=True)
class GuidanceFlags(Flags):
    """Flags for plain models, not for super-resolution."""

    TITLE: ClassVar[str] = "drawing"
    guidance_scale: float = flag(
        1.0,
        "strengthen the influence of the class (classifier-free guidance), for models trained with "
        "--class_dropout; 1: as trained; if not given, the value stored with the model, or else the default",
        low=0,
        high=MOST_GUIDANCE,
    )
    guidance_interval: str = flag(
        "",
        "guide only where the noise sigma, relative to the image, is between two numbers, such as 0.2,3; the other "
        "steps cost half; if not given, guide everywhere",
        check=_problem(interval),
    )
    autoguidance_path: str = flag(
        "",
        "guide away from this worse model, such as an early checkpoint (autoguidance, Karras et al. 2024)",
        per_machine=True,
    )
    autoguidance_scale: float = flag(1.3, "strength of the autoguidance; 1: none", low=0, high=MOST_GUIDANCE)

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if "autoguidance_scale" in given and not self.autoguidance_path:
            raise ValueError(
                f"--autoguidance_scale {self.autoguidance_scale}: needs --autoguidance_path, the worse model"
            )


@dataclass(frozen=True)
class EditFlags(Flags):
    """What is to be made of images."""

    TITLE: ClassVar[str] = "editing images"
    init_image: str = flag(
        "",
        "draw from an image instead of noise (SDEdit): an image file, a folder or an .npz file; images are scaled and "
        "cropped as in training, and --num_samples is their number where not given",
        per_machine=True,
    )
    strength: float = flag(
        0.6,
        "with --init_image, the share of the timesteps whose noise is added first: the more, the less is left of the "
        "image; with --mask, 1 where not given",
        low=0.001,
        high=1,
    )
    mask: str = flag(
        "",
        "with --init_image, draw only a part anew (RePaint): an image of the model's size, white where to draw, black "
        "where to keep the image as it is",
        per_machine=True,
    )
    mask_rounds: int = flag(
        10,
        "with --mask, how often each step is taken; more make the new part fit the old one better, and cost as much "
        "more time",
        low=1,
        high=1000,
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if not self.init_image:
            for name in ("strength", "mask"):
                if name in given:
                    raise ValueError(f"--{name} {getattr(self, name)}: needs --init_image, the image to edit")
        if "mask_rounds" in given and not self.mask:
            raise ValueError(f"--mask_rounds {self.mask_rounds}: needs --mask, the part to draw anew")


@dataclass(frozen=True)
class SamplerFlags(Flags):
    """The sampler and its steps."""

    TITLE: ClassVar[str] = "sampler"
    sampler: str = flag(
        "sde_dpmpp_2m",
        "sampling method; ddpm uses all timesteps unless --sample_steps is given",
        choices=SAMPLERS,
    )
    sample_steps: int = flag(
        20, "steps from noise to image; each evaluates the model once (heun: twice)", low=1, high=100_000
    )
    timestep_spacing: str = flag(
        "",
        "how the steps are spread; if not given, the best for the sampler and the noise schedule (docs/sampling.md)",
        choices=("", *SPACINGS),
    )
    eta: float = flag(
        1.0,
        "randomness of --sampler ddim and sde_dpmpp_2m, from 0 (none) to 1 (as ddpm); if --sampler or --use_ddim is "
        "given, the default is 0, and 1 for sde_dpmpp_2m",
        low=0,
        high=1,
    )
    clip_denoised: bool = flag(True, "clip the predicted clean image to [-1, 1] in every step")
    use_ddim: bool = flag(
        False,
        "as in improved-diffusion: ddim (True) or ddpm (False), at all timesteps or those of --timestep_respacing",
    )
    timestep_respacing: str = flag(
        "",
        'as in improved-diffusion: a number of timesteps (250), numbers per section (10,15,20) or "ddim50"',
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if {"sampler", "use_ddim"} <= given and self.use_ddim != (self.sampler == "ddim"):
            raise ValueError(
                f"--use_ddim {self.use_ddim}: contradicts --sampler {self.sampler}; leave one of them out"
            )
        if self.timestep_respacing and "sample_steps" in given:
            raise ValueError(
                f"--timestep_respacing {self.timestep_respacing}: contradicts --sample_steps {self.sample_steps}; "
                "leave one out"
            )


@dataclass(frozen=True)
class SampleConfig(
    DrawingFlags,
    GuidanceFlags,
    EditFlags,
    SamplerFlags,
    ComputeFlags,
    ImageFlags,
    ClassFlags,
    UNetFlags,
    DiffusionFlags,
):
    """image_sample.py."""

    TITLE: ClassVar[str] = "drawing"
    interpolate: bool = flag(
        False,
        "draw a row of --num_samples images (10 if not given) that lead from image 0 to image 1 of the seed; a row for "
        "each class of --class_label (at most 10)",
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if self.interpolate and self.init_image:
            raise ValueError(f"--interpolate True: contradicts --init_image {self.init_image}; leave one out")


@dataclass(frozen=True)
class SuperResSampleConfig(
    DrawingFlags, SamplerFlags, ComputeFlags, SuperResSizes, ClassFlags, UNetFlags, DiffusionFlags
):
    """super_res_sample.py."""

    TITLE: ClassVar[str] = "drawing"
    base_samples: str = flag(
        "",
        "small images to enlarge: an .npz file (such as image_sample.py writes) or a folder",
        per_machine=True,
    )
    data_dir: str = flag(
        "",
        "instead of --base_samples, large images, which are shrunk first: a folder, an .npz file or builtin",
        per_machine=True,
    )
    model_path: str = flag(
        "",
        "the model: a run directory, for its newest moving average of the weights, or a .pt file",
        per_machine=True,
    )
    num_samples: int = flag(
        64, "number of images to enlarge; if there are fewer, all", low=1, high=MOST_IMAGES
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        super().check(given)
        if bool(self.base_samples) == bool(self.data_dir):
            raise ValueError(
                "give either --base_samples, the small images to enlarge, or --data_dir, images that are shrunk first"
            )


@dataclass(frozen=True)
class NllConfig(ComputeFlags, ImageFlags, ClassFlags, UNetFlags, DiffusionFlags):
    """image_nll.py."""

    TITLE: ClassVar[str] = "measuring"
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = MODEL_CLASSES
    data_dir: str = flag(
        "",
        "images to measure: a folder, an .npz file or builtin; such as datasets/cifar_test",
        per_machine=True,
    )
    model_path: str = flag("", MODEL_PATH, per_machine=True)
    num_samples: int = flag(
        1000, "number of images to measure; if there are fewer, all", low=1, high=MOST_IMAGES
    )
    batch_size: int = flag(16, "images measured at a time; less takes less memory", low=1, high=MOST_IMAGES)
    log_dir: str = flag(
        "", "directory for the results; if not given, $OPENAI_LOGDIR or a new directory nll/DATE"
    )
    seed: int = flag(0, "seed of the noise that is added to the images", **SEED_RANGE)
    timestep_respacing: str = flag(
        "", "measure at fewer timesteps: a number (250) or numbers per section (10,15,20)"
    )
    clip_denoised: bool = flag(True, "clip the predicted clean image to [-1, 1]")
    # Not auto: the result, which is compared with those of others, should not depend on the processor.
    precision: str = flag(
        "fp32", "number format: 32 or 16 bits, or auto for the faster one", choices=PRECISIONS
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if not self.data_dir:
            raise ValueError("--data_dir is missing: give the images to measure, such as datasets/cifar_test")


@dataclass(frozen=True)
class ReferenceFlags(Flags):
    """The images to compare with, and the features for the comparison."""

    TITLE: ClassVar[str] = "evaluation"
    reference: str = flag(
        "", "real images to compare with, such as the training images: a folder, an .npz file or builtin"
    )
    features: str = flag(
        "inception",
        "features by which images are compared: inception, as in papers; pixel: the colours, without a network; or a "
        "TorchScript file, which must come from somebody you trust",
    )
    inception_weights: str = flag(
        "", "path of inception-2015-12-05.pt; if not given, it is downloaded once (96 MB)"
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if not self.reference:
            raise ValueError(
                "--reference is missing: give the training images, an .npz file or a folder of images"
            )


@dataclass(frozen=True)
class EvalConfig(ReferenceFlags):
    """image_eval.py."""

    TITLE: ClassVar[str] = "evaluation"
    samples: str = flag(
        "", "images to measure: an .npz file (such as image_sample.py writes) or a folder of images"
    )
    classifier: str = flag(
        "",
        "file of train_classifier.py: also measure the share of the samples that are of the requested class "
        "(class_accuracy)",
    )
    batch_size: int = flag(4, "images measured at a time", low=1, high=MOST_IMAGES)
    output: str = flag("", "JSON file to write; if not given, NAME.evaluation.json beside the samples NAME")
    run_dir: str = flag("", "also add the result to this run's directory and workbook")

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if not self.samples:
            raise ValueError("--samples is missing: give an .npz file or a folder of images")
        super().check(given)


@dataclass(frozen=True)
class ClassifierConfig(ComputeFlags):
    """train_classifier.py."""

    TITLE: ClassVar[str] = "classifier"
    data_dir: str = flag("", "training images with classes: a folder, an .npz file or builtin")
    test_dir: str = flag("", "images to test the classifier on; if not given, it is not tested")
    output: str = flag("classifier.pt", "file to write")
    image_size: int = flag(32, "side in pixels of the images", low=16, high=1024)
    epochs: float = flag(12.0, "how often every image is used", low=0.01, high=1000)
    batch_size: int = flag(512, "images per training step", low=1, high=MOST_IMAGES)
    seed: int = flag(
        0, "seed of the initial weights, the order of the images and their augmentation", **SEED_RANGE
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if not self.data_dir:
            raise ValueError("--data_dir is missing: give images with classes, such as datasets/cifar_train")


@dataclass(frozen=True)
class ComparingConfig(
    GuidanceFlags, ReferenceFlags, ComputeFlags, ImageFlags, ClassFlags, UNetFlags, DiffusionFlags
):
    """compare_samplers.py."""

    TITLE: ClassVar[str] = "comparison"
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = MODEL_CLASSES
    model_path: str = flag("", MODEL_PATH, per_machine=True)
    samplers: str = flag(
        "sde_dpmpp_2m,ddim::1,ddim,heun,dpmpp_2m,dpmpp_3m,unipc,deis,ipndm",
        "comma-separated samplers to compare; unipc:karras means unipc with --timestep_spacing karras, ddim:uniform:1 "
        "also sets --eta 1",
    )
    steps: str = flag("5,10,20,50", "comma-separated numbers of steps")
    seeds: str = flag(
        "0,1,2",
        "comma-separated seeds; every sampler draws --num_samples images of each, from the same noise",
    )
    num_samples: int = flag(
        256,
        "images that each sampler draws with each seed",
        low=1,
        high=MOST_IMAGES,
        check=lambda count: "a distance needs at least 2 images" if count < 2 else None,
    )
    batch_size: int = flag(16, "images drawn at a time; less takes less memory", low=1, high=MOST_IMAGES)
    timestep_spacing: str = flag(
        "", "one spacing for all samplers; if not given, the best for each", choices=("", *SPACINGS)
    )
    baseline: bool = flag(True, "also compare with ddpm at all timesteps, which takes most of the time")
    class_label: str = flag(
        "", "comma-separated names or numbers of the classes to draw; if not given, all classes in turn"
    )
    log_dir: str = flag(
        "",
        "directory for images and tables; the directory of an interrupted comparison continues it; if not given, "
        "$OPENAI_LOGDIR or a new directory samples/DATE",
    )


@dataclass(frozen=True)
class RunsConfig(SamplerFlags, ComputeFlags, ImageFlags, ClassFlags, UNetFlags, DiffusionFlags):
    """compare_runs.py."""

    TITLE: ClassVar[str] = "comparison"
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = MODEL_CLASSES
    num_samples: int = flag(
        10, "images that each run draws, from the same noise; 0: draw nothing", low=0, high=100
    )
    seed: int = flag(0, "seed of the noise", **SEED_RANGE)
    class_label: str = flag(
        "", "comma-separated names or numbers of the classes to draw; if not given, all classes in turn"
    )
    guidance_scale: float = flag(
        1.0,
        "strengthen the influence of the class in runs with --class_dropout; 1: as trained; where not given, the "
        "value stored with a model, or else the default",
        low=0,
        high=MOST_GUIDANCE,
    )
    guidance_interval: str = flag(
        "",
        "guide only where the noise sigma lies between two numbers, such as 0.2,3; everywhere where not given",
        check=_problem(interval),
    )
    batch_size: int = flag(16, "images drawn at a time; less takes less memory", low=1, high=MOST_IMAGES)
    log_dir: str = flag(
        "",
        "directory for workbook and picture; if not given, $OPENAI_LOGDIR or a new directory samples/DATE",
    )


# -- other scripts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkConfig(ComputeFlags, ImageFlags, UNetFlags):
    """benchmark.py."""

    TITLE: ClassVar[str] = "measurement"
    only: str = flag(
        "memory,peaks,training,command,parts,sampling,busy",
        "comma-separated list of what to measure; there are also ablation (the gain by each optimisation) and cost "
        "(time and memory of other configurations), which take ten minutes each",
    )
    rounds: int = flag(15, "how often each measurement is repeated; they alternate", low=1, high=MOST_STEPS)
    json: str = flag("", "also write all results to this file")
    data_dir: str = flag("builtin", "training images: a folder, an .npz file or builtin")
    batch_size: int = flag(8, "images per training step", low=1, high=MOST_IMAGES)
    microbatch: int = flag(
        4,
        "images per forward and backward pass and core; -1: the whole batch",
        low=-1,
        high=MOST_IMAGES,
        check=_check_microbatch,
    )


@dataclass(frozen=True)
class ConvertConfig(ImageFlags, ClassFlags, UNetFlags, ProcessFlags):
    """convert_checkpoint.py."""

    TITLE: ClassVar[str] = "conversion"
    FROM_CHECKPOINT: ClassVar[tuple[type, ...]] = MODEL_CLASSES
    model_path: str = flag("", "with --to_diffusers, the model: a run directory or a .pt file")
    to_diffusers: str = flag("", "new folder for the model of --model_path, as diffusers saves its models")
    from_diffusers: str = flag(
        "", "folder of a model that diffusers has saved; it becomes a run in --log_dir"
    )
    log_dir: str = flag("", "with --from_diffusers, a new run directory; if not given, runs/DATE")

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if bool(self.to_diffusers) == bool(self.from_diffusers):
            raise ValueError("give either --to_diffusers or --from_diffusers")
        if self.to_diffusers and not self.model_path:
            raise ValueError("--model_path is missing: give a run directory or a .pt file")
        if self.to_diffusers and self.log_dir:
            raise ValueError("--log_dir: goes with --from_diffusers; leave it out")
        if self.from_diffusers and (contradicting := given - {"from_diffusers", "log_dir"}):
            raise ValueError(
                f"--{min(contradicting)}: is read from the model with --from_diffusers; leave it out"
            )


@dataclass(frozen=True)
class PublishConfig(Flags):
    """publish_model.py."""

    TITLE: ClassVar[str] = "publishing"
    model_path: str = flag("", "directory of the run whose model is to be published")
    log_dir: str = flag("", "new folder for the copy")
    ema_rate: str = flag("", "rate of the moving average to publish; if not given, the largest")
    ema_length: float = flag(
        0.0,
        "instead, publish the power-function average of this length, relative to the run; it is made from all "
        "checkpoints of a run with --ema_lengths",
        check=_check_length,
    )
    guidance_scale: float = flag(
        1.0,
        "default --guidance_scale of image_sample.py for the published model; 1: that of the run",
        low=0,
        high=MOST_GUIDANCE,
    )
    guidance_interval: str = flag(
        "",
        "default --guidance_interval for the published model; if not given, guidance everywhere",
        check=_problem(interval),
    )

    def check(self, given: set[str]) -> None:
        """See `Flags.check`."""
        if self.guidance_interval and self.guidance_scale == 1:
            raise ValueError(f"--guidance_interval {self.guidance_interval}: needs --guidance_scale")
        for name, what in (("model_path", "the directory of a run"), ("log_dir", "a new folder")):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: give {what}")
        if self.ema_rate and self.ema_length:
            raise ValueError(
                f"--ema_rate {self.ema_rate}: contradicts --ema_length {self.ema_length}; leave one out"
            )
