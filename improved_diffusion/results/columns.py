"""What every column of a run's tables is: its number format, its unit, its meaning and what is normal."""

import re
from typing import NamedTuple

COUNT = "#,##0"
# A diverged loss has twenty digits, which would fill its cell with ####.
REAL = "[>=100000]0.00E+00;0.00000"
SIGNED_REAL = "0.00000"  # a format with a condition, like REAL, can hide the sign
SHORT_REAL = "[>=10000000]0.00E+00;#,##0.00"
SCIENTIFIC = "0.00E+00"
DURATION = "[h]:mm:ss"
TIME = "yyyy-mm-dd hh:mm"
GENERAL = "General"

HELD_OUT = "heldout_"  # what the columns of errors on held-out images begin with
HELD_OUT_LOSS = "heldout_loss"
BEST = "best"


class Column(NamedTuple):
    """How the cells of a column are shown, and what they mean, in words."""

    number_format: str
    unit: str
    meaning: str
    normal: str


_ENOUGH_IMAGES = "More than there are features (2,048 of Inception); papers take 50,000."

_FRECHET = Column(
    REAL,
    "",
    "Squared Frechet distance of two Gaussians with the means and covariances of the features of drawn and of real "
    "images; fid when the features are Inception's.",
    "Less is better; too few images make it larger, so compare equal numbers of images only.",
)
_KERNEL = Column(
    SIGNED_REAL,
    "",
    "Squared maximum mean discrepancy of the features of drawn and of real images: mean over 100 pairs of subsets of "
    "at most 1,000 images; kid when the features are Inception's.",
    "Less is better, around 0 for images like the real ones. The number of images does not bias it.",
)
# The metrics of evaluations; those of standard deviations, whose names end in _std, are derived.
_METRICS = {
    "fid": _FRECHET,
    "frechet_distance": _FRECHET,
    "kid": _KERNEL,
    "kernel_distance": _KERNEL,
    "precision": Column(
        REAL,
        "share",
        "Share of the drawn images that are as close to a real one as that one's third neighbour among the real ones.",
        "More is better: the pictures look real. 1 at most.",
    ),
    "recall": Column(
        REAL,
        "share",
        "Share of the real images that are as close to a drawn one as that one's third neighbour among the drawn ones.",
        "More is better: the pictures are as various as the real ones. 1 at most.",
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
        "exp of the mean divergence of the classes that the network sees in an image from those it sees in all.",
        "More is better; at least 1, about 11 for CIFAR-10's own images and the features of Inception.",
    ),
}

_UNKNOWN = Column(GENERAL, "", "Not a column of this program.", "")

