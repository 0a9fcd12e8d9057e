"""The columns of a run's tables: number format, unit, meaning and normal values."""

import re
from typing import NamedTuple

COUNT = "#,##0"
# A diverged loss has twenty digits, which Excel would show as ####.
REAL = "[>=100000]0.00E+00;0.00000"
SIGNED_REAL = "0.00000"  # a format with a condition, like REAL, can hide the sign
SHORT_REAL = "[>=10000000]0.00E+00;#,##0.00"
SCIENTIFIC = "0.00E+00"
DURATION = "[h]:mm:ss"
TIME = "yyyy-mm-dd hh:mm"
GENERAL = "General"

HELD_OUT = "heldout_"  # prefix of the columns of errors on held-out images
HELD_OUT_LOSS = "heldout_loss"
BEST = "best"


class Column(NamedTuple):
    """The number format and unit of a column, and explanations of its meaning and normal values."""

    number_format: str
    unit: str
    meaning: str
    normal: str


_ENOUGH_IMAGES = "More than the features (2,048 of Inception); papers use 50,000."

_FRECHET = Column(
    REAL,
    "",
    "Squared Frechet distance between two Gaussians with the means and covariances of the features of drawn and of "
    "real images; called fid if the features are Inception's.",
    "Lower is better. Too few images make it larger, so compare equal numbers of images only.",
)
_KERNEL = Column(
    SIGNED_REAL,
    "",
    "Squared maximum mean discrepancy between the features of drawn and of real images: mean over 100 pairs of subsets "
    "of at most 1,000 images; called kid if the features are Inception's.",
    "Lower is better, about 0 for images like the real ones. The number of images does not bias it.",
)
# The metrics of evaluations. The columns of their standard deviations, ending in _std, are derived from these.
_METRICS = {
    "fid": _FRECHET,
    "frechet_distance": _FRECHET,
    "kid": _KERNEL,
    "kernel_distance": _KERNEL,
    "precision": Column(
        REAL,
        "share",
        "Share of the drawn images that are closer to some real image than its third nearest real neighbour is.",
        "Higher is better: the images look real. At most 1.",
    ),
    "recall": Column(
        REAL,
        "share",
        "Share of the real images that are closer to some drawn image than its third nearest drawn neighbour is.",
        "Higher is better: the images are as diverse as the real ones. At most 1.",
    ),
    "class_accuracy": Column(
        REAL,
        "share",
        "Share of the drawn images that a classifier (image_eval.py --classifier) takes for the class asked for.",
        "More is better. 1 at most.",
    ),
    "inception_score": Column(
        REAL,
        "",
        "exp of the mean KL divergence between the class probabilities of an image and their mean over all images.",
        "Higher is better. At least 1, and about 11 for CIFAR-10's own images and the features of Inception.",
    ),
}

_UNKNOWN = Column(GENERAL, "", "Not a column of this program.", "")

