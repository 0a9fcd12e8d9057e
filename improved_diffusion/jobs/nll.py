"""The job of image_nll.py: measure bits per dimension."""

import os
from collections.abc import Iterator
from dataclasses import replace

import torch as th

from improved_diffusion import dist_util
from improved_diffusion.config import NllConfig
from improved_diffusion.data.class_labels import labels_of
from improved_diffusion.evaluation.bits_per_dim import BoundTally, choose_images, measure_bounds
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.runs import Trained, choose_out_dir, open_model
from improved_diffusion.run.interrupts import Stoppable
from improved_diffusion.script_util import check_images_fit, count_classes, join_processes, read_images_alike

# The flags to record in nll.json.
RECORDED = (
    "model_path",
    "data_dir",
    "num_samples",
    "timestep_respacing",
    "clip_denoised",
    "seed",
    "precision",
)


def run_nll(config: NllConfig, given: set[str], project: str) -> int:
    """Measure images, and write the results into a directory.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``models``, ``runs`` and ``nll``, the default place for results.
    :return: the exit code.
    :raises ValueError: a flag, the data or the model is unusable.
    """
    join_processes(config)
    opened = open_model(config, given, project)
    config, measured = prepare_measuring(opened)
    out_dir = choose_out_dir(config.log_dir, os.path.join(project, "nll"))
    print(
        f"measuring {config.num_samples} images in {opened.diffusion.num_timesteps} steps each, into {out_dir}"
    )
    flags = {**config.to_dict(), "model_path": opened.path}
    recorded = {name: flags[name] for name in RECORDED}
    tally = BoundTally()
    with Stoppable() as stoppable:
        for bounds in measured:
            if dist_util.get_rank() == 0:
                tally.add(bounds)
                tally.write(out_dir, {"steps": opened.diffusion.num_timesteps, **recorded})
    if stoppable.exit_code:
        dist_util.leave()  # the others may wait in the batch that was not finished
    if len(tally.total_bpd):
        error = "" if tally.standard_error is None else f" +- {tally.standard_error:.4f} (standard error)"
        print(f"{tally.mean:.4f} bits/dim{error}, {len(tally.total_bpd)} images: {out_dir}")
    return stoppable.exit_code


def prepare_measuring(opened: Trained) -> tuple[NllConfig, Iterator[dict[str, th.Tensor]]]:
    """Read the images of --data_dir, and prepare to measure them.

    :return: the flags, with --num_samples limited to the number of images, and the iterator of `measure_bounds`, which
        measures batch by batch.
    :raises ValueError: a flag or the data are unusable.
    """
    config = opened.config
    check_images_fit(config, "batch_size", bytes_per_number=4)
    images = read_images_alike(config.data_dir, config.output_size, channels=config.colour_channels)
    print(describe(images))
    config = replace(config, num_samples=min(config.num_samples, len(images)))
    labels = None
    if config.class_cond:
        labels = labels_of(images, count_classes(config), opened.class_names)
    return config, measure_bounds(
        opened.model,
        opened.diffusion,
        images,
        choose_images(config.num_samples, len(images)),
        batch_size=config.batch_size,
        labels=labels,
        clip_denoised=config.clip_denoised,
        seed=config.seed,
    )
