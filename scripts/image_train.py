"""Train a diffusion model on images. `--help` explains every flag; the README tells what to expect."""

import os
import sys

import torch as th

from improved_diffusion import logger
from improved_diffusion.checkpoint import Checkpoint
from improved_diffusion.cpu import describe_machine
from improved_diffusion.image_datasets import BatchStream, ImageSet, describe, read_images
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.run_lock import run_lock
from improved_diffusion.script_util import (
    Parser,
    add_dict_to_argparser,
    args_to_dict,
    check_images_fit,
    check_range,
    check_same_data,
    choose_log_dir,
    choose_source,
    create_model_and_diffusion,
    diffusion_defaults,
    find_data,
    merge_for_resume,
    model_and_diffusion_defaults,
    model_defaults,
    record_run,
    run_script,
)
from improved_diffusion.storage import remove_temporaries
from improved_diffusion.train_util import NonFiniteError, TrainLoop, parse_ema_rates

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

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
LOOP_FLAGS += ["log_interval", "save_interval", "keep_last", "keep_every", "max_hours", "tensorboard"]
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
    "log_interval": 1,
    "save_interval": 1,
    "keep_last": 0,
    "keep_every": 0,
    "max_hours": 0,
    "cache_limit_gb": 0,
    "data_workers": 0,
    "seed": -(2**63),
}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, model_defaults(), "model")
    add_dict_to_argparser(parser, diffusion_defaults(), "diffusion")
    add_dict_to_argparser(parser, DATA, "data")
    add_dict_to_argparser(parser, TRAINING, "training")
    add_dict_to_argparser(parser, RUNNING, "running")
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    log_dir = choose_log_dir(flags, os.path.join(PROJECT, "runs"))
    with run_lock(log_dir):
        remove_temporaries(log_dir)
        source = choose_source(flags["resume_checkpoint"], log_dir)
        if source is not None:
            flags = merge_for_resume(flags, given, source)
        check_range(flags, AT_LEAST)
        if flags["microbatch"] == 0:
            raise ValueError("--microbatch 0: give the images per pass, or -1 for the whole batch")
        parse_ema_rates(flags["ema_rate"])
        # A model that cannot be built is reported before any data are read.
        _, diffusion = create_model_and_diffusion(**args_to_dict(flags, model_and_diffusion_defaults()))
        create_named_schedule_sampler(flags["schedule_sampler"], diffusion)
        check_images_fit(flags, "batch_size", bytes_per_number=4)
        flags["data_dir"] = find_data(flags["data_dir"], os.path.join(PROJECT, "datasets"))
        images = read_images(flags["data_dir"], flags["image_size"], cache_limit_gb=flags["cache_limit_gb"])
        if source is not None:
            check_same_data(flags, source, images.fingerprint)
        return train(flags, log_dir, source, images)


def train(flags: dict, log_dir: str, source: Checkpoint | None, images: ImageSet) -> int:
    """Train as `flags` say. :return: the exit code."""
    if flags["class_cond"] and not flags["num_classes"]:
        flags["num_classes"] = images.num_classes
    if flags["class_cond"] and images.num_classes > flags["num_classes"]:
        raise ValueError(f"--num_classes {flags['num_classes']}: the data have {images.num_classes} classes")
    data = BatchStream(
        images,
        flags["batch_size"],
        class_cond=flags["class_cond"],
        random_flip=flags["random_flip"],
        seed=flags["seed"],
        num_workers=flags["data_workers"],
    )
    th.manual_seed(flags["seed"])
    model, diffusion = create_model_and_diffusion(**args_to_dict(flags, model_and_diffusion_defaults()))
    machine = describe_machine()
    parameters = sum(p.numel() for p in model.parameters())

    logger.configure(log_dir)
    logger.log(f"run directory: {log_dir}")
    logger.log(describe(images))
    logger.log(
        f"model: {parameters:,} parameters, on {machine['processor']} with {machine['threads']} threads"
    )
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(flags["schedule_sampler"], diffusion),
        resume_checkpoint=source or "",
        arguments=flags,
        data_facts={"fingerprint": images.fingerprint, "class_names": images.class_names},
        **args_to_dict(flags, LOOP_FLAGS),
    )
    facts = {"data": images.summary, "machine": machine, "model": {"parameters": parameters}}
    if loop.step < loop.total_steps:
        record_run(log_dir, flags, facts, loop.step)
    try:
        stopped_by = loop.run_loop()
    except NonFiniteError as error:
        logger.log(f"error: {error}")
        return 1
    if stopped_by is not None:
        logger.log(
            f"stopped by {stopped_by} at step {loop.step}; to go on: python {sys.argv[0]} --log_dir {log_dir}"
        )
        return EXIT_CODES.get(stopped_by, 0)
    logger.log(f"done: {loop.step} steps. Metrics: {os.path.join(log_dir, 'results.xlsx')}")
    logger.log(
        f"To draw images: python {os.path.join(PROJECT, 'scripts', 'image_sample.py')} --model_path {log_dir}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
