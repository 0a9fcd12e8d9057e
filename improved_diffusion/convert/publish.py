"""A trained model to give away: its moving average in 16 bits, and what is known of how it came about."""

import json
import os
import re
import shutil
from typing import Any

import torch as th

from improved_diffusion.config import PublishConfig
from improved_diffusion.evaluation.report import FILE_NAME as EVALUATION
from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import Checkpoint
from improved_diffusion.run.remote import PICTURES
from improved_diffusion.storage import TEMPORARY_PREFIX, absolute, write_json

TABLES = ("progress.csv", "checkpoints.csv")
RECORDS = ("args.json", "run.json", EVALUATION)
# What only a training that goes on needs, and it cannot go on from here.
TRAINING_STATE = ("log", "schedule_sampler", "logged_step", "skipped")
# An absolute path within a text, as far as it tells of the machine.
FOLDERS = re.compile(r"(?<![^\s'\"=])(?:[A-Za-z]:)?[/\\](?:[^\s'\"/\\]+[/\\])+(?=[^\s'\"/\\])")


def publish(run_dir: str, rate: str, out_dir: str) -> Checkpoint:
    """Write the moving average of `rate` of a run's newest checkpoint into the new folder `out_dir`.

    Arguments, metrics and pictures come along, so that the folder can be drawn from, and its workbook made, like
    those of a run; only trained further it cannot be. Paths are shortened to their last part: the others tell of
    the machine, and mean nothing elsewhere.

    :return: the checkpoint that it has become.
    :raises ValueError: there is no such run or average, its weights do not fit into 16 bits, a record is damaged,
        or `out_dir` is there already.
    """
    run_dir, out_dir = absolute(run_dir), absolute(out_dir)
    if os.path.exists(out_dir):
        raise ValueError(f"--log_dir {out_dir}: is there already; give a new folder")
    source = checkpoint.find(run_dir)
    if rate not in source.ema_rates:
        present = ", ".join(source.ema_rates) or "none"
        raise ValueError(f"--ema_rate {rate}: {run_dir} has moving averages of {present}")
    weights = {name: _in_16_bits(name, tensor) for name, tensor in source.load(rate).items()}
    records = {name: _read(os.path.join(run_dir, name)) for name in RECORDS}

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
    return checkpoint.save(out_dir, source.step, {rate: weights}, without_folders(state))


def without_folders(content: Any) -> Any:
    """`content`, of a JSON file, with every absolute path in its texts shortened to its last part."""
    if isinstance(content, dict):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_folders(value) for value in content]
    return FOLDERS.sub("", content) if isinstance(content, str) else content


def _in_16_bits(name: str, tensor: th.Tensor) -> th.Tensor:
    """`tensor` in float16: of the 16-bit types, that with the more digits, and large enough for weights."""
    half = tensor.to(th.float16).contiguous()
    if not half.isfinite().all():
        raise ValueError(f"{name} holds numbers that are too large for 16 bits")
    return half


def _read(path: str) -> Any:
    """What the JSON file `path` holds; None when there is no such file."""
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
    published = publish(config.model_path, config.ema_rate or (rates or ["none"])[-1], config.log_dir)
    size = sum(entry["bytes"] for entry in published.state["files"].values())
    print(f"{published.folder}: step {published.step:,}, {size / 1e6:.1f} MB of weights")
    print(f"To draw from it: python image_sample.py --model_path {published.folder}")
