"""The training loop: microbatched gradients, AdamW, moving averages, metrics, checkpoints, exact resume."""

import datetime
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from signal import Signals
from typing import Any, NamedTuple

import blobfile as bf
import torch as th
from tqdm import tqdm

from improved_diffusion import dist_util, logger, seeding
from improved_diffusion.config import ema_rates
from improved_diffusion.cpu.gradients import Gradients, plan_passes
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.cpu.machine import release_memory
from improved_diffusion.cpu.optimizer import Optimizer
from improved_diffusion.cpu.workers import Workers
from improved_diffusion.evaluation.heldout import columns as heldout_columns
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, ModelVarType
from improved_diffusion.learning_rate import check_lr_schedule, learning_rate
from improved_diffusion.logger import CsvTable
from improved_diffusion.nn import Dropout, dropout_seeds
from improved_diffusion.progress import SECONDS_PER_LINE
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.results.export import export
from improved_diffusion.run import averages, checkpoint
from improved_diffusion.run.checkpoint import Checkpoint, member_name, power_kind
from improved_diffusion.run.interrupts import Interrupts, Stopped
from improved_diffusion.seeding import Purpose

STOP_REASONS = ("SIGINT", "SIGTERM", "SIGHUP", "--max_hours")
ECHO = 2.0  # seconds within which a launcher has passed on a signal
NO_END = 10**9  # of `total_steps`, until --hours have decided
PLANNING_SECONDS = 60.0  # of training that decide how many steps --hours are
PLANNING_STEPS = 5  # at the least; as many before them do not count, in which memory and caches fill
RESERVE = 0.01  # share of the hours for what cannot be foreseen
PREVIEW_IMAGES = 110  # training images that take as long as a preview
EXPORT_SECONDS = 3.0  # longer exports of the workbook are left out when a signal has asked to stop
CHECKPOINT_COLUMNS = ("step", "samples", "saved_at", "elapsed", "seconds", "megabytes", "files")


class NonFiniteError(RuntimeError):
    """The loss or the gradient is no longer a finite number; nothing was updated with it."""


class Draws(NamedTuple):
    """A batch of B images and all that is random in a step, which then is a function of it.

    :ivar images: of this process, [B, C, H, W]; so are the next five.
    :ivar cond: arguments of the model; some classes are withheld.
    :ivar t: timesteps, [B]; `weights`: of their losses, [B].
    :ivar noise: as the images.
    :ivar masks: seeds of the images' dropout masks.
    :ivar all_t: the timesteps of all R processes, [R * B]; `all_weights` likewise.
    """

    images: th.Tensor
    cond: dict[str, th.Tensor]
    t: th.Tensor
    weights: th.Tensor
    noise: th.Tensor
    masks: list[int]
    all_t: th.Tensor
    all_weights: th.Tensor


