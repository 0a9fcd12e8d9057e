"""The job of image_train.py and super_res_train.py: train a model."""

import contextlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util, kernels, logger
from improved_diffusion.config import SuperResTrainConfig, TrainConfig, check_guidance
from improved_diffusion.cpu.compute import Compute, bf16_pays, choose
from improved_diffusion.cpu.machine import describe_machine, keep_memory
from improved_diffusion.evaluation.heldout import HeldOut, choose_images, heldout_loss, withhold
from improved_diffusion.flags import defaults, errors_about, named, with_defaults
from improved_diffusion.image_datasets import BatchStream, ImageSet, describe
from improved_diffusion.jobs.previews import COUNT, count_images, create_preview, preview_labels
from improved_diffusion.jobs.runs import (
    Weights,
    check_same_data,
    choose_log_dir,
    choose_source,
    find_data,
    find_model,
    find_unfinished,
    merge_for_resume,
    read_weights,
    record_arguments,
    record_run,
)
from improved_diffusion.jobs.script import OUT_OF_MEMORY, command, is_out_of_memory, started_as
from improved_diffusion.jobs.start import check_start, load_start, merge_for_start
from improved_diffusion.low_res import LowResStream, shrink
from improved_diffusion.recipes import RECIPES
from improved_diffusion.resample import (
    LogNormalSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.run.checkpoint import Checkpoint
from improved_diffusion.run.interrupts import exit_code
from improved_diffusion.run.lock import run_lock
from improved_diffusion.run.remote import PICTURES, working_folder
from improved_diffusion.sample_util import Subject, from_uint8, guide
from improved_diffusion.script_util import (
    check_images_fit,
    create_from_flags,
    is_super_resolution,
    join_processes,
    read_flag,
    read_images_alike,
)
from improved_diffusion.storage import is_remote, remove_temporaries
from improved_diffusion.train_util import NonFiniteError, TrainLoop


def run_training(
    config: TrainConfig | SuperResTrainConfig, given: set[str], project: str, call: str = ""
) -> int:
    """Begin or continue a run, and train until its end or a signal.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``datasets``, where CIFAR-10 is, ``scripts`` and ``runs``, the default place for
        runs.
    :param call: what started this, if it was not a command.
    :return: the exit code.
    :raises ValueError: a flag, the data or the checkpoint is unusable. Nothing was trained.
    """
    if config.processes > 1:
        if call:
            raise ValueError(f"--processes {config.processes}: is for the command line only; leave it out")
        with errors_about("processes"):
            dist_util.start_processes(config.processes, [sys.executable, *started_as()[1:], *sys.argv[1:]])
    join_processes(config)
    if config.init_from:
        config = replace(config, init_from=find_model(config.init_from))
    first = dist_util.get_rank() == 0
    log_dir = dist_util.broadcast(choose_log_dir(config, os.path.join(project, "runs")))
    if first and not (config.log_dir or config.resume_checkpoint or os.environ.get("OPENAI_LOGDIR")):
        unfinished = find_unfinished(config, os.path.join(project, "runs"), given)
        if unfinished is not None:
            folder, step = unfinished
            print(f"note: {folder} holds an unfinished run with the same flags, of {step:,} steps.")
            print(f"To continue it instead: {shlex.join([*started_as(), '--log_dir', folder])}")
    with contextlib.ExitStack() as stack:
        source, start, folder, publish, check_folder = None, None, log_dir, None, None
        if first:
            folder, publish = stack.enter_context(working_folder(log_dir))
            with errors_about("log_dir"):
                check_folder = stack.enter_context(run_lock(folder))
            for part in filter(os.path.isdir, (folder, os.path.join(folder, PICTURES))):
                remove_temporaries(part)
            source = choose_source(_as_local(config.resume_checkpoint, log_dir, folder), folder)
            if source is None and config.init_from:
                start = read_weights(config.init_from, config, flag_name="init_from")
                config = merge_for_start(config, given, start)
        if source is not None:
            config = merge_for_resume(config, given, source)
        own = {"data_dir"} & given  # each machine may have the data in another place
        config = with_defaults(config, own, dist_util.broadcast(config.to_dict()))
        if dist_util.broadcast(source is not None or start is not None):
            config = replace(config, channels=config.colour_channels)  # whatever the data: the model is there
        config.check(given)
        compute = _choose_compute(config, source)
        # Before the data are read, because this reports impossible models at once.
        model, diffusion = create_from_flags(config)
        _schedule_sampler(config, diffusion)
        if start is not None:
            check_start(model, start, config)
        check_images_fit(config, "batch_size", bytes_per_number=4)
        with dist_util.rank_0_first():
            config = replace(config, data_dir=find_data(config.data_dir, os.path.join(project, "datasets")))
        images = read_images_alike(
            config.data_dir, config.output_size, config.cache_limit_gb, channels=config.channels
        )
        config = replace(config, channels=images.channels)
        if source is not None:
            check_same_data(config, source, images.fingerprint)
        return _train(
            config, compute, log_dir, folder, publish, check_folder, source, start, images, project, call
        )


def _as_local(resume_checkpoint: str, log_dir: str, folder: str) -> str:
    """The path of the checkpoint to resume. If it is in the remote `log_dir`, take its copy in `folder`."""
    if is_remote(log_dir) and bf.dirname(resume_checkpoint) == log_dir.rstrip("/"):
        return os.path.join(folder, bf.basename(resume_checkpoint))
    return resume_checkpoint


def _choose_compute(config: TrainConfig | SuperResTrainConfig, source: Checkpoint | None) -> Compute:
    """The precision and cores of the flags. With --precision auto, a resumed run keeps its precision.

    All processes get the precision of rank 0. Each has its own number of cores.
    """
    chosen = choose("bf16" if config.use_fp16 else config.precision, config.num_workers)
    precision = chosen.precision
    before = precision if source is None else source.state.get("precision", "fp32")
    if config.precision == "auto" and not config.use_fp16:
        # Not the measured one: on a busy machine, the measurement may choose the other precision.
        precision = before
    elif before != precision:
        print(f"WARNING: this run was trained in {before}; it continues in {precision}")
    return Compute(dist_util.broadcast(precision), chosen.workers)


def _train(
    config: TrainConfig | SuperResTrainConfig,
    compute: Compute,
    log_dir: str,
    folder: str,
    publish: Callable[[list[str]], None] | None,
    check_folder: Callable[[], None] | None,
    source: Checkpoint | None,
    start: Weights | None,
    images: ImageSet,
    project: str,
    call: str,
) -> int:
    """Build the data, the model and the loop, and train in `folder`.

    :param log_dir: the directory as the user knows it; `folder` is its local copy if it is remote.
    :param source: the checkpoint to continue from. :param start: the weights to start a new run from.
    :return: the exit code.
    """
    if config.class_cond and not config.num_classes:
        config = replace(config, num_classes=images.num_classes)
    if config.class_cond and images.num_classes > config.num_classes:
        raise ValueError(f"--num_classes {config.num_classes}: the data have {images.num_classes} classes")
    processes = dist_util.get_world_size()
    others = None
    if config.heldout_share:
        try:
            images, others = withhold(images, config.heldout_share)
        except ValueError as error:
            raise named(error, {"share": "heldout_share"}) from None
    try:
        data = BatchStream(
            images,
            config.batch_size * processes,
            class_cond=config.class_cond,
            random_flip=config.random_flip,
            seed=config.seed,
            data_workers=config.data_workers,
            shard=dist_util.get_rank(),
            num_shards=processes,
        )
    except ValueError as error:
        hint = "; --class_cond False trains without classes" if images.labels is None else ""
        if hint and RECIPES.get(getattr(config, "recipe", ""), {}).get("class_cond"):
            hint += ", and so does --recipe small"
        raise ValueError(f"{named(error, {'class_cond': 'class_cond'})}{hint}") from None
    if is_super_resolution(config):
        data = LowResStream(data, config.small_size)
    th.manual_seed(config.seed)
    model, diffusion = create_from_flags(config)
    origin = source.state.get("origin", {}) if source is not None else {}
    if start is not None:
        origin = load_start(model, start, config, images.class_names)
    first = dist_util.get_rank() == 0
    heldout = _heldout(config, diffusion, images, others, project) if first else None
    keep_memory()
    machine = {**describe_machine(), "precision": compute.precision, "workers": compute.workers}
    machine["kernels"] = kernels.generation()
    parameters = sum(p.numel() for p in model.parameters())

    if first:
        check_folder()
        with errors_about("log_dir"):
            logger.configure(folder)
    logger.log(f"run directory: {log_dir}")
    logger.log(describe(images))
    if others is not None:
        logger.log(f"  withheld for the held-out loss: {len(others):,} more")
    logger.log(f"model: {parameters:,} parameters")
    if start is not None:
        logger.log(f"starts from: {start}")
        logger.log(f"taken: {origin['taken']}")
        logger.log(f"begins anew: {origin['anew']}")
    logger.log(f"computing in {compute}, of {machine['processor']}")
    if processes > 1:
        logger.log(f"{processes} processes with {config.batch_size} images each per step")
    if config.sync_interval > 1:
        logger.log(
            f"rounds of {config.sync_interval} steps, after which the processes exchange their weights"
        )
    if config.use_fp16:
        logger.log("--use_fp16 True: on a CPU, 16 bits are bfloat16, which needs no scaling of the loss")
    if compute.precision == "bf16" and not bf16_pays():
        logger.log("note: this processor is faster in float32: give --precision fp32")
    preview, preview_images = None, 0
    if first and config.sample_interval:
        preview, preview_images = _preview(config, diffusion, images, folder)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=_schedule_sampler(config, diffusion),
        resume_checkpoint=source or "",
        publish=publish,
        check_folder=check_folder,
        preview=preview,
        preview_images=preview_images,
        heldout=heldout,
        on_plan=lambda steps: record_arguments(folder, replace(config, total_steps=steps)),
        precision=compute.precision,
        num_workers=compute.workers,
        arguments=config.to_dict(),
        data_facts={"fingerprint": images.fingerprint, "class_names": images.class_names},
        origin=origin,
        **_loop_flags(config),
    )
    facts = {"data": images.summary, "machine": machine, "model": {"parameters": parameters}}
    facts["defaults"] = defaults(type(config))
    if origin:
        facts["origin"] = origin
    if first and loop.step < loop.total_steps:
        record_run(folder, config, facts, loop.step, call)
    try:
        stopped_by = loop.run_loop()
    except NonFiniteError as error:
        logger.log(
            f"error: {error}. To go on, resume with a lower --lr, --grad_clip 1 or --skip_nonfinite 10"
        )
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        saved = "nothing is saved" if loop.saved_step is None else f"checkpoint {loop.saved_step} is saved"
        logger.log(f"error: step {loop.step + 1}: {OUT_OF_MEMORY} ({saved})")
        return 1
    if stopped_by is not None:
        again = call or shlex.join([*started_as(), "--log_dir", log_dir])
        if processes > 1:
            again = f"the same command with --log_dir {shlex.quote(log_dir)}, in any number of processes"
        logger.log(f"stopped by {stopped_by} at step {loop.step}; to go on: {again}")
        return exit_code(stopped_by) if stopped_by.startswith("SIG") else 0
    metrics = "results.xlsx" if os.path.isfile(os.path.join(folder, "results.xlsx")) else "progress.csv"
    logger.log(f"done: {loop.step} steps. Metrics: {bf.join(log_dir, metrics)}")
    sampler, images = "image_sample", []
    if is_super_resolution(config):
        sampler, images = "super_res_sample", ["--base_samples", "IMAGES"]
    words = [*command(sampler, project), *images, "--model_path", log_dir]
    logger.log(f"To draw images: {shlex.join(words)}")
    return 0


