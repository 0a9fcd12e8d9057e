"""Whole conversions from and to folders of diffusers: what convert_checkpoint.py does."""

import json
import os
import shlex
from typing import Any

import blobfile as bf
import torch as th
from torch.optim import AdamW

from improved_diffusion.config import ConvertConfig
from improved_diffusion.convert.models import DiffusersModel, export_model, import_model
from improved_diffusion.flags import one_line
from improved_diffusion.jobs.runs import choose_out_dir, load_trained
from improved_diffusion.run import checkpoint
from improved_diffusion.storage import absolute, open_atomic, open_input

PIPELINE = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
WEIGHTS = "diffusion_pytorch_model"


def run_conversion(config: ConvertConfig, given: set[str], project: str) -> None:
    """Do what the command line of convert_checkpoint.py asks for.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``runs``, where an imported model goes by default.
    :raises ValueError: there is no such model, or the other side cannot express it.
    """
    if config.to_diffusers:
        export_folder(config, given)
    else:
        import_folder(config, project)


def export_folder(config: ConvertConfig, given: set[str]) -> None:
    """Write the model of --model_path into the folder --to_diffusers, which diffusers can load."""
    folder = absolute(config.to_diffusers)
    _check_empty("to_diffusers", folder)
    trained = load_trained(config.model_path, config, given)
    config, class_names = trained.config, trained.class_names
    try:
        exported = export_model(trained.model, config.to_dict())
    except ValueError as error:
        raise ValueError(f"{trained.path} cannot be converted: {error}") from None
    content = _safetensors().save(exported.weights, metadata={"format": "pt"})
    for part in ("unet", "scheduler"):
        bf.makedirs(bf.join(folder, part))
    with open_atomic(bf.join(folder, "unet", f"{WEIGHTS}.safetensors")) as file:
        file.write(content)
    _write_json(bf.join(folder, "unet", "config.json"), exported.unet_config)
    _write_json(bf.join(folder, "scheduler", "scheduler_config.json"), exported.scheduler_config)
    # diffusers takes the folder for a pipeline once this file is there, so it is written last.
    _write_json(bf.join(folder, "model_index.json"), PIPELINE)
    print(f"written: {folder}")
    if class_names:
        print(f"classes: {one_line(', '.join(f'{i} {name}' for i, name in enumerate(class_names)))}")
    if config.class_cond:
        print(
            "diffusers' DDPMPipeline cannot draw classes: use the UNet2DModel alone, which takes class_labels"
        )


def import_folder(config: ConvertConfig, project: str) -> None:
    """Write the model in the folder --from_diffusers as a run of step 0 into --log_dir."""
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
    command = ["python", os.path.join(project, "scripts", "image_sample.py"), "--model_path", log_dir]
    print(f"To draw images: {shlex.join(command)}")


def read_folder(folder: str) -> DiffusersModel:
    """The model that diffusers has saved in `folder`, as a pipeline or, in old repositories, without sub-folders."""
    unet = bf.join(folder, "unet") if bf.isdir(bf.join(folder, "unet")) else folder
    scheduler = bf.join(folder, "scheduler") if bf.isdir(bf.join(folder, "scheduler")) else folder
    return DiffusersModel(
        _read_json(bf.join(unet, "config.json")),
        _read_json(bf.join(scheduler, "scheduler_config.json")),
        _read_weights(bf.join(unet, WEIGHTS)),
    )


def _check_empty(flag: str, folder: str) -> None:
    if bf.exists(folder) and (not bf.isdir(folder) or any(bf.listdir(folder))):
        raise ValueError(f"--{flag} {folder}: exists and is not empty; give a new folder")


def _read_weights(path: str) -> dict[str, th.Tensor]:
    """The weights in the file `path`, which ends in .safetensors or .bin."""
    if bf.exists(f"{path}.safetensors"):
        with open_input(f"{path}.safetensors") as file:
            content = file.read()
        try:
            return _safetensors().load(content)
        except Exception as error:  # safetensors raises errors of its own and Python's
            raise ValueError(f"{path}.safetensors: damaged ({error})") from None
    if bf.exists(f"{path}.bin"):
        return checkpoint.load_tensors(f"{path}.bin")
    raise ValueError(f"{path}.safetensors: there is no such file, nor one that ends in .bin")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open_input(path) as file:
            content = json.loads(file.read())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: there is no such file, so this is not a model saved by diffusers"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged (holds no configuration)")
    return content


def _write_json(path: str, content: dict[str, Any]) -> None:
    with open_atomic(path, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(
            'conversion needs an optional package: pip install "improved_diffusion[diffusers]"'
        ) from None
    return safetensors.torch
