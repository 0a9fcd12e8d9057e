"""Draw images from a trained model, as an .npz file and a picture. `--help` explains every flag."""

import os

import numpy as np

from improved_diffusion.flags import (
    Parser,
    add_dict_to_argparser,
    check_range,
)
from improved_diffusion.runs import (
    check_model_path,
    choose_out_dir,
    load_trained,
)
from improved_diffusion.sample_util import guide, parse_class_labels, sample_images, save_samples
from improved_diffusion.script_util import (
    check_images_fit,
    diffusion_defaults,
    join_processes,
    model_defaults,
    run_script,
)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SAMPLING = {
    "model_path": "",
    "num_samples": 64,
    "batch_size": 16,
    "use_ddim": False,
    "clip_denoised": True,
    "class_label": "",
    "guidance_scale": 1.0,
    "seed": 0,
    "log_dir": "",
    "save_png": False,
}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, SAMPLING, "sampling")
    add_dict_to_argparser(parser, model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(
        parser, diffusion_defaults(), "diffusion (read from the checkpoint but for respacing)"
    )
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    join_processes(flags)
    check_range(flags, {"num_samples": 1, "batch_size": 1, "seed": -(2**63)})
    check_model_path(flags, os.path.join(PROJECT, "runs"))
    model, diffusion, flags, class_names = load_trained(flags["model_path"], flags, given)
    check_images_fit(flags, "batch_size", bytes_per_number=4)
    check_images_fit(flags, "num_samples", bytes_per_number=1)
    count = flags["num_samples"]
    labels = None
    if flags["class_cond"]:
        num_classes = model.num_classes - (flags["class_dropout"] > 0)
        labels = np.resize(parse_class_labels(flags["class_label"], num_classes, class_names), count)
    elif flags["class_label"]:
        raise ValueError(f"--class_label {flags['class_label']}: this model was trained without classes")

    if flags["guidance_scale"] != 1:
        if not flags["class_dropout"]:
            raise ValueError(
                f"--guidance_scale {flags['guidance_scale']}: this model was trained without --class_dropout"
            )
        model = guide(model, flags["guidance_scale"], null_label=num_classes)
    out_dir = choose_out_dir(flags, os.path.join(PROJECT, "samples"))
    print(f"drawing {count} images in {diffusion.num_timesteps} steps each, into {out_dir}")
    batches = sample_images(
        model,
        diffusion,
        num_samples=count,
        batch_size=flags["batch_size"],
        image_size=flags["image_size"],
        seed=flags["seed"],
        use_ddim=flags["use_ddim"],
        clip_denoised=flags["clip_denoised"],
        labels=labels,
    )
    return 0 if save_samples(batches, out_dir, labels=labels, save_png=flags["save_png"]) else 130


if __name__ == "__main__":
    run_script(main)