def _heldout(
    config: TrainConfig | SuperResTrainConfig,
    diffusion: SpacedDiffusion,
    images: ImageSet,
    others: ImageSet | None,
    project: str,
) -> Callable[[Callable[..., th.Tensor]], dict[str, float]] | None:
    """The function that measures the held-out loss (see `TrainLoop`), or None.

    :param others: the images that were withheld from the training, or None.
    :raises ValueError: --heldout_dir is unusable.
    """
    path, datasets = config.heldout_dir, os.path.join(project, "datasets")
    if not path and others is None and config.data_dir == os.path.join(datasets, "cifar_train"):
        test = os.path.join(datasets, "cifar_test")
        path = test if os.path.exists(os.path.join(test, ".complete")) else ""
    if others is None and path in ("", "none"):
        return None
    if is_super_resolution(config):
        if config.heldout_dir or config.heldout_share:
            name = "heldout_share" if config.heldout_share else "heldout_dir"
            raise ValueError(f"--{name} {getattr(config, name)}: is for image_train.py only; leave it out")
        return None
    if others is None:
        others = read_flag("heldout_dir", path, config.output_size, config.channels)
    if others.fingerprint == images.fingerprint:
        print(
            f"WARNING: --heldout_dir {path}: these are the training images; their loss says little of others"
        )
    if config.class_cond and others.class_names != images.class_names:
        raise ValueError(f"--heldout_dir {path}: its classes differ from those of the training images")
    chosen = choose_images(len(others))
    labels = th.from_numpy(others.labels[chosen]) if config.class_cond else None
    heldout = HeldOut(from_uint8(others.get(chosen)), labels)
    return lambda model: heldout_loss(model, diffusion, heldout)


