"""Enlarge images with a super-resolution model. `--help` explains every flag.

The images come from --base_samples, as they are, or from --data_dir, shrunk first as in training.
"""

import os

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.data.class_labels import labels_of
from improved_diffusion.flags import Parser, add_dict_to_argparser
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.jobs.sample import DRAWING, SOLVING, choose_labels, choose_plan, draw_into
from improved_diffusion.low_res import read_base_samples, shrink
from improved_diffusion.pictures import image_grid
from improved_diffusion.sample_util import Subject, from_uint8, to_uint8
from improved_diffusion.script_util import (
    check_images_fit,
    count_classes,
    diffusion_defaults,
    read_images_alike,
    run_script,
    sr_model_defaults,
)
from improved_diffusion.storage import open_atomic

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SAMPLING = {"base_samples": "", "data_dir": "", **DRAWING}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, SAMPLING, "sampling")
    add_dict_to_argparser(parser, SOLVING, "sampler")
    add_dict_to_argparser(parser, sr_model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(
        parser, diffusion_defaults(), "diffusion (read from the checkpoint but for respacing)"
    )
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    if bool(flags["base_samples"]) == bool(flags["data_dir"]):
        raise ValueError(
            "give either --base_samples, the small images to enlarge, or --data_dir, images that are shrunk first"
        )
    model, diffusion, flags, class_names = open_model(flags, given, PROJECT)
    plan = choose_plan(flags, given, diffusion)
    labels = choose_labels(flags, class_names)
    small_size, batch_size = flags["small_size"], flags["batch_size"]
    if flags["base_samples"]:
        images = read_base_samples(flags["base_samples"], small_size)
    else:
        images = read_images_alike(flags["data_dir"], flags["large_size"])
    print(describe(images))
    flags["num_samples"] = count = min(flags["num_samples"], len(images))
    check_images_fit(flags, "num_samples", bytes_per_number=1)
    if flags["class_label"]:
        labels = np.resize(labels, count)
    elif flags["class_cond"]:
        labels = labels_of(images, count_classes(flags), class_names)[:count]
    # Batch by batch, because the large images might not fit into the memory all at once.
    low_res = th.cat(
        [
            shrink(from_uint8(images.get(np.arange(start, min(start + batch_size, count)))), small_size)
            for start in range(0, count, batch_size)
        ]
    )

    out_dir = choose_out_dir(flags, os.path.join(PROJECT, "samples"))
    picture = bf.join(out_dir, "low_res.png")
    if dist_util.get_rank() == 0:
        with open_atomic(picture) as file:
            image_grid(to_uint8(low_res)).save(file, format="PNG")
    print(f"what is enlarged: {picture}")
    subject = Subject(flags["large_size"], flags["seed"], labels, low_res)
    return draw_into(
        out_dir, model, diffusion, plan, subject, flags, count=count, rows=labels, doing="enlarging"
    )


if __name__ == "__main__":
    run_script(main)
