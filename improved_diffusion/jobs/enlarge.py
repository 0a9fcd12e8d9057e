"""The job of super_res_sample.py: enlarge images."""

import os
from dataclasses import replace

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.config import SuperResSampleConfig
from improved_diffusion.data.class_labels import labels_of
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.jobs.sample import choose_labels, choose_plan, draw_into, warn_of_youth
from improved_diffusion.low_res import shrink
from improved_diffusion.pictures import image_grid
from improved_diffusion.sample_util import Subject, from_uint8, to_uint8
from improved_diffusion.script_util import check_images_fit, count_classes, join_processes, read_images_alike
from improved_diffusion.storage import open_atomic


def run_enlarging(config: SuperResSampleConfig, given: set[str], project: str) -> int:
    """Enlarge images, and write them into a directory. The parameters are those of `sample.run_sampling`."""
    join_processes(config)
    opened = open_model(config, given, project)
    config = opened.config
    check_images_fit(config, "batch_size", bytes_per_number=4)
    plan = choose_plan(config, given, opened.diffusion)
    warn_of_youth(opened.images)
    labels = choose_labels(config, opened.class_names)
    small_size, batch_size = config.small_size, config.batch_size
    if config.base_samples:
        images = read_images_alike(
            config.base_samples, small_size, flag_name="base_samples", channels=config.colour_channels
        )
    else:
        images = read_images_alike(config.data_dir, config.large_size, channels=config.colour_channels)
    print(describe(images))
    config = replace(config, num_samples=min(config.num_samples, len(images)))
    count = config.num_samples
    check_images_fit(config, "num_samples", bytes_per_number=1)
    if config.class_label:
        labels = np.resize(labels, count)
    elif config.class_cond:
        labels = labels_of(images, count_classes(config), opened.class_names)[:count]
    # Batch by batch, because all large images together may not fit into the memory.
    low_res = th.cat(
        [
            shrink(from_uint8(images.get(np.arange(start, min(start + batch_size, count)))), small_size)
            for start in range(0, count, batch_size)
        ]
    )

    out_dir = choose_out_dir(config.log_dir, os.path.join(project, "samples"))
    picture = bf.join(out_dir, "low_res.png")
    if dist_util.get_rank() == 0:
        with open_atomic(picture) as file:
            image_grid(to_uint8(low_res)).save(file, format="PNG")
    print(f"the images to enlarge: {picture}")
    subject = Subject(config.large_size, config.seed, labels, low_res, channels=config.colour_channels)
    return draw_into(
        out_dir,
        opened.model,
        opened.diffusion,
        plan,
        subject,
        config,
        count=count,
        rows=labels,
        doing="enlarging",
    )
