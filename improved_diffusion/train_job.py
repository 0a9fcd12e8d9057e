"""A training job, from its flags to its exit code: what image_train.py and super_res_train.py have in common."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import blobfile as bf
import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.checkpoint import Checkpoint
from improved_diffusion.cpu import describe_machine
from improved_diffusion.flags import (
    Parser,
    add_dict_to_argparser,
    args_to_dict,
    check_range,
)
from improved_diffusion.image_datasets import BatchStream, ImageSet, describe
from improved_diffusion.low_res import LowResStream
from improved_diffusion.remote_run import working_folder
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.run_lock import run_lock
from improved_diffusion.runs import (
    check_same_data,
    choose_log_dir,
    choose_source,
    find_data,
    merge_for_resume,
    record_run,
)
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
SIXTEEN_BIT = {"use_fp16": False, "fp16_scale_growth": 1e-3}
RUNNING = {
    "log_dir": "",
    "log_interval": 10,
    "save_interval": 1000,
    "keep_last": 0,
    "keep_every": 0,
    "max_hours": 0.0,
    "resume_checkpoint": "",
    "allow_changed_flags": False,
    "tensorboard": False,
}
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
LOOP_FLAGS = [name for name in TRAINING if name != "schedule_sampler"]
LOOP_FLAGS += [
    "log_interval",
    "save_interval",
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
    add_dict_to_argparser(parser, RUNNING, "running")
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
        source, folder, publish = None, log_dir, None
        if first:
            folder, publish = stack.enter_context(working_folder(log_dir))
            stack.enter_context(run_lock(folder))
            remove_temporaries(folder)
            source = choose_source(_as_local(flags["resume_checkpoint"], log_dir, folder), folder)
        if source is not None:
            flags = merge_for_resume(flags, given, source)
        flags = dist_util.broadcast(flags) | args_to_dict(flags, given & set(MACHINE_PATHS))
        check_range(flags, AT_LEAST)
        if flags["microbatch"] == 0:
            raise ValueError("--microbatch 0: give the images per pass, or -1 for the whole batch")
        if "fp16_scale_growth" in given and not flags["use_fp16"]:
            raise ValueError("--fp16_scale_growth: belongs to --use_fp16 True; leave it out")
        parse_ema_rates(flags["ema_rate"])
        # A model that cannot be built is reported before any data are read.
        _, diffusion = create_from_flags(flags)
        create_named_schedule_sampler(flags["schedule_sampler"], diffusion)
        check_images_fit(flags, "batch_size", bytes_per_number=4)
        with dist_util.rank_0_first():
            flags["data_dir"] = find_data(flags["data_dir"], os.path.join(project, "datasets"))
        images = read_images_alike(flags["data_dir"], output_size(flags), flags["cache_limit_gb"])
        if source is not None:
            check_same_data(flags, source, images.fingerprint)
        return _train(flags, log_dir, folder, publish, source, images, project)


def _as_local(resume_checkpoint: str, log_dir: str, folder: str) -> str:
    """What is to be resumed; a file in the remote `log_dir` is in `folder` too."""
    if is_remote(log_dir) and bf.dirname(resume_checkpoint) == log_dir.rstrip("/"):
        return os.path.join(folder, bf.basename(resume_checkpoint))
    return resume_checkpoint


def _train(
    flags: dict[str, Any],
    log_dir: str,
    folder: str,
    publish: Callable[[], None] | None,
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
    machine = describe_machine()
    parameters = sum(p.numel() for p in model.parameters())

    if dist_util.get_rank() == 0:
        logger.configure(folder)
    logger.log(f"run directory: {log_dir}")
    logger.log(describe(images))
    logger.log(
        f"model: {parameters:,} parameters, on {machine['processor']} with {machine['threads']} threads"
    )
    if processes > 1:
        logger.log(f"{processes} processes with {flags['batch_size']} images each per step")
    if flags["use_fp16"]:
        logger.log("--use_fp16 True: 16-bit training is not available yet; training in float32")
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(flags["schedule_sampler"], diffusion),
        resume_checkpoint=source or "",
        publish=publish,
        arguments=flags,
        data_facts={"fingerprint": images.fingerprint, "class_names": images.class_names},
        **args_to_dict(flags, LOOP_FLAGS),
    )
    facts = {"data": images.summary, "machine": machine, "model": {"parameters": parameters}}
    if dist_util.get_rank() == 0 and loop.step < loop.total_steps:
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
        return EXIT_CODES.get(stopped_by, 0)
    logger.log(f"done: {loop.step} steps. Metrics: {bf.join(log_dir, 'results.xlsx')}")
    sampler = "super_res_sample.py --base_samples IMAGES" if is_super_resolution(flags) else "image_sample.py"
    logger.log(f"To draw images: python {os.path.join(project, 'scripts', sampler)} --model_path {log_dir}")
    return 0
