"""Command-line flags: what each is for, how it is typed and bounded, and one clear line when it is wrong."""

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any

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
    "precision": "what to compute in: fp32, bf16 (16 bits, with the weights in 32), or auto: the faster one of "
    "this processor",
    "num_workers": "cores to compute on, each with images of its own: a number, or auto: all",
    "use_fp16": "as in improved-diffusion: 16 bits; on a CPU that means --precision bf16",
    "fp16_scale_growth": "with --use_fp16; without effect, because bfloat16 needs no scaling of the loss",
    "lr_warmup_steps": "raise the learning rate linearly from zero over this many steps",
    "grad_clip": "clip the gradient's norm to this; 0: do not",
    "batch_size": "images per optimizer step (training) or at a time (drawing, measuring), in each process",
    "microbatch": "images per forward and backward pass and core; -1: the whole batch; changes memory, not the result",
    "ema_rate": "comma-separated rates of the moving averages of the weights",
    "total_steps": "stop after this many optimizer steps in total",
    "seed": "of everything random",
    # running
    "log_dir": "where the output goes; empty: $OPENAI_LOGDIR, or else a new dated directory",
    "log_interval": "steps per row of progress.csv",
    "save_interval": "steps between checkpoints",
    "sample_interval": "steps between pictures that show the progress, in samples/ of the run's directory and in the "
    "workbook; 0: none",
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
    "sampler": "ddpm (ancestral sampling, at all timesteps unless --sample_steps is given), ddim, heun, dpmpp_2m, "
    "dpmpp_3m, unipc, deis or ipndm",
    "sample_steps": "steps from noise to image; each evaluates the model once (heun: twice)",
    "timestep_spacing": "how the steps are spread: uniform, quadratic, logsnr (where --sampler is given) or karras",
    "eta": "with --sampler ddim, how random it is: 0 not at all, 1 like ddpm; 0 where --sampler or --use_ddim is given",
    "use_ddim": "as in improved-diffusion: DDIM, or with False ancestral sampling, at all timesteps or those of "
    "--timestep_respacing",
    "clip_denoised": "clip the predicted clean image to [-1, 1] in every step",
    "class_label": "comma-separated class names or numbers to draw; empty: all classes in turn",
    "guidance_scale": "strengthen the class's influence (classifier-free guidance, needs --class_dropout in training); "
    "1: as trained",
    "save_trajectory": "also write an animated picture, trajectory.webp, of the way from noise to image",
    "interpolate": "draw --num_samples (by default 10) images that lead from image 0 to image 1 of the seed, in a row; "
    "a row for each class of --class_label (at most 10)",
    "save_png": "also write every image as a PNG of its own",
    # comparison
    "samplers": "comma-separated samplers to compare; unipc:karras is unipc with that --timestep_spacing, "
    "ddim:uniform:1 ddim with that --eta",
    "steps": "comma-separated numbers of steps",
    "seeds": "comma-separated seeds; every sampler draws --num_samples images of each, from the same noise",
    "baseline": "compare with ddpm at all timesteps too, which takes most of the time",
    # evaluation
    "samples": "images to measure: an .npz file (such as image_sample.py writes) or a folder of images",
    "reference": "real images to measure them against, such as the training images: a folder, an .npz file or builtin",
    "features": "what the images are compared by: inception, as in papers; pixel: their colours, without a network; or "
    "a TorchScript file, which must come from somebody you trust",
    "inception_weights": "where you have inception-2015-12-05.pt; empty: it is downloaded once (96 MB)",
    "output": "JSON file to write; empty: beside the samples",
    "run_dir": "also add the result to this run's directory and workbook",
}
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
    "sample_steps": 100_000,
    "total_steps": 10**9,
    "data_workers": 256,
    "seed": 2**63 - 1,
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, and remembers which flags were given."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}; --help explains every flag\n")

    def parse_flags(self, argv: list[str] | None = None) -> tuple[dict[str, Any], set[str]]:
        """Parse `argv`. :return: all flags with their values, and the names of those that were given."""
        flags = vars(self.parse_args(argv))
        unset = argparse.Namespace(**dict.fromkeys(flags, _UNSET))
        given = {name for name, value in vars(self.parse_args(argv, unset)).items() if value is not _UNSET}
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


def one_line(message: str) -> str:
    """`message` without line ends and what else a terminal might act upon; file names can hold anything."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]\s*", " ", message)
