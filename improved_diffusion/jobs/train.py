"""A training job, from its flags to its exit code: what image_train.py and super_res_train.py have in common."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util, kernels, logger
from improved_diffusion.cpu.compute import Compute, bf16_pays, choose
from improved_diffusion.cpu.machine import describe_machine, keep_memory
from improved_diffusion.flags import (
    Parser,
    add_dict_to_argparser,
    args_to_dict,
    check_range,
)
from improved_diffusion.image_datasets import BatchStream, ImageSet, describe
from improved_diffusion.jobs.previews import COUNT, create_preview, preview_labels
from improved_diffusion.jobs.runs import (
    check_same_data,
    choose_log_dir,
    choose_source,
    find_data,
    merge_for_resume,
    record_run,
)
from improved_diffusion.low_res import LowResStream, shrink
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.run.checkpoint import Checkpoint
from improved_diffusion.run.interrupts import exit_code
from improved_diffusion.run.lock import run_lock
from improved_diffusion.run.remote import PICTURES, working_folder
from improved_diffusion.sample_util import Subject, from_uint8
from improved_diffusion.script_util import (
    MACHINE_PATHS,
    check_images_fit,
    create_from_flags,
    diffusion_defaults,
    is_super_resolution,
    join_processes,
    output_size,
    read_images_alike,
)
from improved_diffusion.storage import is_remote, remove_temporaries
from improved_diffusion.train_util import NonFiniteError, TrainLoop, parse_ema_rates

DATA = {"data_dir": "", "random_flip": False, "cache_limit_gb": 2.0, "data_workers": 1}
TRAINING = {
    "batch_size": 8,
    "microbatch": 4,
    "total_steps": 30000,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "lr_warmup_steps": 0,
    "lr_anneal_steps": 0,
    "grad_clip": 0.0,
    "ema_rate": "0.9999",
    "schedule_sampler": "uniform",
    "skip_nonfinite": 0,
    "seed": 0,
}
COMPUTE = {"precision": "auto", "num_workers": "auto"}
SIXTEEN_BIT = {"use_fp16": False, "fp16_scale_growth": 1e-3}
RUNNING = {
    "log_dir": "",
    "log_interval": 10,
    "save_interval": 1000,
    "sample_interval": 1000,
    "keep_last": 0,
    "keep_every": 0,
    "max_hours": 0.0,
    "resume_checkpoint": "",
    "allow_changed_flags": False,
    "tensorboard": False,
}
LOOP_FLAGS = [name for name in TRAINING if name != "schedule_sampler"]
LOOP_FLAGS += [
    "log_interval",
    "save_interval",
    "sample_interval",
    "keep_last",
    "keep_every",
    "max_hours",
    "tensorboard",
    "class_dropout",
]
AT_LEAST = {
    "batch_size": 1,
    "microbatch": -1,
    "total_steps": 1,
    "lr": 0,
    "weight_decay": 0,
    "lr_warmup_steps": 0,
    "lr_anneal_steps": 0,
    "grad_clip": 0,
    "skip_nonfinite": 0,
    "fp16_scale_growth": 0,
    "log_interval": 1,
    "save_interval": 1,
    "sample_interval": 0,
    "keep_last": 0,
    "keep_every": 0,
    "max_hours": 0,
    "cache_limit_gb": 0,
    "data_workers": 0,
    "seed": -(2**63),
}


def create_training_parser(description: str, model_flags: dict[str, Any]) -> Parser:
    """The parser of a training script.

    :param model_flags: the flags that describe its model, with their defaults.
    """
    parser = Parser(description=description)
    add_dict_to_argparser(parser, model_flags, "model")
    add_dict_to_argparser(parser, diffusion_defaults(), "diffusion")
    add_dict_to_argparser(parser, DATA, "data")
    add_dict_to_argparser(parser, {**TRAINING, **SIXTEEN_BIT}, "training")
    add_dict_to_argparser(parser, {**RUNNING, **COMPUTE}, "running")
    return parser


def run_training(flags: dict[str, Any], given: set[str], project: str) -> int:
    """Do what the command line of a training script asks for.

    :param flags: those of `create_training_parser`; `given` names the ones that the user gave.
    :param project: the folder with ``datasets`` to look for CIFAR-10 in, ``scripts``, and ``runs``, where a run
        goes that is given no directory.
    :return: the exit code.
    :raises ValueError: a flag, the data or the checkpoint is unusable; nothing was trained.
    """
    join_processes(flags)
    first = dist_util.get_rank() == 0
    log_dir = dist_util.broadcast(choose_log_dir(flags, os.path.join(project, "runs")))
    with contextlib.ExitStack() as stack:
        source, folder, publish, check_folder = None, log_dir, None, None
        if first:
            folder, publish = stack.enter_context(working_folder(log_dir))
            check_folder = stack.enter_context(run_lock(folder))
            for part in filter(os.path.isdir, (folder, os.path.join(folder, PICTURES))):
                remove_temporaries(part)
            source = choose_source(_as_local(flags["resume_checkpoint"], log_dir, folder), folder)
        if source is not None:
            flags = merge_for_resume(flags, given, source)
        flags = dist_util.broadcast(flags) | args_to_dict(flags, given & set(MACHINE_PATHS))
        check_range(flags, AT_LEAST)
        if flags["microbatch"] == 0:
            raise ValueError("--microbatch 0: give the images per pass, or -1 for the whole batch")
        if "fp16_scale_growth" in given and not flags["use_fp16"]:
            raise ValueError("--fp16_scale_growth: belongs to --use_fp16 True; leave it out")
        if flags["use_fp16"] and flags["precision"] == "fp32":
            raise ValueError("--use_fp16 True and --precision fp32 contradict each other; leave one out")
        compute = _choose_compute(flags, source)
        parse_ema_rates(flags["ema_rate"])
        # A model that cannot be built is reported before any data are read.
        diffusion = create_from_flags(flags)[1]
        create_named_schedule_sampler(flags["schedule_sampler"], diffusion)
        check_images_fit(flags, "batch_size", bytes_per_number=4)
        with dist_util.rank_0_first():
            flags["data_dir"] = find_data(flags["data_dir"], os.path.join(project, "datasets"))
        images = read_images_alike(flags["data_dir"], output_size(flags), flags["cache_limit_gb"])
        if source is not None:
            check_same_data(flags, source, images.fingerprint)
        return _train(flags, compute, log_dir, folder, publish, check_folder, source, images, project)


def _as_local(resume_checkpoint: str, log_dir: str, folder: str) -> str:
    """What is to be resumed; a file in the remote `log_dir` is in `folder` too."""
    if is_remote(log_dir) and bf.dirname(resume_checkpoint) == log_dir.rstrip("/"):
        return os.path.join(folder, bf.basename(resume_checkpoint))
    return resume_checkpoint


def _choose_compute(flags: dict[str, Any], source: Checkpoint | None) -> Compute:
    """What to compute with: the flags' choice, and with "auto" in the precision of the run to resume.

    All processes get rank 0's precision; the number of cores is each one's own.
    """
    chosen = choose("bf16" if flags["use_fp16"] else flags["precision"], flags["num_workers"])
    precision = chosen.precision
    before = precision if source is None else source.state.get("precision", "fp32")
    if flags["precision"] == "auto" and not flags["use_fp16"]:
        # A measurement on a busy machine shall not make it another run.
        precision = before
    elif before != precision:
        print(f"WARNING: this run was trained in {before}; it goes on in {precision}")
    return Compute(dist_util.broadcast(precision), chosen.workers)


def _train(
    flags: dict[str, Any],
    compute: Compute,
    log_dir: str,
    folder: str,
    publish: Callable[[], None] | None,
    check_folder: Callable[[], None] | None,
    source: Checkpoint | None,
    images: ImageSet,
    project: str,
) -> int:
    """Train in `folder`; `log_dir` is what users know it as."""
    if flags["class_cond"] and not flags["num_classes"]:
        flags["num_classes"] = images.num_classes
    if flags["class_cond"] and images.num_classes > flags["num_classes"]:
        raise ValueError(f"--num_classes {flags['num_classes']}: the data have {images.num_classes} classes")
    processes = dist_util.get_world_size()
    data = BatchStream(
        images,
        flags["batch_size"] * processes,
        class_cond=flags["class_cond"],
        random_flip=flags["random_flip"],
        seed=flags["seed"],
        num_workers=flags["data_workers"],
        shard=dist_util.get_rank(),
        num_shards=processes,
    )
    if is_super_resolution(flags):
        data = LowResStream(data, flags["small_size"])
    th.manual_seed(flags["seed"])
    model, diffusion = create_from_flags(flags)
    keep_memory()
    machine = {**describe_machine(), "precision": compute.precision, "workers": compute.workers}
    machine["kernels"] = kernels.generation()
    parameters = sum(p.numel() for p in model.parameters())

    first = dist_util.get_rank() == 0
    if first:
        check_folder()
        logger.configure(folder)
    logger.log(f"run directory: {log_dir}")
    logger.log(describe(images))
    logger.log(f"model: {parameters:,} parameters")
    logger.log(f"computing in {compute}, of {machine['processor']}")
    if processes > 1:
        logger.log(f"{processes} processes with {flags['batch_size']} images each per step")
    if flags["use_fp16"]:
        logger.log("--use_fp16 True: on a CPU, 16 bits are bfloat16, which needs no scaling of the loss")
    if compute.precision == "bf16" and not bf16_pays():
        logger.log("note: this processor is faster in float32: give --precision fp32")
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(flags["schedule_sampler"], diffusion),
        resume_checkpoint=source or "",
        publish=publish,
        check_folder=check_folder,
        preview=_preview(flags, diffusion, images, folder) if first and flags["sample_interval"] else None,
        precision=compute.precision,
        num_workers=compute.workers,
        arguments=flags,
        data_facts={"fingerprint": images.fingerprint, "class_names": images.class_names},
        **args_to_dict(flags, LOOP_FLAGS),
    )
    facts = {"data": images.summary, "machine": machine, "model": {"parameters": parameters}}
    if first and loop.step < loop.total_steps:
        record_run(folder, flags, facts, loop.step)
    try:
        stopped_by = loop.run_loop()
    except NonFiniteError as error:
        logger.log(f"error: {error}")
        return 1
    if stopped_by is not None:
        command = f"python {sys.argv[0]} --log_dir {log_dir}"
        if processes > 1:
            command = f"the same command with --log_dir {log_dir}, in any number of processes"
        logger.log(f"stopped by {stopped_by} at step {loop.step}; to go on: {command}")
        return exit_code(stopped_by) if stopped_by.startswith("SIG") else 0
    logger.log(f"done: {loop.step} steps. Metrics: {bf.join(log_dir, 'results.xlsx')}")
    sampler = "super_res_sample.py --base_samples IMAGES" if is_super_resolution(flags) else "image_sample.py"
    logger.log(f"To draw images: python {os.path.join(project, 'scripts', sampler)} --model_path {log_dir}")
    return 0


def _preview(
    flags: dict[str, Any], diffusion: SpacedDiffusion, images: ImageSet, folder: str
) -> Callable[[Callable[..., th.Tensor], int], None]:
    """What draws the pictures of --sample_interval: a super-resolution model enlarges the first of `images`."""
    labels, low_res = None, None
    if is_super_resolution(flags):
        shown = np.arange(min(COUNT, len(images)))
        low_res = shrink(from_uint8(images.get(shown)), flags["small_size"])
        labels = images.labels[shown] if flags["class_cond"] else None
    elif flags["class_cond"]:
        labels = preview_labels(flags["num_classes"])
    return create_preview(diffusion, Subject(output_size(flags), flags["seed"], labels, low_res), folder)
