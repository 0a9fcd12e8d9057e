"""What every column of a run's tables is: its number format, its unit, its meaning and what is normal."""

import re
from typing import NamedTuple

COUNT = "#,##0"
# A diverged loss has twenty digits, which would fill its cell with ####.
REAL = "[>=100000]0.00E+00;0.00000"
SHORT_REAL = "[>=10000000]0.00E+00;#,##0.00"
SCIENTIFIC = "0.00E+00"
DURATION = "[h]:mm:ss"
TIME = "yyyy-mm-dd hh:mm"
GENERAL = "General"


class Column(NamedTuple):
    """How the cells of a column are shown, and what they mean, in words."""

    number_format: str
    unit: str
    meaning: str
    normal: str


_COLUMNS = {
    "step": Column(
        COUNT,
        "updates",
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
        "squared noise",
        "Mean squared error of the network's prediction (of the added noise, unless --predict_xstart), "
        "averaged over pixels, timesteps and all images of the interval.",
        "1.0 for a network that knows nothing. CIFAR-10 with the linear schedule settles at 0.03 to 0.04.",
    ),
    "vb": Column(
        REAL,
        "bits per dimension",
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
        "images per second",
        "Training speed over the interval.",
        "Steady. A dip means that the computer was busy with something else.",
    ),
    "elapsed": Column(
        DURATION,
        "hours:minutes:seconds",
        "Time spent training until then, pauses between sessions left out.",
        "",
    ),
    "saved_at": Column(TIME, "date and time", "When the checkpoint was complete.", ""),
    "seconds": Column(SHORT_REAL, "seconds", "Time that saving the checkpoint took.", ""),
    "megabytes": Column(SHORT_REAL, "MB", "Size of the checkpoint's files together.", ""),
    "files": Column(GENERAL, "", "The files of the checkpoint, in the run's directory.", ""),
}


def describe(name: str, diffusion_steps: int | None = None) -> Column:
    """What the column `name` is; a column of another program's making is shown as it is.

    :param diffusion_steps: T, with which the quartile columns can name their timesteps.
    """
    quartile = re.fullmatch(r"(loss|mse|vb)_q([0-3])", name)
    if quartile:
        return _describe_quartile(quartile[1], int(quartile[2]), diffusion_steps)
    return _COLUMNS.get(name, Column(GENERAL, "", "Not a column of this program.", ""))


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