_COLUMNS = {
    "step": Column(
        COUNT,
        "",
        "Optimizer updates completed. Losses and grad_norm in the row are means over the interval: the updates "
        "since the row before.",
        "Rises by --log_interval from row to row.",
    ),
    "samples": Column(
        COUNT,
        "images",
        "Training images seen: step times batch size. An image counts each time it is used.",
        "One pass over CIFAR-10 is 50,000.",
    ),
    "loss": Column(
        REAL,
        "",
        "What the optimizer minimises: the mean over all images of the interval. With the default settings "
        "it is the mse; learned variances add vb to it.",
        "Falls steeply over the first few hundred steps, then seems to stand still while the samples go on "
        "improving for a long time. Judge a run by its samples.",
    ),
    "mse": Column(
        REAL,
        "",
        "Mean squared error of the network's prediction (of the added noise, unless --predict_xstart), "
        "averaged over pixels, timesteps and all images of the interval. The noise has variance 1.",
        "1.0 for a network that knows nothing. CIFAR-10 with the linear schedule settles at 0.03 to 0.04.",
    ),
    "vb": Column(
        REAL,
        "bits/dim",
        "Term of the variational bound that trains the learned variances; there with --learn_sigma and "
        "--use_kl.",
        "Noisy: a few timesteps carry most of it.",
    ),
    "grad_norm": Column(
        REAL,
        "",
        "Global L2 norm of the gradient of the mean loss over the whole batch, before clipping: the mean "
        "over the steps of the interval. The microbatch size does not change it.",
        "Falls with the loss, then wanders. A growing trend, or spikes ten times higher than their "
        "surroundings, call for a lower --lr or for --grad_clip.",
    ),
    "param_norm": Column(
        SHORT_REAL,
        "",
        "Global L2 norm of all of the network's parameters.",
        "Changes slowly and smoothly.",
    ),
    "lr": Column(
        SCIENTIFIC,
        "",
        "Learning rate of the step, after warm-up and annealing.",
        "Constant, unless --lr_warmup_steps or --lr_anneal_steps say otherwise.",
    ),
    "images_per_sec": Column(
        SHORT_REAL,
        "images/s",
        "Training speed over the interval.",
        "Steady. A dip means that the computer was busy with something else.",
    ),
    "elapsed": Column(
        DURATION,
        "h:mm:ss",
        "Time spent training until then, pauses between sessions left out.",
        "",
    ),
    "saved_at": Column(TIME, "local time", "When the checkpoint was complete.", ""),
    "seconds": Column(SHORT_REAL, "seconds", "Time that saving the checkpoint took.", ""),
    "megabytes": Column(SHORT_REAL, "megabytes", "Size of the checkpoint's files together.", ""),
    "files": Column(GENERAL, "", "The files of the checkpoint, in the run's directory.", ""),
    "evaluated_at": Column(TIME, "local time", "When image_eval.py had measured the images.", ""),
    "weights": Column(
        GENERAL,
        "",
        "The weights that drew the images: model, or ema with the rate of the moving average. Like the step, they are "
        "read from the name of the images, such as ema_0.9999_030000.npz.",
        "A moving average draws better than the model itself.",
    ),
    "features": Column(
        GENERAL,
        "",
        "What the images were compared by.",
        "inception-2015-12-05.pt for numbers to compare with papers. Compare rows with the same features only.",
    ),
    "images": Column(COUNT, "images", "Drawn images that were measured.", _ENOUGH_IMAGES),
    "reference_images": Column(
        COUNT, "images", "Real images that they were measured against.", _ENOUGH_IMAGES
    ),
    "images_path": Column(GENERAL, "", "Where the drawn images were.", ""),
    "reference_path": Column(GENERAL, "", "Where the real images were.", ""),
    "notes": Column(
        GENERAL,
        "",
        "What to keep in mind with the numbers of the row; the notes stand below the table.",
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
    """Whether the column `name` is one of this program's, whose cells are numbers in a run's CSV files."""
    return describe(name) is not _UNKNOWN


def title_of(name: str, *notes: str) -> str:
    """What stands above the column `name`: its name and, unless the name says it, its unit; then `notes`."""
    unit = describe(name).unit
    said = unit in name.replace("_per_sec", "/s")
    inside = ", ".join(notes if said else (unit, *notes))
    return f"{name} ({inside})" if inside else name


def describe(name: str, diffusion_steps: int | None = None) -> Column:
    """What the column `name` is; a column of another program's making is shown as it is.

    :param diffusion_steps: T, with which the quartile columns can name their timesteps.
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
            "Error of the averaged weights' prediction of clean images that are held out from the training: the mean "
            "over fixed noise levels, each weighted so that it is 1 for a network that knows only mean and variance."
        )
        normal = "Falls as long as the model improves. Rises when it begins to memorise the training images."
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
        "The highest mse of the four: little noise is hard to tell from the image's own detail.",
        "Well below q0.",
        "Below q1.",
        "The lowest mse, close to zero: what is nearly all noise is easily predicted as noise.",
    ][quartile]
    return Column(
        REAL,
        _COLUMNS[base].unit,
        f"{base} of the images whose timestep fell into quarter {quartile + 1} of 4 ({which}). "
        "Empty where an interval had none.",
        normal if base != "vb" else "",
    )
