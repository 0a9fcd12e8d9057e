"""Publishing a trained model: its moving average in 16 bits, with the records of its run."""

import json
import os
import re
import shlex
import shutil
from typing import Any

import torch as th

from improved_diffusion.config import PublishConfig
from improved_diffusion.evaluation.report import FILE_NAME as EVALUATION
from improved_diffusion.flags import named
from improved_diffusion.run import checkpoint
from improved_diffusion.run.averages import reconstruct, with_averages
from improved_diffusion.run.checkpoint import Checkpoint, power_kind
from improved_diffusion.run.remote import PICTURES
from improved_diffusion.storage import TEMPORARY_PREFIX, absolute, write_json

TABLES = ("progress.csv", "checkpoints.csv")
RECORDS = ("args.json", "run.json", EVALUATION)
# Only needed to continue training, which a published model cannot do.
TRAINING_STATE = ("log", "schedule_sampler", "logged_step", "skipped")
# The folders of an absolute path within a text.
FOLDERS = re.compile(r"(?<![^\s'\"=])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+(?=[^\s'\"/\\])")


def publish(
    run_dir: str, rate: str, out_dir: str, length: float = 0.0, drawing: dict[str, Any] | None = None
) -> Checkpoint:
    """Write the moving average of `rate` of a run's newest checkpoint into the new folder `out_dir`.

    :param length: above 0: write the power-function average of this length instead (see `averages.reconstruct`).
    :param drawing: flags of image_sample.py to be stored with the arguments, as its defaults for this model.

    Arguments, metrics and pictures are copied. So one can draw from the folder and make its workbook as with a
    run, but not train it further. Paths are shortened to their last part, because the rest describes this machine
    and means nothing elsewhere.

    :return: the new checkpoint.
    :raises ValueError: there is no such run or average, its weights do not fit into 16 bits, a record is damaged,
        or `out_dir` already exists.
    """
    run_dir, out_dir = absolute(run_dir), absolute(out_dir)
    if os.path.exists(out_dir):
        raise ValueError(f"out_dir {out_dir}: already exists; give a new folder")
    source = checkpoint.find(run_dir)
    if length:
        kind, weights = power_kind(f"{length:g}"), reconstruct(with_averages(run_dir), length, source.step)[0]
    elif rate in source.ema_rates:
        kind, weights = rate, source.load(rate)
    else:
        present = ", ".join(source.ema_rates) or "none"
        raise ValueError(f"rate {rate}: {run_dir} has moving averages of {present}")
    weights = {name: _in_16_bits(name, tensor) for name, tensor in weights.items()}
    records = {name: _read(os.path.join(run_dir, name)) for name in RECORDS}
    drawing = drawing or {}
    if drawing.get("guidance_scale", 1) != 1 and not source.state.get("arguments", {}).get("class_dropout"):
        raise ValueError(f"guidance_scale: {run_dir} was trained without class_dropout")

    os.makedirs(out_dir)
    for name in filter(lambda name: os.path.exists(os.path.join(run_dir, name)), TABLES):
        shutil.copyfile(os.path.join(run_dir, name), os.path.join(out_dir, name))
    for name, record in records.items():
        if record is not None:
            write_json(os.path.join(out_dir, name), without_folders(record))
    pictures = os.path.join(run_dir, PICTURES)
    if os.path.isdir(pictures):
        unfinished = shutil.ignore_patterns(f"{TEMPORARY_PREFIX}*")
        shutil.copytree(pictures, os.path.join(out_dir, PICTURES), ignore=unfinished)
    state = {
        key: value for key, value in source.state.items() if key not in (*TRAINING_STATE, "files", "sha256")
    }
    state["arguments"] = {**state.get("arguments", {}), **drawing}
    return checkpoint.save(out_dir, source.step, {kind: weights}, without_folders(state))


def without_folders(content: Any) -> Any:
    """`content` of a JSON file, with every absolute path in its texts shortened to its last part."""
    if isinstance(content, dict):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_folders(value) for value in content]
    return FOLDERS.sub("", content) if isinstance(content, str) else content


def _in_16_bits(name: str, tensor: th.Tensor) -> th.Tensor:
    """`tensor` in float16, which has more digits than bfloat16, and a range that is large enough for weights."""
    half = tensor.to(th.float16).contiguous()
    if not half.isfinite().all():
        raise ValueError(f"{name} holds numbers that are too large for 16 bits")
    return half


def _read(path: str) -> Any:
    """The content of the JSON file `path`, or None if there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def run_publishing(config: PublishConfig) -> None:
    """Do what the command line of publish_model.py asks for. :raises ValueError: a flag is unusable."""
    if not os.path.isdir(config.model_path):
        raise ValueError(f"--model_path {config.model_path}: there is no such directory")
    rates = sorted(checkpoint.find(config.model_path).ema_rates, key=float)
    rate = config.ema_rate or (rates or ["none"])[-1]
    drawing = {name: getattr(config, name) for name in ("guidance_scale", "guidance_interval")}
    if config.guidance_scale == 1:
        drawing = {}
    try:
        published = publish(config.model_path, rate, config.log_dir, config.ema_length, drawing)
    except ValueError as error:
        names = {"out_dir": "log_dir", "rate": "ema_rate", "sigma_rel": "ema_length"}
        raise named(error, {**names, "guidance_scale": "guidance_scale"}) from None
    size = sum(entry["bytes"] for entry in published.state["files"].values())
    print(f"{published.folder}: step {published.step:,}, {size / 1e6:.1f} MB of weights")
    print(f"To draw from it: {shlex.join(['python', 'image_sample.py', '--model_path', published.folder])}")