class TrainLoop:
    """Train `model` until `total_steps` updates are done, into the directory the logger is configured for.

    Everything random in step n (timesteps, noise, dropout) is a function of (`seed`, n), and the data of
    their position, so a resumed run repeats exactly what an undisturbed one would have done.

    With several processes (see `dist_util`) each makes a loop with the same arguments but its own part of the
    data, and all stay alike: R processes with batches of B images do what one does with R * B. Rank 0 alone
    reads checkpoints, writes and keeps the moving averages.

    :param data: yields (images [B, C, H, W] float32 in [-1, 1], dict of model arguments), B = `batch_size`:
        with several processes, the part of the batch that falls to this one, in the order of the ranks.
        When it has a method ``seek(samples)``, a resumed run continues the data where it stopped.
    :param batch_size: images per step and process.
    :param microbatch: images per forward and backward pass, -1 for the whole batch. Each pass is weighted by
        its share of the batch, so this changes neither the gradient nor `grad_norm`.
    :param ema_rate: a rate, or several separated by commas, for the moving averages (see `ema_decay`).
    :param ema_lengths: widths, separated by commas, of the power-function averages that are kept beside them (see
        `averages`); none by default.
    :param resume_checkpoint: a checkpoint, a run directory or any file of a checkpoint; empty: start afresh.
    :param schedule_sampler: draws the timesteps; uniformly by default.
    :param lr_anneal_steps: anneal the learning rate linearly to zero over so many steps; 0: do not.
    :param lr_warmup_steps, lr_decay, lr_decay_share: the rise and fall of the learning rate (see `learning_rate`).
    :param grad_clip: largest norm of the gradient; 0: unlimited.
    :param skip_nonfinite: steps in a row with a non-finite gradient to skip before giving up.
    :param class_dropout: share of the images whose class is withheld (Ho & Salimans 2022, algorithm 1): their
        label becomes the model's last one.
    :param hours: instead of `total_steps`: let the speed of the first minute decide them, so that training takes
        this many hours, all sessions together. A resumed run keeps what was decided. 0: do not.
    :param on_plan: called by rank 0 with the `total_steps` that were decided.
    :param max_hours: save and stop after so many hours of this session, as a batch system's limit demands;
        0: unlimited.
    :param keep_last: keep this many of the newest checkpoints and those whose step `keep_every` divides; 0:
        keep all.
    :param tensorboard: also write TensorBoard event files.
    :param arguments: the flags of the run; they are stored in every checkpoint.
    :param data_facts: what identifies the data (fingerprint, class names); stored likewise, and a run is not
        resumed on other data.
    :param origin: of a run that starts from the weights of another model, what it took; stored likewise.
    :param sample_interval: steps between calls of `preview`, which is called at the last step as well; 0: none.
    :param preview: called by rank 0, before the checkpoint of that step, with the model as a function, its weights
        the first moving average, and the step.
    :param heldout: called by rank 0 before every checkpoint with the model as a function, its weights the first moving
        average, and a function that tells whether to stop; returns what it has measured, by the names of
        `heldout.columns`, for checkpoints.csv.
    :param precision: "fp32" or "bf16", what forward and backward passes compute in (see `Gradients`).
    :param num_workers: cores to compute on, with passes of their own (see `plan_passes`).
    :param publish: called by rank 0 after each checkpoint, when everything in the directory belongs together.
    :param check_folder: called by rank 0 before anything is written; raises an OSError that ends the run when the
        directory is no longer its own (see `run_lock`).
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
        heldout: Callable[[Callable[..., th.Tensor], Callable[[], bool]], dict[str, float]] | None = None,
        precision: str = "fp32",
        num_workers: int = 1,
        publish: Callable[[], object] | None = None,
        check_folder: Callable[[], object] | None = None,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.global_batch = batch_size * dist_util.get_world_size()
        self.writes = dist_util.get_rank() == 0
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
        self.plan: dict[str, float] = {}  # what `hours` have led to
        self.max_hours = max_hours
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.tensorboard = tensorboard
        self.arguments = arguments or {}
        self.data_facts = data_facts or {}
        self.origin = origin or {}
        self.sample_interval = sample_interval
        self.preview = preview
        self.heldout = heldout
        self.precision = precision
        self.publish = publish
        self.check_folder = check_folder or (lambda: None)

        self.step = 0  # completed optimizer updates
        self.samples = 0  # images consumed, by all processes together
        self.elapsed = 0.0  # seconds of wall-clock over all sessions
        self.previewed_step = 0
        self.interrupts = Interrupts(echo=ECHO if dist_util.get_world_size() > 1 else 0.0)
        self.next_line = 0.0  # when to say next how far training is, where there is no bar
        self.export_seconds = 0.0  # what the last export took
        self.logged_step = 0  # the last step with a row for its whole interval
        self.saved_step: int | None = None
        self.resumed_here: Checkpoint | None = None  # what this run continues, when it is its own
        self.skipped = 0  # steps in a row that were not finite
        self.log_state: dict[str, Any] = {"values": {}, "sums": {}}  # the row that a resumed run goes on with

        self.params = list(model.parameters())
        self.model.train()
        self.has_dropout = any(layer.p > 0 for layer in model.modules() if isinstance(layer, Dropout))
        self.num_workers = num_workers
        self.passes = plan_passes(batch_size, self.microbatch, num_workers)
        self.workers = Workers(self.passes.side_by_side, self.passes.cores)
        self.opt = Optimizer(self.params, lr, weight_decay, self.workers.run)
        self.ema_params = {
            rate: [p.detach().clone() for p in self.params] for rate in parse_ema_rates(ema_rate)
        }
        self.power_params = {
            length: [p.detach().clone() for p in self.params]
            for length in averages.parse_lengths(ema_lengths)
        }
        if not self.writes:
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

        :return: what ended it early, the name of a signal or "--max_hours", or None.
        :raises NonFiniteError: the loss or gradient was not finite more often than allowed. What the last finite
            step has left is saved; the message names the checkpoint.
        :raises OSError: a checkpoint or row could not be written; what was saved before is intact.
        """
        if self.writes:
            self._continue_checkpoint_table()
        if self.step >= self.total_steps:
            logger.log(
                f"nothing left to do: this run has reached step {self.step}; raise --total_steps to go on"
            )
            if self.writes:
                # The process that came to the end may have been stopped before it could.
                with self.interrupts:
                    self._draw_preview()
                self._export()
            return None
        bar = self._open_records() if self.writes else None
        self.interval = _Stopwatch()
        session_started = time.monotonic()
        self.started = session_started - self.elapsed
        end = f"to {self.total_steps}" if self.total_steps != NO_END else f"for {self.hours:g} hours in all"
        logger.log(f"training from step {self.step} {end}; the first step is under way...")
        pace = _Pace()
        with self.interrupts:
            self._draw_preview()  # again, if the last session was stopped while it drew
            stopped_by, save = self._requests(session_started)
            failure: NonFiniteError | None = None
            while self.step < self.total_steps and stopped_by is None:
                try:
                    with self.interval:
                        batch, cond = next(self.data)
                        self.run_step(batch, cond)
                except NonFiniteError as error:
                    failure = error
                    break
                self.check_folder()
                if self.total_steps == NO_END and self._agree(pace.is_known()):
                    self._plan(pace.seconds_per_step)
                    if bar is not None:
                        bar.total = self.total_steps
                if bar is not None:
                    bar.update(self.step - bar.n)
                if self.step % self.log_interval == 0 and self.logged_step < self.step:
                    self._log_row(bar)
                    self.logged_step = self.step
                self._draw_preview()
                stopped_by, requested = self._requests(session_started)
                save = save or requested
                due = save or self.step % self.save_interval == 0
                if due and self.saved_step != self.step and self.step < self.total_steps:
                    save = False
                    self.save(logger.state())
            unfinished_row = logger.state()
            if self.logged_step < self.step:
                # Written for the reader; a run that goes on replaces this row by that of the whole interval.
                self._log_row(bar)
            # The last checkpoint comes after the last row: with it, the run is complete.
            if self.saved_step != self.step and (failure is None or self._is_finite()):
                self.save(unfinished_row)
            elif self.writes:
                self._export()
        if bar is not None:
            bar.close()
        if self.writes:
            self.checkpoint_table.close()
        if failure is not None:
            kept = "no checkpoint has been saved"
            if self.saved_step is not None:
                kept = (
                    f"checkpoint {self.saved_step} has the last finite weights, averages and optimizer state"
                )
            raise NonFiniteError(f"{failure}; {kept}")
        return stopped_by

    def _agree(self, ready: bool) -> bool:
        """Whether rank 0 is `ready`, which measures for all."""
        return dist_util.broadcast(ready) if dist_util.get_world_size() > 1 else ready

    def _plan(self, seconds_per_step: float) -> None:
        """Decide `total_steps` by the speed so far, and save what was decided."""
        seconds_per_step = dist_util.broadcast(seconds_per_step)
        before = time.monotonic()
        self.save(logger.state())
        per_save = time.monotonic() - before
        extra = per_save / self.save_interval
        if self.preview is not None and self.sample_interval:
            extra += seconds_per_step * PREVIEW_IMAGES / self.global_batch / self.sample_interval
        left = self.hours * 3600 * (1 - RESERVE) - (time.monotonic() - self.started) - 2 * per_save
        steps = steps_within(left, seconds_per_step + extra)
        self.total_steps = dist_util.broadcast(max(self.step + steps, self.lr_warmup_steps + 1))
        self.plan = {"hours": self.hours, "seconds_per_step": seconds_per_step, "seconds_per_save": per_save}
        self.arguments = {**self.arguments, "total_steps": self.total_steps}
        logger.log(
            f"--hours {self.hours:g}: at {self.global_batch / seconds_per_step:.1f} images/s, and {per_save:.1f} s "
            f"for each checkpoint, that is --total_steps {self.total_steps}"
        )
        if self.writes and self.on_plan is not None:
            self.on_plan(self.total_steps)
        if self.writes:
            self.checkpoint_table.keep_until(self.step - 1)  # the same step is saved again, with the plan
        self.save(logger.state())

    def _is_finite(self) -> bool:
        """Whether all that is trained consists of finite numbers; an update with a huge --lr may overflow."""
        tensors = [*self.params, *self.opt.state_tensors()]
        return dist_util.broadcast(all(bool(th.isfinite(tensor).all()) for tensor in tensors))

    def _requests(self, session_started: float) -> tuple[str | None, bool]:
        """What was asked of any process, so that all act on it at the same step: a reason to stop, and whether
        to save."""
        if self.max_hours and time.monotonic() - session_started > self.max_hours * 3600:
            self.interrupts.stop = self.interrupts.stop or "--max_hours"
        stops = (self.interrupts.stop == reason for reason in STOP_REASONS)
        asked = th.tensor([*stops, self.interrupts.save]).int()
        self.interrupts.save = False
        dist_util.all_reduce(asked)
        *stops, save = asked.tolist()
        return next((reason for reason, count in zip(STOP_REASONS, stops) if count), None), save > 0

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One optimizer update: draw timesteps and noise, add up the gradient, clip, AdamW, averages, metrics."""
        # This thread has little to compute: with more cores it would wait for each of them at every operation.
        if th.get_num_threads() != 1:  # setting them takes time even when nothing changes
            th.set_num_threads(1)
        drawn = self.draw(batch, cond)
        losses = self.compute_gradient(drawn)
        t, weights = drawn.all_t, drawn.all_weights
        grad_norm = self.gradients.norm()
        self.samples += len(t)
        if not (math.isfinite(grad_norm) and th.isfinite(losses["loss"]).all()):
            self._on_nonfinite(t, losses["loss"], grad_norm)
            return
        self.skipped = 0
        if isinstance(self.schedule_sampler, LossSecondMomentResampler):
            self.schedule_sampler.update_with_all_losses(t, losses["loss"])
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
        means = [(mean, ema_decay(float(rate), self.step)) for rate, mean in self.ema_params.items()]
        means += [
            (mean, averages.decay(float(length), self.step)) for length, mean in self.power_params.items()
        ]
        gradients = self.gradients
        self.opt.step(gradients.values, means, gradients.copies.in_16_bits, factor, gradients.more)
        self.gradients.clear()
        self._log_losses(t, weights, losses)
        logger.logkv_mean("grad_norm", grad_norm)
        logger.logkv("lr", self.opt.lr)

    def compute_gradient(self, drawn: "Draws") -> dict[str, th.Tensor]:
        """Set `self.gradients` to the gradient of the weighted mean loss over the batch of all processes.

        :return: the loss terms of all images, each [R * B].
        """
        self.gradients.clear()
        parts = self.passes.slices(len(drawn.images))
        terms = self.workers.run([partial(self._pass, drawn, *numbered) for numbered in enumerate(parts)])
        return self._exchange({key: th.cat([some[key] for some in terms]) for key in terms[0]})

    def _pass(self, drawn: "Draws", number: int, part: slice) -> dict[str, th.Tensor]:
        """Compute the losses of one part of the batch, each [B'], and add their gradient."""
        # Gradient checkpointing evaluates layers again on the way back, with the same dropout masks.
        with self.gradients.model() as model, dropout_seeds(drawn.masks[part]):
            losses = self.diffusion.training_losses(
                model,
                drawn.images[part],
                drawn.t[part],
                model_kwargs={key: value[part] for key, value in drawn.cond.items()},
                noise=drawn.noise[part],
            )
            # The sum over all passes and processes is the mean over the batch, whatever the sizes of passes.
            share = (losses["loss"] * drawn.weights[part]).sum() / len(drawn.all_t)
            self.gradients.add(share, model, number)
        return {key: value.detach() for key, value in losses.items()}

    def draw(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> "Draws":
        """Draw what is random in a step: timesteps, noise, withheld classes, dropout masks."""
        # The position in the data, not the step, numbers the draws, so that a skipped step is not drawn again.
        position = self.samples
        total = len(batch) * dist_util.get_world_size()
        offset = len(batch) * dist_util.get_rank()
        mine = slice(offset, offset + len(batch))
        rng = seeding.generator(self.seed, Purpose.TIMESTEPS, position)
        t, weights = self.schedule_sampler.sample(total, batch.device, rng)
        shape = (total, *batch.shape[1:])
        noise = seeding.normal(seeding.generator(self.seed, Purpose.NOISE, position), shape).to(batch.device)
        if self.class_dropout:
            chances = seeding.generator(self.seed, Purpose.CLASS_DROPOUT, position).random(total)
            withheld = th.from_numpy(chances[mine] < self.class_dropout)
            cond = {**cond, "y": cond["y"].masked_fill(withheld, self.model.num_classes - 1)}
        # Image by image, so that neither the microbatch nor the number of workers changes a mask.
        masks = [0] * len(batch)
        if self.has_dropout:
            streams = (
                seeding.generator(self.seed, Purpose.DROPOUT, position + offset + i)
                for i in range(len(batch))
            )
            masks = list(map(seeding.integer, streams))
        return Draws(batch, cond, t[mine], weights[mine], noise[mine], masks, t, weights)

    def _exchange(self, losses: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Add up the gradients of all processes, and collect their losses, in a single message.

        :param losses: this process's loss terms, each [B / R].
        :return: the terms of the whole batch, each [B], in the order of the ranks.
        """
        ranks = dist_util.get_world_size()
        if ranks == 1:
            return losses
        mine = th.stack(list(losses.values()))
        table = th.zeros(len(mine), ranks, mine.shape[1])
        table[:, dist_util.get_rank()] = mine
        message = th.cat([*(value.float().flatten() for value in self.gradients.total()), table.flatten()])
        dist_util.all_reduce(message)
        *gradients, table = message.split([*(p.numel() for p in self.params), table.numel()])
        self.gradients.values = [value.view_as(p) for value, p in zip(gradients, self.params)]
        return dict(zip(losses, table.view(len(mine), -1)))

    def _on_nonfinite(self, t: th.Tensor, losses: th.Tensor, grad_norm: float) -> None:
        bad = t[~th.isfinite(losses)].tolist()
        where = f"the loss at timesteps {bad}" if bad else f"the gradient (timesteps {t.tolist()})"
        message = f"step {self.step + 1}: {where} is not finite (gradient norm {grad_norm})"
        self.skipped += 1
        if self.skipped > self.skip_nonfinite:
            raise NonFiniteError(message)
        logger.log(f"WARNING: {message}: skipped ({self.skipped} in a row, at most {self.skip_nonfinite})")

    # -- metrics -----------------------------------------------------------------------------------------

    def columns(self) -> list[str]:
        """The columns of progress.csv, all of which exist from the first row on."""
        terms = ["loss"]
        if not self.diffusion.loss_type.is_vb():
            learned = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
            terms += ["mse", "vb"] if self.diffusion.model_var_type in learned else ["mse"]
        quartiles = [f"{term}{suffix}" for term in terms for suffix in ("", "_q0", "_q1", "_q2", "_q3")]
        tail = ["grad_norm", "param_norm", "lr", "images_per_sec", "elapsed"]
        return ["step", "samples", *quartiles, *tail]

    def _log_losses(self, t: th.Tensor, weights: th.Tensor, losses: dict[str, th.Tensor]) -> None:
        if not self.writes:
            return
        quarters = (4 * t // self.diffusion.num_timesteps).tolist()
        for key, values in losses.items():
            # The weights make the mean over all timesteps independent of how often each is drawn. Within a quarter
            # they would multiply the mean by the quarter's share of the draws.
            for quarter, value, weighted in zip(quarters, values.tolist(), (values * weights).tolist()):
                logger.logkv_mean(key, weighted)
                logger.logkv_mean(f"{key}_q{quarter}", value)

    def _log_row(self, bar: tqdm | None) -> None:
        if not self.writes:
            return
        self.elapsed = time.monotonic() - self.started
        logger.logkv("step", self.step)
        logger.logkv("samples", self.samples)
        logger.logkv("param_norm", th.nn.utils.get_total_norm([p.detach() for p in self.params]).item())
        # A session that is stopped before its first step may have a row to write, but has no speed yet.
        speed = self.interval.laps * self.global_batch / self.interval.seconds if self.interval.laps else None
        logger.logkv("images_per_sec", speed)
        logger.logkv("elapsed", self.elapsed)
        self.interval.reset()
        row = logger.dumpkvs()
        pace, left = "", ""
        end = "" if self.total_steps == NO_END else f"/{self.total_steps}"
        if speed is not None:
            pace = f"{speed:.1f} images/s"
            if self.total_steps != NO_END:
                left = (self.total_steps - self.step) * self.global_batch / speed
                left = f"{datetime.timedelta(seconds=round(left))} left"
        if bar is not None:
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {pace}")
        elif self.step == self.total_steps or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + SECONDS_PER_LINE
            logger.log(
                f"step {self.step}{end}  loss {row['loss']:.5f}  grad_norm {row['grad_norm']:.4f}  {pace}  {left}"
            )

    def _draw_preview(self) -> None:
        if not self.writes or self.preview is None or not self.sample_interval:
            return
        due = self.step % self.sample_interval == 0 or self.step == self.total_steps
        if not due or self.step == self.previewed_step:
            return
        model = self._averaged_model()

        def stoppable(*args, **kwargs) -> th.Tensor:
            self.interrupts.check()
            return model(*args, **kwargs)

        try:
            self.preview(stoppable, self.step)
        except Stopped:
            return
        self.previewed_step = self.step

    def _averaged_model(self) -> Callable[..., th.Tensor]:
        """The model as a function, with the first moving average as its weights."""
        release_memory()
        averaged = next(iter(self.ema_params.values()))
        return fast_model(self.model, self.precision, self.num_workers, averaged)

    def _measure_heldout(self) -> dict[str, float]:
        """The held-out loss; empty where there is none, or a signal has asked to stop."""
        if self.heldout is None or self.interrupts.stop in Signals.__members__:
            return {}
        return self.heldout(self._averaged_model(), lambda: self.interrupts.stop in Signals.__members__)

    # -- state on disk -----------------------------------------------------------------------------------

    def _continue_checkpoint_table(self) -> None:
        self.checkpoint_table = CsvTable(
            os.path.join(logger.get_dir(), "checkpoints.csv"),
            [*CHECKPOINT_COLUMNS, *(heldout_columns() if self.heldout is not None else ())],
        )
        last = self.checkpoint_table.keep_until(self.step)
        if last != self.step and self.resumed_here is not None and self.step > 0:
            # The process that saved it was killed before it could do this. (Step 0 is that of an imported model.)
            self._add_row_of(self.resumed_here)

    def _open_records(self) -> tqdm | None:
        """Continue the tables of metrics. :return: a progress bar, on a terminal."""
        logger.configure(
            logger.get_dir(), self.columns(), keep_until=self.logged_step, tensorboard=self.tensorboard
        )
        logger.load_state(self.log_state)
        if not sys.stderr.isatty():
            return None
        return tqdm(
            total=None if self.total_steps == NO_END else self.total_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
        )

    def save(self, unfinished_row: dict[str, Any]) -> None:
        """Write a checkpoint of this step, with the state of the logger, and bring the workbook up to date."""
        # Machines that round differently drift apart by last digits; equal ones lose nothing by this.
        dist_util.sync_params(self.params)
        self.saved_step = self.step
        if not self.writes:
            return
        measured = self._measure_heldout()
        self.check_folder()  # drawing the preview may have taken minutes
        before = time.monotonic()
        self.elapsed = before - self.started
        tensors = {
            "model": self.model.state_dict(),
            **{rate: self._named(mean) for rate, mean in self.ema_params.items()},
            **{power_kind(length): self._named(mean) for length, mean in self.power_params.items()},
            "opt": self.opt.state_dict(),
        }
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
        saved = checkpoint.save(logger.get_dir(), self.step, tensors, state)
        self._add_row_of(saved, seconds=time.monotonic() - before)
        if self.keep_last:
            checkpoint.rotate(logger.get_dir(), self.keep_last, self.keep_every, log=logger.log)
        self._export()
        if self.publish is not None:
            self.publish()

    def _add_row_of(self, saved: Checkpoint, seconds: float | None = None) -> None:
        """Add the row of a checkpoint to checkpoints.csv; `seconds` is what saving took, where that is known."""
        files, measured = saved.state["files"], saved.state.get("heldout", {})
        self.checkpoint_table.append(
            {
                "step": saved.step,
                "samples": saved.state["samples"],
                "saved_at": saved.state.get("saved_at"),
                "elapsed": saved.state["elapsed"],
                "seconds": seconds,
                "megabytes": sum(entry["bytes"] for entry in files.values()) / 1e6,
                "files": " ".join(files),
                **{name: value for name, value in measured.items() if name in self.checkpoint_table.columns},
            }
        )

    def _export(self) -> None:
        self.check_folder()
        if self.interrupts.stop in Signals.__members__ and self.export_seconds > EXPORT_SECONDS:
            self._leave_workbook()
            return
        # Between two steps there is much to give back, and a workbook of thousands of rows takes some.
        release_memory()
        before = time.monotonic()
        try:
            with self.interrupts.abandoning():
                export(logger.get_dir())
        except Stopped:
            self._leave_workbook()
        except Exception as error:  # whatever is wrong with a report, it is no reason to end a run of days
            logger.log(f"WARNING: the workbook could not be written ({error}); training goes on")
        self.export_seconds = time.monotonic() - before

    def _leave_workbook(self) -> None:
        # A container that is told to stop is killed ten seconds later.
        logger.log(
            "the workbook is left as it was, because writing it takes long: the run that goes on writes it, and so "
            f"does export_results.py {shlex.quote(logger.get_dir())}"
        )

    def _restore(self, source: Checkpoint) -> None:
        """Continue from `source`: weights, averages, optimizer, sampler history, metrics, data position."""
        state = source.state
        self.model.load_state_dict(source.load("model"))
        means = [("ema_rate", rate, rate, mean) for rate, mean in self.ema_params.items()]
        # Where it starts, such an average takes the weights to have been as they are since the first step.
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
        self.opt.load_state_dict(source.load("opt"))
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
        self.log_state = state["log"]
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
            # A run that branches off into a directory of its own brings its history along.
            for name in ("progress.csv", "progress.jsonl"):
                origin, target = bf.join(source.folder, name), os.path.join(logger.get_dir(), name)
                if bf.exists(origin) and not os.path.exists(target):
                    bf.copy(origin, target)
        logger.log(
            f"resumed step {self.step} from {source.folder}: model, optimizer, "
            f"EMA {', '.join(self.ema_params)}, {self.samples} images seen"
        )

    def _make_all_alike(self) -> None:
        """Give every process what rank 0 has, which may have read a checkpoint."""
        position = {
            name: getattr(self, name)
            for name in ("step", "samples", "logged_step", "saved_step", "skipped", "plan")
        }
        position, history = dist_util.broadcast([position, self.schedule_sampler.state_dict()])
        vars(self).update(position)
        self.schedule_sampler.load_state_dict(history)
        dist_util.sync_params(self.params)
        if self.step == 0:
            return
        dist_util.sync_params(self.opt.state_tensors())

    def _named(self, params: list[th.Tensor]) -> dict[str, th.Tensor]:
        """A state dict like the model's with `params` in the place of its parameters."""
        state = self.model.state_dict()
        state.update(zip(dict(self.model.named_parameters()), params))
        return state


def parse_ema_rates(text: str | float) -> list[str]:
    """The rates in a comma-separated list, as they shall stand in file names.

    :raises ValueError: one is not a number in [0, 1).
    """
    try:
        return ema_rates(text)
    except ValueError as error:
        raise ValueError(f"ema_rate {text}: {error}") from None


def ema_decay(rate: float, step: int) -> float:
    """The decay of a moving average in update number `step` (from 1): (1 + step) / (10 + step), up to `rate`.

    The growing decay makes young averages usable: they forget the initial weights within a fraction of the
    run so far, instead of within a fixed 1 / (1 - rate) steps.
    """
    return min(rate, (1 + step) / (10 + step))


def steps_within(seconds: float, seconds_per_step: float) -> int:
    """How many whole steps fit into some time; at least one."""
    return max(1, int(seconds / seconds_per_step))


class _Pace:
    """Measures the seconds per step, from the first steps of a session on."""

    def __init__(self):
        self._steps, self._started = 0, 0.0
        self.seconds_per_step = 0.0

    def is_known(self) -> bool:
        """To be asked after every step: whether enough of them were measured."""
        self._steps += 1
        if self._steps == PLANNING_STEPS:
            self._started = time.monotonic()
        counted = self._steps - PLANNING_STEPS
        seconds = time.monotonic() - self._started
        if counted < PLANNING_STEPS or seconds < PLANNING_SECONDS:
            return False
        self.seconds_per_step = seconds / counted
        return True


class _Stopwatch:
    """Adds up the time spent within its `with` blocks."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.laps = 0

    def __enter__(self) -> None:
        self.before = time.monotonic()

    def __exit__(self, *exc_info) -> None:
        self.seconds += time.monotonic() - self.before
        self.laps += 1