_COLUMNS = {
    "step": Column(
        COUNT,
        "",
        "Completed optimizer updates. Losses and grad_norm in the row are means over the interval: the updates since "
        "the previous row.",
        "Increases by --log_interval from row to row.",
    ),
    "samples": Column(
        COUNT,
        "images",
        "Training images used: step times batch size. An image counts each time it is used.",
        "One pass over CIFAR-10 is 50,000.",
    ),
    "loss": Column(
        REAL,
        "",
        "The quantity that is minimised: the mean over all images of the interval. With the default settings it is "
        "the mse; learned variances add vb to it.",
        "Falls steeply in the first few hundred steps. Then it hardly changes, while the samples improve for a long "
        "time. Judge a run by its samples.",
    ),
    "mse": Column(
        REAL,
        "",
        "Mean squared error of the network's prediction (of the added noise, with the default --prediction), "
        "averaged over pixels, timesteps and all images of the interval. The noise has variance 1.",
        "1.0 for an untrained network. CIFAR-10 with the linear schedule settles at 0.03 to 0.04.",
    ),
    "vb": Column(
        REAL,
        "bits/dim",
        "Term of the variational bound, which trains the learned variances; only with --learn_sigma or --use_kl.",
        "Noisy, because most of it comes from a few timesteps.",
    ),
    "grad_norm": Column(
        REAL,
        "",
        "Global L2 norm of the gradient of the mean loss over the whole batch, before clipping: the mean over the "
        "steps of the interval. It does not depend on the microbatch size.",
        "Falls with the loss, then fluctuates. If it keeps growing, or has spikes ten times higher than their "
        "surroundings, use a lower --lr or --grad_clip.",
    ),
    "param_norm": Column(
        SHORT_REAL,
        "",
        "Global L2 norm of all parameters of the network.",
        "Changes slowly and smoothly.",
    ),
    "lr": Column(
        SCIENTIFIC,
        "",
        "Learning rate of the step, with warm-up and decay.",
        "Constant, unless --lr_warmup_steps, --lr_anneal_steps or --lr_decay is given.",
    ),
    "images_per_sec": Column(
        SHORT_REAL,
        "images/s",
        "Training speed over the interval.",
        "Constant. A dip means that the computer was busy with other programs.",
    ),
    "elapsed": Column(
        DURATION,
        "h:mm:ss",
        "Training time so far, without the pauses between sessions.",
        "",
    ),
    "saved_at": Column(TIME, "local time", "Time at which the checkpoint was complete.", ""),
    "seconds": Column(SHORT_REAL, "seconds", "Duration of saving the checkpoint.", ""),
    "megabytes": Column(SHORT_REAL, "megabytes", "Total size of the checkpoint's files.", ""),
    "files": Column(GENERAL, "", "The files of the checkpoint, in the run's directory.", ""),
    "evaluated_at": Column(TIME, "local time", "Time at which image_eval.py finished.", ""),
    "weights": Column(
        GENERAL,
        "",
        "The weights that drew the images: model, or ema with the rate of the moving average. Like the step, they come "
        "from the file name of the images, such as ema_0.9999_030000.npz.",
        "A moving average draws better images than the model itself.",
    ),
    "features": Column(
        GENERAL,
        "",
        "The features by which the images were compared.",
        "inception-2015-12-05.pt for a comparison with papers. Compare rows with the same features only.",
    ),
    "images": Column(COUNT, "images", "Number of drawn images.", _ENOUGH_IMAGES),
    "reference_images": Column(
        COUNT, "images", "Number of real images that they were compared with.", _ENOUGH_IMAGES
    ),
    "images_path": Column(GENERAL, "", "Path of the drawn images.", ""),
    "reference_path": Column(GENERAL, "", "Path of the real images.", ""),
    "notes": Column(
        GENERAL,
        "",
        "Numbers of the warnings about this row; the warnings are below the table.",
        "None.",
    ),
    BEST: Column(
        GENERAL,
        "",
        f"Marks the checkpoint with the lowest {HELD_OUT_LOSS}.",
        "Late in the run, unless it overfits.",
    ),
}


def is_known(name: str) -> bool:
    """Whether `name` is a column of this program. In a run's CSV files, its cells are numbers."""
    return describe(name) is not _UNKNOWN


def title_of(name: str, *notes: str) -> str:
    """The header of the column `name`: the name, then its unit, unless the name includes it, and `notes`."""
    unit = describe(name).unit
    said = unit in name.replace("_per_sec", "/s")
    inside = ", ".join(notes if said else (unit, *notes))
    return f"{name} ({inside})" if inside else name


def describe(name: str, diffusion_steps: int | None = None) -> Column:
    """The description of the column `name`. A column of another program is shown as it is.

    :param diffusion_steps: the number of timesteps T, if known, so that the quartile columns can list theirs.
    """
    quartile = re.fullmatch(r"(loss|mse|vb)_q([0-3])", name)
    if quartile:
        return _describe_quartile(quartile[1], int(quartile[2]), diffusion_steps)
    if name.startswith(HELD_OUT):
        return _describe_held_out(name)
    metric = name.removesuffix("_std")
    if metric in _METRICS and metric != name:
        return _METRICS[metric]._replace(meaning=f"Standard deviation of {metric}.", normal="")
    return (_COLUMNS | _METRICS).get(name, _UNKNOWN)


def _describe_held_out(name: str) -> Column:
    if name == HELD_OUT_LOSS:
        meaning = (
            "Error of the moving average in predicting clean images that are held out from the training: the mean over "
            "fixed noise levels, each weighted so that it is 1 for a network that knows only mean and variance."
        )
        normal = "Falls while the model improves. Rises when it begins to memorise the training images."
    else:
        level = name.removeprefix(HELD_OUT).removeprefix("sigma_")
        meaning = f"The same at one level: noise with a standard deviation of {level}, for images in [-1, 1]."
        normal = ""
    return Column(REAL, "", meaning, normal)


def _describe_quartile(base: str, quartile: int, diffusion_steps: int | None) -> Column:
    which = ["the least noise", "less noise", "more noise", "the most noise"][quartile]
    if diffusion_steps is not None and diffusion_steps >= 4:
        # Timestep t lies in quartile floor(4 t / T).
        first, end = (-(-number * diffusion_steps // 4) for number in (quartile, quartile + 1))
        which += f": t = {first:,} to {end - 1:,} of {diffusion_steps:,}"
    normal = [
        "The highest mse of the four: little noise is hard to distinguish from the details of the image.",
        "Well below q0.",
        "Below q1.",
        "The lowest mse, close to zero: in an image of almost pure noise, the noise is easy to predict.",
    ][quartile]
    return Column(
        REAL,
        _COLUMNS[base].unit,
        f"{base} of the images whose timestep is in quarter {quartile + 1} of 4 ({which}). "
        "Empty if the interval had none.",
        normal if base != "vb" else "",
    )
