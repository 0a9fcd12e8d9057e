"""The training loop: microbatched gradients, AdamW, moving averages, metrics, checkpoints, exact resume."""

import contextlib
import datetime
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import blobfile as bf
import torch as th

from improved_diffusion import dist_util, logger, seeding
from improved_diffusion.config import MOST_STEPS, ema_rates
from improved_diffusion.cpu.gradients import Gradients, plan_passes
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.cpu.machine import release_memory
from improved_diffusion.cpu.optimizer import Optimizer
from improved_diffusion.cpu.outer import Outer
from improved_diffusion.cpu.workers import Workers
from improved_diffusion.evaluation.heldout import columns as heldout_columns
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.learning_rate import check_lr_schedule, learning_rate
from improved_diffusion.nn import Dropout, dropout_seeds, update_ema
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.results.export import export_all
from improved_diffusion.run import averages, checkpoint
from improved_diffusion.run.checkpoint import Checkpoint, member_name, power_kind
from improved_diffusion.run.checkpoint_table import CheckpointTable
from improved_diffusion.run.interrupts import Interrupts, Stopped
from improved_diffusion.run.pace import Pace, steps_within
from improved_diffusion.run.train_log import TrainLog
from improved_diffusion.seeding import Purpose

STOP_REASONS = ("SIGINT", "SIGTERM", "SIGHUP", "--max_hours")
ECHO = 2.0  # seconds within which a launcher passes a signal on to its processes
NO_END = 2 * MOST_STEPS  # `total_steps` until the first minute of training has decided it (--hours)
RESERVE = 0.01  # share of --hours for what cannot be foreseen
PREVIEW_COST = 7  # an image of a preview takes as long as this many images in a training step
EXPORT_SECONDS = 3.0  # after a signal to stop, the workbook is not written if that takes longer


class NonFiniteError(RuntimeError):
    """The loss or the gradient is infinite or NaN. No weight was changed by it."""


class Draws(NamedTuple):
    """A batch of B images and all random numbers of a training step.

    :ivar images: the images of this process, [B, C, H, W].
    :ivar cond: arguments of the model, such as labels `y` [B], some of them replaced by "no class".
    :ivar t: timesteps, [B].
    :ivar weights: weights of the losses, [B].
    :ivar noise: standard normal noise, [B, C, H, W].
    :ivar masks: seeds of the dropout masks, one for each of the B images.
    :ivar all_t, all_weights: `t` and `weights` of all R processes, [R * B].
    """

    images: th.Tensor
    cond: dict[str, th.Tensor]
    t: th.Tensor
    weights: th.Tensor
    noise: th.Tensor
    masks: list[int]
    all_t: th.Tensor
    all_weights: th.Tensor


class LocalStep(NamedTuple):
    """What rank 0 needs to know of a step that a process took on its own.

    :ivar problem: why the step was skipped; empty: it was not.
    :ivar losses: the loss terms of this process, by name, each [B].
    """

    problem: str
    all_t: th.Tensor
    all_weights: th.Tensor
    losses: dict[str, th.Tensor]
    grad_norm: float
    lr: float


