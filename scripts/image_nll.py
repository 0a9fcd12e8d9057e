"""Measure the bits per dimension of a trained model on images. `--help` explains every flag.

What is known so far is written after every batch: nll.json (the mean), bpd.npz (every image) and vb_terms.npz,
mse_terms.npz, xstart_mse_terms.npz (means at every timestep, the noisiest first).
"""

import os

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion import dist_util
from improved_diffusion.data.class_labels import labels_of
from improved_diffusion.evaluation.bits_per_dim import BoundTally, choose_images, measure_bounds
from improved_diffusion.flags import Parser, add_dict_to_argparser, args_to_dict
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.run.interrupts import Stoppable
from improved_diffusion.script_util import (
    count_classes,
    diffusion_defaults,
    model_defaults,
    read_images_alike,
    run_script,
)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

MEASURING = {
    "model_path": "",
    "data_dir": "",
    "num_samples": 1000,
    "batch_size": 16,
    "clip_denoised": True,
    "seed": 0,
    "log_dir": "",
    "precision": "fp32",  # what is compared with the numbers of others should not depend on the processor
    "num_workers": "auto",
}
# Of the flags, what a reader of nll.json needs to know.
RECORDED = (
    "model_path",
    "data_dir",
    "num_samples",
    "timestep_respacing",
    "clip_denoised",
    "seed",
    "precision",
)


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, MEASURING, "measuring")
    add_dict_to_argparser(parser, model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(
        parser, diffusion_defaults(), "diffusion (read from the checkpoint but for respacing)"
    )
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    if not flags["data_dir"]:
        raise ValueError("--data_dir is missing: give the images to measure, such as datasets/cifar_test")
    model, diffusion, flags, class_names = open_model(flags, given, PROJECT)
    images = read_images_alike(flags["data_dir"], flags["image_size"])
    print(describe(images))
    flags["num_samples"] = count = min(flags["num_samples"], len(images))
    labels = None
    if flags["class_cond"]:
        labels = labels_of(images, count_classes(flags), class_names)

    out_dir = choose_out_dir(flags, os.path.join(PROJECT, "nll"))
    print(f"measuring {count} images in {diffusion.num_timesteps} steps each, into {out_dir}")
    tally = BoundTally()
    with Stoppable() as stoppable:
        for bounds in measure_bounds(
            model,
            diffusion,
            images,
            choose_images(count, len(images)),
            batch_size=flags["batch_size"],
            labels=labels,
            clip_denoised=flags["clip_denoised"],
            seed=flags["seed"],
        ):
            if dist_util.get_rank() == 0:
                tally.add(bounds)
                tally.write(out_dir, {"steps": diffusion.num_timesteps, **args_to_dict(flags, RECORDED)})
    if len(tally.total_bpd):
        error = "" if tally.standard_error is None else f" +- {tally.standard_error:.4f} (standard error)"
        print(f"{tally.mean:.4f} bits/dim{error}, {len(tally.total_bpd)} images: {out_dir}")
    return stoppable.exit_code


if __name__ == "__main__":
    run_script(main)
