"""The job of convert_checkpoint.py: convert models from and to folders of diffusers."""

import os
import shlex

import blobfile as bf
from torch.optim import AdamW

from improved_diffusion.config import ConvertConfig
from improved_diffusion.convert.folder import read_folder, write_folder
from improved_diffusion.convert.models import export_model, import_model
from improved_diffusion.flags import one_line
from improved_diffusion.jobs.runs import choose_out_dir, load_trained
from improved_diffusion.jobs.script import command
from improved_diffusion.run import checkpoint
from improved_diffusion.storage import absolute


def run_conversion(config: ConvertConfig, given: set[str], project: str) -> None:
    """Convert a model.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``runs``, the default place for an imported model.
    :raises ValueError: there is no such model, or the other format has no equivalent.
    """
    if config.to_diffusers:
        export_folder(config, given)
    else:
        import_folder(config, project)


def export_folder(config: ConvertConfig, given: set[str]) -> None:
    """Write the model of --model_path into the folder --to_diffusers, for diffusers."""
    folder = absolute(config.to_diffusers)
    _check_empty("to_diffusers", folder)
    trained = load_trained(config.model_path, config, given)
    config, class_names = trained.config, trained.class_names
    try:
        exported = export_model(trained.model, config.to_dict())
    except ValueError as error:
        raise ValueError(f"{trained.path} cannot be converted: {error}") from None
    write_folder(folder, exported)
    print(f"written: {folder}")
    if class_names:
        print(f"classes: {one_line(', '.join(f'{i} {name}' for i, name in enumerate(class_names)))}")
    if config.class_cond:
        print(
            "diffusers' DDPMPipeline cannot draw classes: use the UNet2DModel alone, which takes class_labels"
        )


def import_folder(config: ConvertConfig, project: str) -> None:
    """Write the model in the folder --from_diffusers into --log_dir, as a run at step 0."""
    folder = absolute(config.from_diffusers)
    if not bf.isdir(folder):
        raise ValueError(f"--from_diffusers {folder}: there is no such folder")
    source = read_folder(folder)
    try:
        model, model_flags = import_model(source)
    except ValueError as error:
        raise ValueError(f"--from_diffusers {folder} cannot be converted: {error}") from None
    log_dir = choose_out_dir(config.log_dir, os.path.join(project, "runs"))
    _check_empty("log_dir", log_dir)
    saved = checkpoint.save(
        log_dir,
        0,
        # A fresh optimizer, so that the run can be trained further.
        {"model": model.state_dict(), "opt": AdamW(model.parameters()).state_dict()},
        {
            "samples": 0,
            "elapsed": 0.0,
            "arguments": model_flags,
            "data": {},
            "schedule_sampler": {},
            "log": {"values": {}, "sums": {}},
            "logged_step": 0,
            "skipped": 0,
        },
    )
    print(f"written: {saved.path('model')}")
    if not source.scheduler_config.get("clip_sample", True):
        print("its scheduler does not clip: draw with --clip_denoised False")
    words = [*command("image_sample", project), "--model_path", log_dir]
    print(f"To draw images: {shlex.join(words)}")


def _check_empty(flag: str, folder: str) -> None:
    if bf.exists(folder) and (not bf.isdir(folder) or any(bf.listdir(folder))):
        raise ValueError(f"--{flag} {folder}: exists and is not empty; give a new folder")
