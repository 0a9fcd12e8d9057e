"""Enlarge images with a super-resolution model. `--help` explains every flag.

The images come from --base_samples, as they are, or from --data_dir, shrunk first as in training.
"""

import os

import blobfile as bf
import numpy as np
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.flags import (
    Parser,
    add_dict_to_argparser,
    check_range,
)
from improved_diffusion.image_datasets import describe
from improved_diffusion.low_res import read_base_samples, shrink
from improved_diffusion.runs import (
    check_model_path,
    choose_out_dir,
    load_trained,
)
from improved_diffusion.sample_util import (
    from_uint8,
    image_grid,
    labels_of,
    parse_class_labels,
    sample_images,
    save_samples,
    to_uint8,
)
from improved_diffusion.script_util import (
    check_images_fit,
    diffusion_defaults,
    join_processes,
    read_images_alike,
    run_script,
    sr_model_defaults,
)
from improved_diffusion.storage import open_atomic

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SAMPLING = {
    "model_path": "",
    "base_samples": "",
    "data_dir": "",
    "num_samples": 64,
    "batch_size": 16,
    "use_ddim": False,
    "clip_denoised": True,
    "class_label": "",
    "seed": 0,
    "log_dir": "",
    "save_png": False,
}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, SAMPLING, "sampling")
    add_dict_to_argparser(parser, sr_model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(
        parser, diffusion_defaults(), "diffusion (read from the checkpoint but for respacing)"
    )
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    join_processes(flags)
    check_range(flags, {"num_samples": 1, "batch_size": 1, "seed": -(2**63)})
    if bool(flags["base_samples"]) == bool(flags["data_dir"]):
        raise ValueError(
            "give either --base_samples, the small images to enlarge, or --data_dir, images that are shrunk first"
        )
    check_model_path(flags, os.path.join(PROJECT, "runs"))
    model, diffusion, flags, class_names = load_trained(flags["model_path"], flags, given)
    if flags["class_label"] and not flags["class_cond"]:
        raise ValueError(f"--class_label {flags['class_label']}: this model was trained without classes")
    small_size, batch_size = flags["small_size"], flags["batch_size"]
    if flags["base_samples"]:
        images = read_base_samples(flags["base_samples"], small_size)
    else:
        images = read_images_alike(flags["data_dir"], flags["large_size"])
    print(describe(images))
    flags["num_samples"] = count = min(flags["num_samples"], len(images))
    check_images_fit(flags, "batch_size", bytes_per_number=4)
    check_images_fit(flags, "num_samples", bytes_per_number=1)
    labels = None
    if flags["class_cond"]:
        num_classes = model.num_classes - (flags["class_dropout"] > 0)
        if flags["class_label"]:
            labels = np.resize(parse_class_labels(flags["class_label"], num_classes, class_names), count)
        else:
            labels = labels_of(images, num_classes, class_names)[:count]
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
    print(f"enlarging {count} images (see {picture}) in {diffusion.num_timesteps} steps each, into {out_dir}")
    batches = sample_images(
        model,
        diffusion,
        num_samples=count,
        batch_size=batch_size,
        image_size=flags["large_size"],
        seed=flags["seed"],
        use_ddim=flags["use_ddim"],
        clip_denoised=flags["clip_denoised"],
        labels=labels,
        low_res=low_res,
    )
    return 0 if save_samples(batches, out_dir, labels=labels, save_png=flags["save_png"]) else 130


if __name__ == "__main__":
    run_script(main)
