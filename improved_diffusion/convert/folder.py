"""Folders as diffusers saves its models: read and written."""

import json
from typing import Any

import blobfile as bf
import torch as th

from improved_diffusion.convert.models import DiffusersModel
from improved_diffusion.run import checkpoint
from improved_diffusion.storage import open_atomic, open_input

PIPELINE = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"


def is_diffusers_folder(folder: str) -> bool:
    """Whether diffusers has saved a model in `folder`, as a pipeline or, in old repositories, without sub-folders."""
    return any(bf.exists(bf.join(folder, name)) for name in (INDEX, SCHEDULER))


def write_folder(folder: str, exported: DiffusersModel) -> None:
    """Write a pipeline that diffusers can load into the new `folder`."""
    content = _safetensors().save(exported.weights, metadata={"format": "pt"})
    for part in ("unet", "scheduler"):
        bf.makedirs(bf.join(folder, part))
    with open_atomic(bf.join(folder, "unet", f"{WEIGHTS}.safetensors")) as file:
        file.write(content)
    _write_json(bf.join(folder, "unet", "config.json"), exported.unet_config)
    _write_json(bf.join(folder, "scheduler", SCHEDULER), exported.scheduler_config)
    # diffusers takes the folder for a pipeline once this file is there, so it is written last.
    _write_json(bf.join(folder, INDEX), PIPELINE)


def read_folder(folder: str) -> DiffusersModel:
    """The model that diffusers has saved in `folder`, as a pipeline or, in old repositories, without sub-folders.

    :raises ValueError: a file is missing or damaged; the message names it.
    """
    unet = bf.join(folder, "unet") if bf.isdir(bf.join(folder, "unet")) else folder
    scheduler = bf.join(folder, "scheduler") if bf.isdir(bf.join(folder, "scheduler")) else folder
    return DiffusersModel(
        _read_json(bf.join(unet, "config.json")),
        _read_json(bf.join(scheduler, SCHEDULER)),
        _read_weights(bf.join(unet, WEIGHTS)),
    )


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
