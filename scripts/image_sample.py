"""Draw images from a trained model, as an .npz file and a picture. `--help` explains every flag."""

import os

import numpy as np
from PIL import Image

from improved_diffusion.checkpoint import steps
from improved_diffusion.sample_util import guide, image_grid, parse_class_labels, sample_images
from improved_diffusion.script_util import (
    Parser,
    add_dict_to_argparser,
    check_images_fit,
    check_range,
    diffusion_defaults,
    load_trained,
    model_defaults,
    run_script,
)
from improved_diffusion.storage import absolute, new_directory, open_atomic

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
    check_range(flags, {"num_samples": 1, "batch_size": 1, "seed": -(2**63)})
    if not flags["model_path"]:
        raise ValueError(f"--model_path is missing: give a run directory or a .pt file{_newest_run()}")
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
    out_dir = absolute(
        flags["log_dir"]
        or os.environ.get("OPENAI_LOGDIR", "")
        or new_directory(os.path.join(PROJECT, "samples"))
    )
    os.makedirs(out_dir, exist_ok=True)
    print(f"drawing {count} images in {diffusion.num_timesteps} steps each, into {out_dir}")
    images: list[np.ndarray] = []
    interrupted = False
    try:
        for batch in sample_images(
            model,
            diffusion,
            num_samples=count,
            batch_size=flags["batch_size"],
            image_size=flags["image_size"],
            seed=flags["seed"],
            use_ddim=flags["use_ddim"],
            clip_denoised=flags["clip_denoised"],
            labels=labels,
        ):
            if flags["save_png"]:
                for number, image in enumerate(batch, start=sum(map(len, images))):
                    Image.fromarray(image).save(os.path.join(out_dir, f"{number:06d}.png"))
            images.append(batch)
    except KeyboardInterrupt:
        interrupted = True
    if images:
        write_samples(out_dir, np.concatenate(images), labels)
    return 130 if interrupted else 0


def write_samples(out_dir: str, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Write ``samples_NxHxWx3.npz`` (arr_0 images, arr_1 labels where there are classes) and ``grid.png``."""
    path = os.path.join(out_dir, f"samples_{'x'.join(map(str, images.shape))}.npz")
    arrays = [images] if labels is None else [images, labels[: len(images)]]
    with open_atomic(path) as file:
        np.savez(file, *arrays)
    grid = os.path.join(out_dir, "grid.png")
    with open_atomic(grid) as file:
        image_grid(images).save(file, format="PNG")
    print(f"{len(images)} images: {path}\npicture:   {grid}")


def _newest_run() -> str:
    runs = os.path.join(PROJECT, "runs")
    found = [os.path.join(runs, name) for name in os.listdir(runs)] if os.path.isdir(runs) else []
    found = [run for run in found if steps(run)]
    return f", such as {max(found, key=os.path.getmtime)}" if found else ""


if __name__ == "__main__":
    run_script(main)
