"""The metrics of a training: their means between two rows, the rows, and a progress bar or lines of text."""

import datetime
import math
import sys
import time
from typing import Any

import torch as th
from tqdm import tqdm

from improved_diffusion import logger
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, ModelVarType
from improved_diffusion.progress import SECONDS_PER_LINE


def columns(diffusion: GaussianDiffusion) -> list[str]:
    """The columns of progress.csv. All of them exist from the first row on."""
    terms = ["loss"]
    if not diffusion.loss_type.is_vb():
        learned = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        terms += ["mse", "vb"] if diffusion.model_var_type in learned else ["mse"]
    quarters = [f"{term}{suffix}" for term in terms for suffix in ("", "_q0", "_q1", "_q2", "_q3")]
    tail = ["grad_norm", "param_norm", "lr", "images_per_sec", "elapsed"]
    return ["step", "samples", *quarters, *tail]


class TrainLog:
    """Collects the metrics of a training and writes them through `logger`, in rank 0 only.

    :param global_batch: images per step, in all processes together.
    """

    def __init__(self, diffusion: GaussianDiffusion, global_batch: int):
        self.columns = columns(diffusion)
        self._num_timesteps = diffusion.num_timesteps
        self._global_batch = global_batch
        self.stopwatch = Stopwatch()  # entered for every step; its laps give the speed
        self._bar: tqdm | None = None
        self._next_line = 0.0  # the time of the next line of text, without a bar

    def open(
        self,
        step: int,
        *,
        logged_step: int,
        unfinished_row: dict[str, Any],
        tensorboard: bool,
    ) -> None:
        """Continue the tables after the row of `logged_step`, and show a progress bar if there is a terminal.

        :param unfinished_row: the state of `logger` at `step`.
        """
        logger.configure(logger.get_dir(), self.columns, keep_until=logged_step, tensorboard=tensorboard)
        logger.load_state(unfinished_row)
        if sys.stderr.isatty():
            self._bar = tqdm(initial=step, unit="step", dynamic_ncols=True)

    def add_step(
        self, t: th.Tensor, weights: th.Tensor, losses: dict[str, th.Tensor], grad_norm: float, lr: float
    ) -> None:
        """Add the metrics of one step to the next row.

        :param t: the timesteps of all images, [N]; `weights`: of their losses, [N].
        :param losses: the loss terms of all images, each [N], without weights.
        """
        quarters = (4 * t // self._num_timesteps).tolist()
        for key, values in losses.items():
            # The weights make the mean over all timesteps independent of how often each is drawn. Within a quarter
            # they would multiply the mean by the quarter's share of the draws.
            for quarter, value, weighted in zip(quarters, values.tolist(), (values * weights).tolist()):
                logger.logkv_mean(key, weighted)
                logger.logkv_mean(f"{key}_q{quarter}", value)
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv("lr", lr)

    def show_step(self, step: int, total_steps: int | None) -> None:
        """Move the progress bar. :param total_steps: None as long as it is not known."""
        if self._bar is not None:
            self._bar.total = total_steps
            self._bar.update(step - self._bar.n)

    def write_row(
        self, step: int, total_steps: int | None, samples: int, elapsed: float, params: list[th.Tensor]
    ) -> None:
        """Write the row of `step`, and show the loss and the speed.

        :param samples: images seen so far. :param elapsed: seconds of training so far.
        :param params: the weights, whose norm is a metric.
        """
        logger.logkv("step", step)
        logger.logkv("samples", samples)
        logger.logkv("param_norm", th.nn.utils.get_total_norm([p.detach() for p in params]).item())
        # A session that is stopped before its first step may have a row to write, but has no speed yet.
        laps, seconds = self.stopwatch.laps, self.stopwatch.seconds
        speed = laps * self._global_batch / seconds if laps else None
        logger.logkv("images_per_sec", speed)
        logger.logkv("elapsed", elapsed)
        self.stopwatch.reset()
        row = logger.dumpkvs()
        # Where all steps were skipped, there is neither.
        loss, grad_norm = (row.get(name, math.nan) for name in ("loss", "grad_norm"))
        pace = "" if speed is None else f"{speed:.1f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {pace}")
        elif step == total_steps or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_PER_LINE
            end, left = "", ""
            if total_steps is not None:
                end = f"/{total_steps}"
                if speed is not None:
                    seconds = round((total_steps - step) * self._global_batch / speed)
                    left = f"{datetime.timedelta(seconds=seconds)} left"
            logger.log(f"step {step}{end}  loss {loss:.5f}  grad_norm {grad_norm:.4f}  {pace}  {left}")

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


class Stopwatch:
    """Adds up the time spent within its `with` blocks, in `seconds`, and counts them, in `laps`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds = 0.0
        self.laps = 0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc_info) -> None:
        self.seconds += time.monotonic() - self._started
        self.laps += 1