class TrainLoop:
    """Train `model` for `total_steps` updates, and write the run into the directory of `logger`.

    The timesteps, noise and dropout masks of step n depend only on `seed` and n, and a batch only on its position in
    the data. So a resumed run ends with the same result as a run that was never stopped.

    Several processes (see `dist_util`) each create a loop with the same arguments, except for their own part of the
    data. R processes with B images each compute the same as one process with R * B images, unless `sync_interval` is
    above 1. Only rank 0 reads checkpoints, writes files and keeps the moving averages.

    :param data: yields (images [B, C, H, W] float32 in [-1, 1], dict of model arguments), where B is `batch_size`. Of
        several processes, rank r gets part r of the global batch. If `data` has a method ``seek(samples)``, a resumed
        run calls it to continue where the run stopped.
    :param batch_size: images per step and process.
    :param microbatch: images per forward and backward pass; -1: the whole batch. Each pass is weighted by its share
        of the batch, so this changes neither the gradient nor `grad_norm` (beyond rounding).
    :param ema_rate: the rates of the moving averages, separated by commas (see `ema_decay`).
    :param ema_lengths: the lengths of the power-function averages, separated by commas (see `averages`); may be empty.
    :param resume_checkpoint: a checkpoint, a run directory or any file of a checkpoint; empty: start a new run.
    :param schedule_sampler: draws the timesteps (see `resample`); by default a `UniformSampler`.
    :param lr_anneal_steps: the number of steps in which the learning rate falls linearly to zero; 0: it does not.
    :param lr_warmup_steps, lr_decay, lr_decay_share: the rise and fall of the learning rate (see `learning_rate`).
    :param grad_clip: largest norm of the gradient; 0: unlimited.
    :param total_steps: updates of the whole run, all sessions together.
    :param skip_nonfinite: how many steps in a row may be skipped because their gradient is not finite.
    :param class_dropout: the probability that an image's label is replaced by the model's last label, "no class" (Ho &
        Salimans 2022, algorithm 1).
    :param hours: when not 0, `total_steps` is ignored. The speed of the first minute decides the number of steps, so
        that all sessions together take this many hours. A resumed run keeps that number.
    :param on_plan: called by rank 0 with the number of steps that `hours` led to.
    :param max_hours: save and stop after this many hours of this session; 0: unlimited.
    :param keep_last: keep this many of the newest checkpoints, and those whose step is a multiple of `keep_every`;
        0: keep all.
    :param tensorboard: also write TensorBoard event files.
    :param arguments: the flags of the run, stored in every checkpoint.
    :param data_facts: the fingerprint and class names of the data, stored in every checkpoint.
    :param origin: the model whose weights the run started from, if any, stored in every checkpoint.
    :param sample_interval: steps between calls of `preview`; 0: no previews.
    :param preview: called by rank 0 every `sample_interval` steps and at the last step, before the checkpoint, with
        the averaged model (see `_averaged_model`) and the step.
    :param preview_images: how many images it draws; those with guidance count twice. For the plan of `hours`.
    :param heldout: called by rank 0 before every checkpoint with the averaged model. Its results, by the names of
        `heldout.columns`, go to checkpoints.csv.
    :param precision: "fp32" or "bf16", the precision of forward and backward passes (see `Gradients`).
    :param num_workers: cores to compute on (see `plan_passes`).
    :param sync_interval: 1: the processes exchange their gradients in every step. K: they take K steps each on its own,
        and then exchange the change of their weights (see `run_round`). Rows, pictures and checkpoints that are due
        within these steps follow at their end, as do stops.
    :param gradient_exchange: "float32" or "bfloat16", the number format of what they exchange. Sums are in float32.
    :param publish: called by rank 0 after each checkpoint, when all files of the directory belong to the same step,
        with the names of the files that were deleted.
    :param check_folder: called by rank 0 before it writes. Raises an OSError, which ends the run, if the directory is
        no longer this run's (see `run_lock`).
    :raises ValueError: a parameter or the checkpoint is unusable.
    """

    def __init__(
        self,
        *,
        model: th.nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[tuple[th.Tensor, dict[str, th.Tensor]]],
        batch_size: int,
        microbatch: int = -1,
        lr: float = 1e-4,
        ema_rate: str | float = "0.9999",
        ema_lengths: str = "",
        log_interval: int = 10,
        save_interval: int = 1000,
        resume_checkpoint: str | Checkpoint = "",
        schedule_sampler=None,
        weight_decay: float = 0.0,
        optimizer: str = "adamw",
        lr_anneal_steps: int = 0,
        lr_warmup_steps: int = 0,
        lr_decay: str = "none",
        lr_decay_share: float = 1.0,
        grad_clip: float = 0.0,
        total_steps: int = 30000,
        seed: int = 0,
        skip_nonfinite: int = 0,
        class_dropout: float = 0.0,
        hours: float = 0.0,
        on_plan: Callable[[int], object] | None = None,
        max_hours: float = 0.0,
        keep_last: int = 0,
        keep_every: int = 0,
        tensorboard: bool = False,
        arguments: dict[str, Any] | None = None,
        data_facts: dict[str, Any] | None = None,
        origin: dict[str, Any] | None = None,
        sample_interval: int = 0,
        preview: Callable[[Callable[..., th.Tensor], int], object] | None = None,
        preview_images: int = 16,
        heldout: Callable[[Callable[..., th.Tensor]], dict[str, float]] | None = None,
        precision: str = "fp32",
        num_workers: int = 1,
        sync_interval: int = 1,
        gradient_exchange: str = "float32",
        publish: Callable[[list[str]], object] | None = None,
        check_folder: Callable[[], object] | None = None,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.global_batch = batch_size * dist_util.get_world_size()
        self.is_first = dist_util.get_rank() == 0
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps = lr_anneal_steps
        self.lr_warmup_steps = lr_warmup_steps
        check_lr_schedule(lr_warmup_steps, lr_anneal_steps, lr_decay, lr_decay_share, total_steps)
        self.lr_decay = lr_decay
        self.lr_decay_share = lr_decay_share
        self.grad_clip = grad_clip
        self.total_steps = total_steps
        self.seed = seed
        self.skip_nonfinite = skip_nonfinite
        self.class_dropout = class_dropout
        self.hours = hours
        self.on_plan = on_plan
        self.plan: dict[str, float] = {}  # the measurements from which `hours` became a number of steps
        self.max_hours = max_hours
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.tensorboard = tensorboard
        self.arguments = arguments or {}
        self.data_facts = data_facts or {}
        self.origin = origin or {}
        self.sample_interval = sample_interval
        self.preview = preview
        self.preview_images = preview_images
        self.heldout = heldout
        self.precision = precision
        self.sync_interval = sync_interval
        self.alone = sync_interval > 1  # whether each process takes its steps on its own
        self.add_up = (
            dist_util.all_reduce if gradient_exchange == "float32" else dist_util.all_reduce_in_16_bits
        )
        self.publish = publish
        self.check_folder = check_folder or (lambda: None)

        self.step = 0  # completed optimizer updates
        self.samples = 0  # images trained on so far, in all processes together
        self.elapsed = 0.0  # seconds of all sessions
        self.previewed_step = 0  # step of the last preview
        self.logged_step = 0  # step of the last row that covers a whole interval
        self.saved_step: int | None = None  # step of the last checkpoint in this directory
        self.resumed_here: Checkpoint | None = None  # the checkpoint to continue, if it is in this directory
        self.skipped = 0  # steps in a row that were skipped because the gradient was not finite
        self.unfinished_row: dict[str, Any] = {"values": {}, "sums": {}}  # state of `logger` to go on with
        self.export_seconds = 0.0  # duration of the last export of the workbook
        self.interrupts = Interrupts(echo=ECHO if dist_util.get_world_size() > 1 else 0.0)
        self.log = TrainLog(diffusion, self.global_batch)
        self.pace = Pace()

        self.params = list(model.parameters())
        self.model.train()
        self.has_dropout = any(layer.p > 0 for layer in model.modules() if isinstance(layer, Dropout))
        self.num_workers = num_workers
        self.passes = plan_passes(batch_size, self.microbatch, num_workers)
        self.workers = Workers(self.passes.side_by_side, self.passes.cores)
        matrices = hidden_kernels(model) if optimizer == "muon" else []
        self.opt = Optimizer(self.params, lr, weight_decay, self.workers.run, matrices)
        self.ema_params = {
            rate: [p.detach().clone() for p in self.params] for rate in parse_ema_rates(ema_rate)
        }
        self.power_params = {
            length: [p.detach().clone() for p in self.params]
            for length in averages.parse_lengths(ema_lengths)
        }
        self.outer = Outer(self.params) if self.alone else None
        if not self.is_first:
            self.ema_params, self.power_params = {}, {}
        elif resume_checkpoint:
            if not isinstance(resume_checkpoint, Checkpoint):
                resume_checkpoint = checkpoint.find(resume_checkpoint, log=logger.log)
            try:
                self._restore(resume_checkpoint)
            except (KeyError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(
                    f"{resume_checkpoint.path('state')}: this checkpoint does not fit this run ({reason})"
                ) from error
        if dist_util.get_world_size() > 1:
            self._make_all_alike()
        if hours and self.plan.get("hours") != hours:
            self.plan = {}
            self.total_steps = NO_END
        self.gradients = Gradients(model, precision, self.workers)
        if self.samples and hasattr(data, "seek"):
            data.seek(self.samples)

    # -- the loop ----------------------------------------------------------------------------------------

    def run_loop(self) -> str | None:
        """Train until `total_steps`.

        :return: the reason to stop before that: the name of a signal or "--max_hours"; otherwise None.
        :raises NonFiniteError: the gradient was not finite more often than allowed. The state after the last finite
            step is saved; the message names the checkpoint.
        :raises OSError: a checkpoint or row could not be written. Earlier checkpoints are intact.
        """
        if self.is_first:
            self._open_checkpoint_table()
        if self.step >= self.total_steps:
            logger.log(
                f"nothing left to do: this run has reached step {self.step}; raise --total_steps to go on"
            )
            if self.is_first:
                # The last session may have been stopped before it drew the last picture and wrote the workbook.
                with self.interrupts:
                    self._draw_preview()
                self._export()
            return None
        if self.is_first:
            self.log.open(
                self.step,
                logged_step=self.logged_step,
                unfinished_row=self.unfinished_row,
                tensorboard=self.tensorboard,
            )
        self.session_started = time.monotonic()
        self.started = self.session_started - self.elapsed
        end = f"to {self.total_steps}" if self.total_steps != NO_END else f"for {self.hours:g} hours in all"
        logger.log(f"training from step {self.step} {end}; the first step is under way...")
        failure: NonFiniteError | None = None
        with self.interrupts:
            self._draw_preview()  # again, if the last session was stopped while it drew
            stopped_by, save = self._requests()
            while self.step < self.total_steps and stopped_by is None:
                before = self.step
                try:
                    with self.log.stopwatch:
                        if self.alone:
                            self.run_round()
                        else:
                            self.run_step(*next(self.data))
                except NonFiniteError as error:
                    failure = error
                    break
                self.check_folder()
                if self.total_steps == NO_END and self._is_pace_known(self.step - before):
                    self._plan()
                self.log.show_step(self.step, self._known_total())
                if self._is_due(self.log_interval) and self.logged_step < self.step:
                    self._write_row()
                    self.logged_step = self.step
                self._draw_preview()
                stopped_by, requested = self._requests()
                save = save or requested
                due = save or self._is_due(self.save_interval)
                if due and self.saved_step != self.step and self.step < self.total_steps:
                    save = False
                    self.save()
            unfinished_row = logger.state()
            if self.logged_step < self.step:
                # For the reader. A resumed run replaces this row by that of the whole interval.
                self._write_row()
            # The last checkpoint is saved after the last row: it marks the run as complete.
            if self.saved_step != self.step and (failure is None or self._is_finite()):
                self.save(unfinished_row)
            elif self.is_first:
                self._export()
        self.log.close()
        if self.is_first:
            self.checkpoint_table.close()
        if failure is not None:
            kept = "no checkpoint has been saved"
            if self.saved_step is not None:
                kept = (
                    f"checkpoint {self.saved_step} has the last finite weights, averages and optimizer state"
                )
            raise NonFiniteError(f"{failure}; {kept}")
        return stopped_by

    def _is_due(self, interval: int) -> bool:
        """Whether a multiple of `interval` is among the steps of the round that ends at this step."""
        before = (self.step - 1) // self.sync_interval * self.sync_interval
        return self.step // interval > before // interval

    def _is_finite(self) -> bool:
        """Whether all weights and moments are finite: an update with a very large --lr may overflow."""
        tensors = [*self.params, *self.opt.state_tensors()]
        return dist_util.broadcast(all(bool(th.isfinite(tensor).all()) for tensor in tensors))

    def _requests(self) -> tuple[str | None, bool]:
        """The reason to stop, if there is one, and whether to save, as asked of any of the processes. All processes
        get the same answer."""
        is_time_up = self.max_hours and time.monotonic() - self.session_started > self.max_hours * 3600
        own = self.interrupts.stop or ("--max_hours" if is_time_up else None)
        stops = (own == reason for reason in STOP_REASONS)
        asked = th.tensor([*stops, self.interrupts.take_save()]).int()
        dist_util.all_reduce(asked)
        *stops, save = asked.tolist()
        return next((reason for reason, count in zip(STOP_REASONS, stops) if count), None), save > 0

    # -- the number of steps that --hours are ------------------------------------------------------------

    def _known_total(self) -> int | None:
        return None if self.total_steps == NO_END else self.total_steps

    def _is_pace_known(self, steps: int) -> bool:
        """Whether rank 0 has measured the speed. :param steps: taken since the last call."""
        known = self.pace.is_known(steps)
        return dist_util.broadcast(known) if dist_util.get_world_size() > 1 else known

    def _plan(self) -> None:
        """Decide `total_steps` by the speed that rank 0 has measured, and save it with a checkpoint."""
        per_step = dist_util.broadcast(self.pace.seconds_per_step)
        before = time.monotonic()
        self.save()
        per_save = time.monotonic() - before
        steps = steps_within(
            self.hours * 3600 * (1 - RESERVE) - (time.monotonic() - self.started),
            per_step,
            seconds_per_save=per_save,
            save_interval=self.save_interval,
            seconds_per_preview=per_step * PREVIEW_COST * self.preview_images / self.global_batch,
            sample_interval=self.sample_interval if self.preview is not None else 0,
        )
        self.total_steps = dist_util.broadcast(max(self.step + steps, self.lr_warmup_steps + 1))
        needed = (self.total_steps - self.step) * per_step + time.monotonic() - self.started
        if needed > 1.1 * self.hours * 3600:
            what = "measuring the speed"
            if self.total_steps == self.lr_warmup_steps + 1:
                what = f"--lr_warmup_steps {self.lr_warmup_steps}"
            logger.log(
                f"WARNING: --hours {self.hours:g}: is too short for {what}; this run takes about "
                f"{needed / 3600:.2g} hours"
            )
        self.plan = {"hours": self.hours, "seconds_per_step": per_step, "seconds_per_save": per_save}
        self.arguments = {**self.arguments, "total_steps": self.total_steps}
        logger.log(
            f"--hours {self.hours:g}: at {self.global_batch / per_step:.1f} images/s, and {per_save:.1f} s "
            f"for each checkpoint, that is --total_steps {self.total_steps}"
        )
        if self.is_first and self.on_plan is not None:
            self.on_plan(self.total_steps)
        if self.is_first:
            self.checkpoint_table.keep_until(self.step - 1)  # the same step is saved again, with the plan
        self.save()

    # -- a step ------------------------------------------------------------------------------------------

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One optimizer update: draw timesteps and noise, compute the gradient, update weights and averages, log.

        :param batch: images [B, C, H, W] float32 in [-1, 1]. :param cond: arguments of the model.
        :raises NonFiniteError: the gradient is not finite, and no more steps may be skipped.
        """
        drawn, losses, grad_norm, problem = self._learn(batch, cond)
        if problem:
            self.skipped += 1
            if self.skipped > self.skip_nonfinite:
                raise NonFiniteError(problem)
            logger.log(self._skip_warning(problem))
            return
        self.skipped = 0
        if isinstance(self.schedule_sampler, LossSecondMomentResampler):
            self.schedule_sampler.update_with_all_losses(drawn.all_t, losses["loss"])
        self._update(grad_norm, self._averages([self.step + 1]))
        if self.is_first:
            self.log.add_step(drawn.all_t, drawn.all_weights, losses, grad_norm, self.opt.lr)

    def _learn(
        self, batch: th.Tensor, cond: dict[str, th.Tensor]
    ) -> tuple["Draws", dict[str, th.Tensor], float, str]:
        """Compute the gradient of a step.

        :return: what was drawn, the loss terms (see `compute_gradient`), the norm of the gradient, and a text that
            says what is not finite; empty: everything is.
        """
        # This thread has little to compute: with more cores it would wait for each of them at every operation.
        if th.get_num_threads() != 1:  # setting them takes time even when nothing changes
            th.set_num_threads(1)
        drawn = self.draw(batch, cond)
        losses = self.compute_gradient(drawn)
        grad_norm = self.gradients.norm()
        self.samples += len(drawn.all_t)
        problem = ""
        if not (math.isfinite(grad_norm) and th.isfinite(losses["loss"]).all()):
            t = drawn.t if self.alone else drawn.all_t
            bad = t[~th.isfinite(losses["loss"])].tolist()
            where = f"the loss at timesteps {bad}" if bad else f"the gradient (timesteps {t.tolist()})"
            problem = f"step {self.step + 1}: {where} is not finite (gradient norm {grad_norm})"
        return drawn, losses, grad_norm, problem

    def _update(self, grad_norm: float, means: list[tuple[list[th.Tensor], float]]) -> None:
        """Update the weights by the gradient, and then the moving averages `means`, each with its decay."""
        factor = min(1.0, self.grad_clip / (grad_norm + 1e-6)) if self.grad_clip > 0 else 1.0
        self.opt.lr = learning_rate(
            self.step,
            self.lr,
            self.lr_warmup_steps,
            self.lr_anneal_steps,
            self.lr_decay,
            self.lr_decay_share,
            self.total_steps,
        )
        self.step += 1
        gradients = self.gradients
        self.opt.step(gradients.values, means, gradients.copies.in_16_bits, factor, gradients.more)
        self.gradients.clear()

    def _averages(self, steps: Sequence[int]) -> list[tuple[list[th.Tensor], float]]:
        """The moving averages, each with its decay in all of `steps`, during which the weights stay the same."""
        means = [
            (mean, math.prod(ema_decay(float(rate), step) for step in steps))
            for rate, mean in self.ema_params.items()
        ]
        means += [
            (mean, math.prod(averages.decay(float(length), step) for step in steps))
            for length, mean in self.power_params.items()
        ]
        return means

    # -- a round of steps that each process takes on its own ---------------------------------------------

    def run_round(self) -> None:
        """Take the steps up to the next multiple of `sync_interval`, each process on its own, and then meet.

        At the end, all processes continue from the same weights (see `Outer`) and from the mean of their optimizer's
        moments, as local Adam does (Cheng & Glasgow 2024, arXiv 2409.13155). So a checkpoint needs the state of only
        one process, and a resumed run may have another number of them. The moving averages follow the weights at the
        ends of rounds.

        A step that one process skipped because its gradient was not finite counts if another process took it.

        :raises NonFiniteError: a process had to skip more steps in a row than allowed. The round was completed without
            them.
        """
        self.outer.begin()
        first, failure, warnings = self.step, "", []
        last = min((first // self.sync_interval + 1) * self.sync_interval, self.total_steps)
        taken: list[LocalStep] = []
        for _ in range(last - first):
            step = self._step_alone(*next(self.data))
            taken.append(step)
            self.skipped = self.skipped + 1 if step.problem else 0
            if self.skipped > self.skip_nonfinite:
                failure = failure or step.problem
            elif step.problem:
                warnings.append(self._skip_warning(step.problem))
        self.log.stopwatch.laps += len(taken) - 1  # the round is measured as one
        mine = [self.step - first, self.skipped, [bool(step.problem) for step in taken], warnings, failure]
        updates, skipped, holes, warned, failures = zip(*dist_util.all_gather(mine))
        self._meet(max(updates) - mine[0])
        self.step, self.skipped = first + max(updates), max(skipped)
        self._count(taken, [any(some) for some in zip(*holes)])
        with th.no_grad():
            for mean, decay in self._averages(range(first + 1, self.step + 1)):
                update_ema(mean, self.params, decay)
        for text in (text for texts in warned for text in texts):
            logger.log(text)
        if any(failures):
            raise NonFiniteError(next(filter(None, failures)))

    def _step_alone(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> LocalStep:
        """A step of this process, with its own gradient. It is skipped if the gradient is not finite."""
        drawn, losses, grad_norm, problem = self._learn(batch, cond)
        if not problem:
            self._update(grad_norm, [])
        return LocalStep(problem, drawn.all_t, drawn.all_weights, losses, grad_norm, self.opt.lr)

    @th.no_grad()
    def _meet(self, missed: int) -> None:
        """Give all processes the same weights, moments and step counts.

        :param missed: how many steps fewer than others this process took.
        """
        ranks = dist_util.get_world_size()
        change = self.outer.change()
        self.add_up(change)
        self.outer.step(change.div_(ranks))
        self.opt.counts += missed
        for moments in self.opt.moments.values():
            if ranks > 1:
                mean = th.cat([moment.flatten() for moment in moments])
                self.add_up(mean)
                mean.div_(ranks)
                for moment, value in zip(moments, mean.split([moment.numel() for moment in moments])):
                    moment.copy_(value.view_as(moment))
        for copy, p in zip(self.gradients.copies.in_16_bits, self.params):
            if copy is not None:
                copy.copy_(p)

    def _count(self, taken: list[LocalStep], skipped: list[bool]) -> None:
        """Collect the losses of all processes, and add the steps of a round to the metrics and the sampler's history.

        :param skipped: for each step, whether a process has skipped it. Its losses are left out.
        """
        ranks = dist_util.get_world_size()
        names = list(taken[0].losses)
        losses = th.stack(
            [th.stack([step.losses[name] for name in names]) for step in taken]
        )  # [K, terms, B]
        table = th.zeros(ranks, *losses.shape)
        norms = th.zeros(ranks, len(taken))
        table[dist_util.get_rank()] = losses
        norms[dist_util.get_rank()] = th.tensor([step.grad_norm for step in taken])
        dist_util.all_reduce(table)
        dist_util.all_reduce(norms)
        for number, step in enumerate(taken):
            if skipped[number]:
                continue
            terms = dict(zip(names, table[:, number].transpose(0, 1).flatten(1)))  # each [R * B]
            if isinstance(self.schedule_sampler, LossSecondMomentResampler):
                self.schedule_sampler.update_with_all_losses(step.all_t, terms["loss"])
            if self.is_first:
                norm = norms[:, number].mean().item()
                self.log.add_step(step.all_t, step.all_weights, terms, norm, step.lr)

    def compute_gradient(self, drawn: "Draws") -> dict[str, th.Tensor]:
        """Set `self.gradients` to the gradient of the weighted mean loss over the batches of all R processes.

        :return: the loss terms of all images, without weights, each [R * B].
        """
        self.gradients.clear()
        parts = self.passes.slices(len(drawn.images))
        terms = self.workers.run([partial(self._pass, drawn, *numbered) for numbered in enumerate(parts)])
        return self._exchange({key: th.cat([some[key] for some in terms]) for key in terms[0]})

    def _pass(self, drawn: "Draws", number: int, part: slice) -> dict[str, th.Tensor]:
        """Compute the loss terms of the n images in `part`, each [n], and add their gradient as number `number`."""
        # The seeds hold for the backward pass too, in which gradient checkpointing evaluates the layers again.
        with self.gradients.model() as model, dropout_seeds(drawn.masks[part]):
            losses = self.diffusion.training_losses(
                model,
                drawn.images[part],
                drawn.t[part],
                model_kwargs={key: value[part] for key, value in drawn.cond.items()},
                noise=drawn.noise[part],
            )
            # Divided by the size of the batch, so that the sum over passes, and over processes, is the mean.
            size = len(drawn.t) if self.alone else len(drawn.all_t)
            share = (losses["loss"] * drawn.weights[part]).sum() / size
            self.gradients.add(share, model, number)
        return {key: value.detach() for key, value in losses.items()}

    def draw(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> "Draws":
        """Draw the random numbers of a step: timesteps, noise, classes to leave out, seeds of dropout masks."""
        # They depend on the position in the data, not on the step: after a skipped step they must not repeat.
        position = self.samples
        total = len(batch) * dist_util.get_world_size()
        offset = len(batch) * dist_util.get_rank()
        mine = slice(offset, offset + len(batch))
        rng = seeding.generator(self.seed, Purpose.TIMESTEPS, position)
        # A process that takes its steps on its own needs timesteps of the whole range in every one of them.
        parts = dist_util.get_world_size() if self.alone else 1
        drawn = [self.schedule_sampler.sample(total // parts, batch.device, rng) for _ in range(parts)]
        t, weights = map(th.cat, zip(*drawn))
        shape = (total, *batch.shape[1:])
        noise = seeding.normal(seeding.generator(self.seed, Purpose.NOISE, position), shape).to(batch.device)
        if self.class_dropout:
            chances = seeding.generator(self.seed, Purpose.CLASS_DROPOUT, position).random(total)
            withheld = th.from_numpy(chances[mine] < self.class_dropout)
            cond = {**cond, "y": cond["y"].masked_fill(withheld, self.model.num_classes - 1)}
        # A seed for each image, so that a mask depends neither on the microbatch nor on the number of workers.
        masks = [0] * len(batch)
        if self.has_dropout:
            streams = (
                seeding.generator(self.seed, Purpose.DROPOUT, position + offset + i)
                for i in range(len(batch))
            )
            masks = list(map(seeding.integer, streams))
        return Draws(batch, cond, t[mine], weights[mine], noise[mine], masks, t, weights)

    def _exchange(self, losses: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Add up the gradients of all R processes and collect their losses.

        :param losses: the loss terms of this process, each [B].
        :return: the loss terms of all processes, each [R * B], in the order of the ranks.
        """
        ranks = dist_util.get_world_size()
        if ranks == 1 or self.alone:
            return losses
        mine = th.stack(list(losses.values()))
        table = th.zeros(len(mine), ranks, mine.shape[1])
        table[:, dist_util.get_rank()] = mine
        gradient = [value.float().flatten() for value in self.gradients.total()]
        if self.add_up is dist_util.all_reduce:
            message = th.cat([*gradient, table.flatten()])  # one message, for it takes time to begin one
            dist_util.all_reduce(message)
            *gradient, table = message.split([*(p.numel() for p in self.params), table.numel()])
        else:
            message = th.cat(gradient)
            self.add_up(message)
            gradient = message.split([p.numel() for p in self.params])
            dist_util.all_reduce(table)
        self.gradients.values = [value.view_as(p) for value, p in zip(gradient, self.params)]
        return dict(zip(losses, table.view(len(mine), -1)))

    def _skip_warning(self, problem: str) -> str:
        return f"WARNING: {problem}: skipped ({self.skipped} in a row, at most {self.skip_nonfinite})"

    # -- metrics and pictures ----------------------------------------------------------------------------

    def _write_row(self) -> None:
        """Write the metrics of the steps since the last row, in rank 0."""
        if not self.is_first:
            return
        self.elapsed = time.monotonic() - self.started
        self.log.write_row(self.step, self._known_total(), self.samples, self.elapsed, self.params)

    def _draw_preview(self) -> None:
        """Draw the pictures of this step if they are due and not yet drawn; a signal to stop ends that."""
        if not self.is_first or self.preview is None or not self.sample_interval:
            return
        due = self._is_due(self.sample_interval) or self.step == self.total_steps
        if not due or self.step == self.previewed_step:
            return
        try:
            with self._going_on(f"the picture of step {self.step} could not be drawn"):
                self.preview(self._averaged_model(), self.step)
        except Stopped:
            return
        self.previewed_step = self.step

    def _measure_heldout(self) -> dict[str, float]:
        """The held-out loss; empty if it is not measured, or an error or a signal to stop has ended that."""
        if self.heldout is None:
            return {}
        with contextlib.suppress(Stopped), self._going_on("the held-out loss could not be measured"):
            return self.heldout(self._averaged_model())
        return {}

    @contextlib.contextmanager
    def _going_on(self, failure: str) -> Iterator[None]:
        """A block that reports on the run. Its errors are logged as `failure`: none may end a run of days."""
        try:
            yield
        except Exception as error:
            self.check_folder()
            logger.log(f"WARNING: {failure} ({str(error) or type(error).__name__}); training goes on")

    def _averaged_model(self) -> Callable[..., th.Tensor]:
        """The model as a function of (x, timesteps, ...), with the first moving average as its weights.

        Every call raises `Stopped` if a signal has asked to stop.
        """
        self.interrupts.check()
        release_memory()
        averaged = next(iter(self.ema_params.values()))
        model = fast_model(self.model, self.precision, self.num_workers, averaged)

        def stoppable(*args: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
            self.interrupts.check()
            return model(*args, **kwargs)

        return stoppable

    # -- files -------------------------------------------------------------------------------------------

    def _open_checkpoint_table(self) -> None:
        """Continue checkpoints.csv at this step."""
        measured = heldout_columns() if self.heldout is not None else ()
        self.checkpoint_table = CheckpointTable(logger.get_dir(), measured)
        last = self.checkpoint_table.keep_until(self.step)
        if last != self.step and self.resumed_here is not None and self.step > 0:
            # The process that saved the checkpoint was killed before it added the row. (An imported model has step 0.)
            self.checkpoint_table.add(self.resumed_here)

    def save(self, unfinished_row: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this step, and bring the workbook up to date.

        :param unfinished_row: the state of `logger` that a resumed run continues with; by default the current one.
        """
        unfinished_row = logger.state() if unfinished_row is None else unfinished_row
        # On machines that round differently, the weights drift apart. If they have not, this changes nothing.
        dist_util.sync_params(self.params)
        if not self.is_first:
            self.saved_step = self.step
            return
        measured = self._measure_heldout()
        before = time.monotonic()
        self.elapsed = before - self.started
        tensors = {
            "model": self.model.state_dict(),
            **{rate: self._named(mean) for rate, mean in self.ema_params.items()},
            **{power_kind(length): self._named(mean) for length, mean in self.power_params.items()},
            "opt": self.opt.state_dict(),
        }
        if self.outer is not None:
            tensors["opt"]["outer"] = self.outer.state_dict()
        state = {
            "samples": self.samples,
            "global_batch": self.global_batch,
            "elapsed": self.elapsed,
            "arguments": self.arguments,
            "data": self.data_facts,
            "origin": self.origin,
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "log": unfinished_row,
            "logged_step": self.logged_step,
            "skipped": self.skipped,
            "previewed_step": self.previewed_step,
            "precision": self.precision,
            "heldout": measured,
            "plan": self.plan,
            "saved_at": datetime.datetime.now().isoformat(timespec="seconds"),
            "torch": th.__version__,
        }
        try:
            saved = checkpoint.save(logger.get_dir(), self.step, tensors, state, self.check_folder)
        except OSError:
            self.check_folder()  # its message is clearer, if that is the reason
            raise
        self.saved_step = self.step
        self.checkpoint_table.add(saved, seconds=time.monotonic() - before)
        deleted: list[str] = []
        if self.keep_last:
            # Another run may be in the folder now, whose checkpoints must not be deleted.
            deleted = checkpoint.rotate(
                logger.get_dir(), self.keep_last, self.keep_every, logger.log, self.check_folder
            )
        self._export()
        if self.publish is not None:
            self.publish(deleted)

    def _export(self) -> None:
        """Write page and workbook. After a signal to stop, leave them out if that takes long."""
        self.check_folder()
        if self.interrupts.stop is not None and self.export_seconds > EXPORT_SECONDS:
            self._report_old_workbook()
            return
        release_memory()  # that of the last step, because a workbook with thousands of rows needs much
        before = time.monotonic()
        try:
            with self._going_on("page and workbook could not be written"):
                with self.interrupts.abandoning():
                    _, failed = export_all(logger.get_dir(), self.check_folder)
                if failed:
                    self.check_folder()
                for what, error in failed:
                    logger.log(f"WARNING: the {what} could not be written ({error}); training goes on")
        except Stopped:
            self._report_old_workbook()
        self.export_seconds = time.monotonic() - before

    def _report_old_workbook(self) -> None:
        # Writing it is not worth the risk: a container that is told to stop is killed ten seconds later.
        logger.log(
            "the workbook was not updated, because that takes long. The run updates it when it is continued; "
            f"export_results.py {shlex.quote(logger.get_dir())} updates it now"
        )

    def _restore(self, source: Checkpoint) -> None:
        """Continue from `source`: weights, averages, optimizer, sampler history, metrics, data position."""
        state = source.state
        self.model.load_state_dict(source.load("model"))
        means = [("ema_rate", rate, rate, mean) for rate, mean in self.ema_params.items()]
        # A new power-function average treats the current weights as those of all earlier steps.
        means += [
            ("ema_lengths", length, power_kind(length), mean) for length, mean in self.power_params.items()
        ]
        for flag, value, kind, mean in means:
            if member_name(kind, source.step) not in source.state["files"]:
                logger.log(f"WARNING: --{flag} {value} is new; its average starts at step {source.step}")
                kind = "model"
            content = source.load(kind)
            for target, name in zip(mean, dict(self.model.named_parameters())):
                target.copy_(content[name])
        optimizer = source.load("opt")
        self.opt.load_state_dict(optimizer)
        if self.outer is not None and "outer" in optimizer:
            self.outer.load_state_dict(optimizer["outer"])
        try:
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        except ValueError as error:
            raise ValueError(
                f"{source.path('state')}: {error}; resume with the flags it was trained with"
            ) from None
        self.step = source.step
        self.samples = state["samples"]
        self.elapsed = state["elapsed"]
        self.logged_step = state["logged_step"]
        self.skipped = state["skipped"]
        self.previewed_step = state.get("previewed_step", self.step)
        self.unfinished_row = state["log"]
        self.plan = state.get("plan", {})
        before = state.get("global_batch", self.global_batch)
        if before != self.global_batch:
            logger.log(
                f"WARNING: --batch_size: {self.global_batch} images per step in all processes together; before, "
                f"it was {before}"
            )
        if source.folder == logger.get_dir():
            self.saved_step = self.step
            self.resumed_here = source
        else:
            # A run that branches off into a new directory takes the earlier rows along.
            for name in ("progress.csv", "progress.jsonl"):
                origin, target = bf.join(source.folder, name), os.path.join(logger.get_dir(), name)
                if bf.exists(origin) and not os.path.exists(target):
                    bf.copy(origin, target)
        logger.log(
            f"resumed step {self.step} from {source.folder}: model, optimizer, "
            f"EMA {', '.join(self.ema_params)}, {self.samples} images seen"
        )

    def _make_all_alike(self) -> None:
        """Copy the state of rank 0, which may have read a checkpoint, to the other processes."""
        position = {
            name: getattr(self, name)
            for name in ("step", "samples", "logged_step", "saved_step", "skipped", "plan")
        }
        position, history = dist_util.broadcast([position, self.schedule_sampler.state_dict()])
        vars(self).update(position)
        self.schedule_sampler.load_state_dict(history)
        dist_util.sync_params(self.params)
        if self.step > 0:
            dist_util.sync_params(self.opt.state_tensors())
            if self.outer is not None:
                dist_util.sync_params([self.outer.momentum])

    def _named(self, params: list[th.Tensor]) -> dict[str, th.Tensor]:
        """The model's state dict with `params`, in the order of its parameters, in their place."""
        state = self.model.state_dict()
        state.update(zip(dict(self.model.named_parameters()), params))
        return state


def hidden_kernels(model: th.nn.Module) -> list[int]:
    """The indices of the parameters that Muon updates: the kernels of convolutions and attention, but for both ends.

    :param model: a `UNetModel`.
    """
    ends = ("input_blocks.0.", "out.")
    named = enumerate(model.named_parameters())
    return [i for i, (name, p) in named if p.ndim > 2 and not name.startswith(ends)]


def parse_ema_rates(text: str | float) -> list[str]:
    """The rates in a comma-separated list, each as the text that file names contain.

    :raises ValueError: one is not a number in [0, 1).
    """
    try:
        return ema_rates(text)
    except ValueError as error:
        raise ValueError(f"ema_rate {text}: {error}") from None


def ema_decay(rate: float, step: int) -> float:
    """The decay of a moving average in update number `step` (from 1 on): `rate`, but at most (1 + step) / (10 + step).

    With a constant decay, an average would contain the initial weights for 1 / (1 - rate) steps. With this limit, it is
    at most about as long as the last tenth of the run so far.
    """
    return min(rate, (1 + step) / (10 + step))