def _schedule_sampler(
    config: TrainConfig | SuperResTrainConfig, diffusion: SpacedDiffusion
) -> UniformSampler | LossSecondMomentResampler | LogNormalSampler:
    """The sampler of timesteps. :raises ValueError: a flag does not fit; the message names it."""
    numbers = (config.sigma_mean, config.sigma_std, config.uniform_share)
    try:
        return create_named_schedule_sampler(config.schedule_sampler, diffusion, *numbers)
    except ValueError as error:
        raise named(error, {"mean": "sigma_mean"}) from None


def _loop_flags(config: TrainConfig | SuperResTrainConfig) -> dict[str, Any]:
    """The flags that are arguments of `TrainLoop` with the same name and meaning."""
    decided = {"schedule_sampler", "resume_checkpoint", "precision", "num_workers"}
    arguments = inspect.signature(TrainLoop).parameters.keys() - decided
    return {name: value for name, value in config.to_dict().items() if name in arguments}


def _preview(
    config: TrainConfig | SuperResTrainConfig,
    diffusion: SpacedDiffusion,
    images: ImageSet,
    folder: str,
) -> tuple[Callable[[Callable[..., th.Tensor], int], None], int]:
    """The function that draws the pictures of --sample_interval, and how many images (see `TrainLoop`).

    A super-resolution model enlarges the first of `images`.
    """
    labels, low_res = None, None
    if is_super_resolution(config):
        shown = np.arange(min(COUNT, len(images)))
        low_res = shrink(from_uint8(images.get(shown)), config.small_size)
        labels = images.labels[shown] if config.class_cond else None
    elif config.class_cond:
        labels = preview_labels(config.num_classes)
    subject = Subject(config.output_size, config.seed, labels, low_res, channels=config.channels)
    preview = create_preview(diffusion, subject, folder)
    if is_super_resolution(config) or config.guidance_scale == 1:
        return preview, count_images(subject)
    check_guidance(config)  # again, because --init_from may have changed the classes

    def guided(model: Callable[..., th.Tensor], step: int) -> None:
        preview(guide(model, config.guidance_scale, config.num_classes), step)

    return guided, 2 * count_images(subject)  # with guidance, an image takes twice as long
