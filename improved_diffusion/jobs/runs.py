"""The directory of a run, the checkpoint and the flags that it continues with, and reading trained models."""

import contextlib
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import blobfile as bf
import torch as th

from improved_diffusion import dist_util
from improved_diffusion.config import DrawingFlags, FirstFlags
from improved_diffusion.convert.folder import is_diffusers_folder, read_folder
from improved_diffusion.convert.models import import_model
from improved_diffusion.cpu.compute import Compute, choose
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.flags import (
    Flags,
    Role,
    declared,
    defaults,
    named,
    names_of,
    with_defaults,
)
from improved_diffusion.image_datasets import BUILTIN
from improved_diffusion.jobs.fit import check_fit
from improved_diffusion.jobs.script import started_as
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.run import averages, checkpoint
from improved_diffusion.run.checkpoint import Checkpoint, power_kind
from improved_diffusion.script_util import (
    create_diffusion,
    create_from_flags,
    is_super_resolution,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.shipped import shipped
from improved_diffusion.storage import absolute, is_remote, make_new_directory, new_directory, write_json

Config = TypeVar("Config", bound=Flags)


def _stored_arguments(source: Checkpoint, config: Flags) -> dict[str, Any]:
    """The arguments in a checkpoint. :raises ValueError: one has another type than the flag of the same name."""
    stored = source.state.get("arguments", {})
    expected = defaults(type(config))
    for name, value in stored.items():
        kind = type(expected.get(name, value))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(
                f"{source.path('state')}: damaged (its --{name} {value!r} should be a {kind.__name__})"
            )
    # Older versions knew colours only, and did not say so.
    return {**stored, "channels": stored.get("channels") or 3} if stored else stored


def _check_same_kind(where: str, stored: dict[str, Any], config: Flags) -> None:
    """:raises ValueError: the stored model is for super-resolution and `config` is not, or vice versa."""
    enlarges = "large_size" in stored
    if stored and enlarges != is_super_resolution(config):
        problem = "is not a super-resolution model; use the scripts image_..."
        if enlarges:
            problem = "is a super-resolution model; use the scripts super_res_..."
        raise ValueError(f"{where}: {problem}")


def merge_stored_flags(config: Config, given: set[str], stored: dict[str, Any]) -> Config:
    """Replace the defaults in `config` by the arguments of a checkpoint that describe its model.

    :param config: the flags of this command. :param given: the names of those that the user gave.
    :param stored: the arguments of the checkpoint.
    :raises ValueError: a given flag that defines the model differs from the checkpoint.
    """
    known = (
        sr_model_and_diffusion_defaults() if is_super_resolution(config) else model_and_diffusion_defaults()
    )
    # A model may have its own defaults for the guidance, from its training or from publish_model.py.
    guidance = () if "guidance_scale" in given else ("guidance_scale", "guidance_interval")
    stored = {name: stored[name] for name in (*known, *guidance) if name in stored}
    for name in names_of(type(config), Role.ARCHITECTURE, Role.PROCESS):
        value = getattr(config, name)
        if name in given and name in stored and value != stored[name]:
            raise ValueError(
                f"--{name} {value}: contradicts the checkpoint, which was trained with {stored[name]}; "
                "leave the flag out"
            )
    return with_defaults(config, given, stored)


def find_data(data_dir: str, datasets_dir: str, log: Callable[[str], None] = print) -> str:
    """The data to train on: those of --data_dir, or CIFAR-10, or the built-in shapes if CIFAR-10 cannot be prepared.

    :param data_dir: the flag. If it is not empty, it is returned, as an absolute path, which a resumed run can use from
        any folder.
    :param datasets_dir: the folder with the data that `cifar10.py` prepares.
    :return: a path, or "builtin".
    """
    if data_dir:
        return data_dir if data_dir == BUILTIN else absolute(data_dir)
    prepared = os.path.join(datasets_dir, "cifar_train")
    if os.path.exists(os.path.join(prepared, ".complete")):
        return prepared
    script = os.path.join(shipped("datasets"), "cifar10.py")
    if os.path.exists(script):
        log("No --data_dir is given, and CIFAR-10 is not prepared yet: preparing it now.")
        if subprocess.run([sys.executable, script, "--out_dir", datasets_dir]).returncode == 0:
            return prepared
    for line in (
        "*" * 78,
        "CIFAR-10 could not be prepared: TRAINING ON THE BUILT-IN SHAPES INSTEAD.",
        f"For CIFAR-10: python {script} --out_dir {datasets_dir} --archive cifar-10-python.tar.gz",
        "For your own images: --data_dir FOLDER",
        "*" * 78,
    ):
        log(line)
    return BUILTIN


def choose_log_dir(config: FirstFlags, runs_dir: str) -> str:
    """The directory of a run: --log_dir, $OPENAI_LOGDIR, that of --resume_checkpoint, or a new one in `runs_dir`."""
    log_dir = config.log_dir or os.environ.get("OPENAI_LOGDIR", "")
    resume = config.resume_checkpoint
    if not log_dir and resume:
        log_dir = resume if bf.isdir(resume) else bf.dirname(absolute(resume))
    return absolute(log_dir or new_directory(runs_dir))


def find_unfinished(
    config: FirstFlags, runs_dir: str, given: set[str] | None = None
) -> tuple[str, int] | None:
    """The newest unfinished run in `runs_dir` with the same flags. :return: its folder and step.

    :param given: the names of the flags that the user gave. With --init_from, the run may have replaced the others.
    """
    known = declared(type(config))
    same = {name: value for name, value in config.to_dict().items() if known[name].role is not Role.SESSION}
    if same["data_dir"] not in ("", BUILTIN):
        same["data_dir"] = absolute(same["data_dir"])
    # A run replaces some values, and records the new ones.
    replaced = {
        name for name, value in (("data_dir", ""), ("num_classes", 0), ("channels", 0)) if same[name] == value
    }
    if config.hours:
        replaced.add("total_steps")
    if config.init_from:
        of_the_model = {*names_of(type(config), Role.ARCHITECTURE, Role.PROCESS), "sigma_small"}
        replaced |= of_the_model - (given or set())
    same = {name: value for name, value in same.items() if name not in replaced}
    for folder, step in _newest_runs(runs_dir):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            with open(os.path.join(folder, "args.json"), encoding="utf-8") as file:
                stored = {**defaults(type(config)), **json.load(file)}
            end = stored["total_steps"] if config.hours else config.total_steps
            if step < end and same.items() <= stored.items():
                return folder, step
    return None


def _newest_runs(folder: str) -> list[tuple[str, int]]:
    """The runs in `folder` that have a checkpoint, and its step, the latest modified run first."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        run = os.path.join(folder, name)
        # Others' folders may be closed to us, and a run may be deleted at this moment.
        with contextlib.suppress(OSError):
            if complete := checkpoint.steps(run):
                found.append((os.path.getmtime(run), run, complete[-1]))
    return [(run, step) for _, run, step in sorted(found, reverse=True)]


def choose_out_dir(log_dir: str, parent: str) -> str:
    """The directory for a script's output: --log_dir, $OPENAI_LOGDIR, or a new one in `parent`. Rank 0 creates it.

    :raises ValueError: it cannot be created.
    """
    given = log_dir or os.environ.get("OPENAI_LOGDIR", "")
    out_dir = absolute(given or parent)
    if dist_util.get_rank() == 0:
        try:
            if given:
                bf.makedirs(out_dir)
            else:
                out_dir = make_new_directory(out_dir)
        except OSError as error:
            raise ValueError(
                f"--log_dir {out_dir}: cannot be created ({error.strerror or error}); choose another directory"
            ) from error
    return out_dir


# Files that people may give as a model by mistake, by the end of their name.
OTHER_FILES = {
    ".xlsx": "an Excel workbook",
    ".csv": "a table",
    ".json": "a record of a run or checkpoint",
    ".jsonl": "a table",
    ".npz": "an archive of images or numbers",
    ".npy": "an array of numbers",
    ".png": "a picture",
    ".jpg": "a picture",
    ".webp": "a picture",
    ".txt": "a text file",
    ".md": "a text file",
    ".py": "a program",
    ".zip": "an archive",
    ".safetensors": "a file of diffusers (convert_checkpoint.py --from_diffusers takes its folder)",
}
POOR_AVERAGE = 0.1  # relative distance of a profile from the wanted one
SHIPPED = "cifar10_recipe"  # the model that is used if none is given


def _shipped_name(path: str) -> str | None:
    """The name of a model that comes with the code, if `path` is "NAME" or "models/NAME", and no such path exists."""
    match = re.fullmatch(r"(?:models/)?([\w-]+)", path)
    if match and not os.path.exists(path) and checkpoint.steps(os.path.join(shipped("models"), match[1])):
        return match[1]
    return None


def find_model(path: str) -> str:
    """`path` as an absolute path, or the name of a model that comes with the code."""
    return _shipped_name(path) or absolute(path)


def _choose_model(config: DrawingFlags, project: str) -> str:
    """The path of --model_path, or of the model that comes with the code.

    :raises ValueError: there is neither; the message names the newest run of the project, if any.
    """
    if config.model_path:
        return config.model_path
    newest, _ = next(iter(_newest_runs(os.path.join(project, "runs"))), ("", 0))
    default = os.path.join(shipped("models"), SHIPPED)
    if checkpoint.steps(default) and not is_super_resolution(config):
        hint = f"; for your newest run, give --model_path {shlex.quote(newest)}" if newest else ""
        print(f"no --model_path is given: taking the model that comes with the code{hint}")
        return default
    example = f", such as {shlex.quote(newest)}" if newest else ""
    raise ValueError(f"--model_path is missing: give a run directory or a .pt file{example}")


def choose_source(
    resume_checkpoint: str, log_dir: str, log: Callable[[str], None] = print
) -> Checkpoint | None:
    """The checkpoint from which a run in `log_dir` continues, or None for a new run.

    If `log_dir` holds checkpoints already, the run continues from the newest of them, even if `resume_checkpoint` is
    another directory. So the same command can be given again.

    :raises ValueError: there is no such checkpoint, or to continue from it would overwrite newer ones.
    """
    present = checkpoint.steps(log_dir)
    if not resume_checkpoint:
        return checkpoint.find(log_dir, log=log) if present else None
    resume = absolute(resume_checkpoint)
    if present and (bf.isdir(resume) or bf.dirname(resume) != log_dir):
        source = checkpoint.find(log_dir, log=log)
        if resume != log_dir:
            log(
                f"note: the run's directory has checkpoints already, so it goes on from step {source.step}; "
                "--resume_checkpoint only counts in a new directory"
            )
        return source
    try:
        source = checkpoint.find(resume, log=log)
    except ValueError as error:
        weights = checkpoint.lone_weights(resume)
        hint = (
            f"; it holds only weights, such as those of improved-diffusion: --init_from {weights} starts from them, at "
            "step 0 with a new optimizer"
        )
        raise ValueError(f"--resume_checkpoint {error}{hint if weights else ''}") from None
    if present and source.step < present[-1]:
        raise ValueError(
            f"--resume_checkpoint {resume}: to continue from step {source.step} would overwrite the newer checkpoints "
            f"up to step {present[-1]} in the same directory; give a new --log_dir to branch off, or give the "
            "directory to continue from the newest"
        )
    return source


def merge_for_resume(config: Config, given: set[str], source: Checkpoint) -> Config:
    """The flags of a resumed run: those of the checkpoint, except for given ones that may change.

    :raises ValueError: a given flag may not change; the message names it.
    """
    stored = _stored_arguments(source, config)
    _check_same_kind(source.folder, stored, config)
    stored = {"recipe": "", "sync_interval": 1, **stored}
    kind = type(config)
    for name, declaration in declared(kind).items():
        value = getattr(config, name)
        if name not in given or name not in stored or value == stored[name]:
            continue
        if declaration.role is Role.ARCHITECTURE:
            raise ValueError(
                f"--{name} {value}: the run to resume was started with {stored[name]!r}; leave the flag out, or start "
                "a new run in another --log_dir"
            )
        if declaration.role in (Role.PROCESS, Role.TRAINING) and not config.allow_changed_flags:
            before = f"with {stored[name]!r}" if stored[name] != "" else "without it"
            raise ValueError(
                f"--{name} {value}: the run to resume was started {before}; leave the flag out, start a new run in "
                "another --log_dir, or give --allow_changed_flags True to continue with the new value"
            )
    merged = with_defaults(config, given | set(names_of(kind, Role.SESSION)), stored)
    # A number of steps takes the place of the hours that a run was started with.
    return replace(merged, hours=0.0) if "total_steps" in given and "hours" not in given else merged


def check_same_data(config: FirstFlags, source: Checkpoint, fingerprint: str) -> None:
    """:raises ValueError: the images with this `fingerprint` are not those that `source` was trained on."""
    trained_on = source.state.get("data", {}).get("fingerprint", fingerprint)
    if trained_on != fingerprint and not config.allow_changed_flags:
        raise ValueError(
            f"--data_dir {config.data_dir}: its images are not those that the run was trained on; give the same data, "
            "or --allow_changed_flags True to continue with others"
        )


def record_run(log_dir: str, config: Flags, facts: dict[str, Any], step: int, call: str = "") -> None:
    """Write ``args.json`` and ``run.json``, for the workbook, into `log_dir`.

    :param facts: the content of ``run.json``, to which this function adds the sessions and the command.
    :param step: the step at which this session begins.
    :param call: the call that started this run, if it was not started by a command.
    :raises OSError: a file cannot be written.
    """
    path = os.path.join(log_dir, "run.json")
    before = []
    # If the record of earlier sessions is damaged, keep what can be read.
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        content = json.load(file)
        sessions = content.get("sessions") if isinstance(content, dict) else None
        if isinstance(sessions, list):
            before = [session for session in sessions if isinstance(session, dict) and "started" in session]
    now = datetime.datetime.now().isoformat(timespec="seconds")
    sessions = [*before, {"started": now, "step": step}] if step else [{"started": now, "step": 0}]
    facts = {
        **facts,
        "started": sessions[0]["started"],
        "sessions": sessions,
        "command": call or shlex.join([*started_as(), *sys.argv[1:]]),
    }
    record_arguments(log_dir, config)
    write_json(path, facts)


def record_arguments(log_dir: str, config: Flags) -> None:
    """Write ``args.json`` into `log_dir`. :raises OSError: it cannot be written."""
    write_json(os.path.join(log_dir, "args.json"), config.to_dict())


@dataclass(frozen=True)
class Trained:
    """A trained model, read from its checkpoint.

    :ivar model: in eval mode. From `open_model`, an equivalent fast function without gradients.
    :ivar config: the flags of the command. Those of the checkpoint have replaced defaults.
    :ivar path: the weights file or, for an average of --ema_length, the directory.
    :ivar class_names: the names of the classes, if known.
    :ivar step: the number of training steps; 0 if unknown.
    :ivar images: the number of training images, from nothing on; 0 if unknown.
    :ivar compute: the precision and cores that `open_model` has chosen.
    """

    model: Callable[..., th.Tensor]
    diffusion: SpacedDiffusion
    config: Any
    path: str
    class_names: list[str]
    step: int
    images: int
    compute: Compute | None = None


def _best_kind(source: Checkpoint) -> str:
    """The weights of a checkpoint that draw best: those of the longest average, if there is one."""
    if source.ema_rates:
        return max(source.ema_rates, key=float)
    if source.power_lengths:  # of a published model
        return power_kind(max(source.power_lengths, key=float))
    return "model"


def _average(folder: str, length: float, step: int, log: Callable[[str], None]) -> dict[str, th.Tensor]:
    """The weights of --ema_length, from the averages in the checkpoints of a run up to `step`."""
    try:
        weights, distance = averages.reconstruct(averages.with_averages(folder), length, step)
    except ValueError as error:
        raise named(error, {"sigma_rel": "ema_length", "ema_lengths": "ema_lengths"}) from None
    if distance > POOR_AVERAGE:
        log(
            f"WARNING: --ema_length {length}: this is only a rough average (its profile is {distance:.0%} off); more "
            "checkpoints or more --ema_lengths would make a better one"
        )
    return weights


@dataclass(frozen=True)
class Weights:
    """The weights of a trained model, and what is stored with them.

    :ivar path: the file, or the folder.
    :ivar tensors: a state dict.
    :ivar arguments: the flags that are stored with them, if any.
    :ivar class_names: the names of the classes, if known.
    :ivar step, samples: the number of training steps and images; 0 if unknown.
    """

    path: str
    tensors: dict[str, th.Tensor]
    arguments: dict[str, Any]
    class_names: list[str]
    step: int
    samples: int

    def __str__(self) -> str:
        if not (self.step or self.samples):
            return self.path
        after = f" after those of {start}" if (start := self.arguments.get("init_from")) else ""
        return f"{self.path} ({self.step:,} steps, {self.samples:,} images{after})"


def read_weights(
    model_path: str, config: Flags, log: Callable[[str], None] = print, flag_name: str = "model_path"
) -> Weights:
    """Read the weights at `model_path`.

    :param model_path: a run directory, for its newest EMA weights of the largest rate, a .pt file, a folder of
        diffusers, or the name of a model that comes with the code.
    :param config: the flags of this command.
    :param flag_name: the flag that names it.
    :raises ValueError: there are no such weights, or they are of another kind of model; the message names the flag.
    """
    name = _shipped_name(model_path)
    path = os.path.join(shipped("models"), name) if name else absolute(model_path)
    if not bf.exists(path):
        known = ""
        if re.fullmatch(r"[\w-]+", bf.basename(path)) and os.path.isdir(shipped("models")):
            known = (
                f", nor a model of this name (there is {', '.join(sorted(os.listdir(shipped('models'))))})"
            )
        raise ValueError(f"--{flag_name} {model_path}: there is no such file or directory{known}")
    length = getattr(config, "ema_length", 0.0)
    if bf.isdir(path) and not checkpoint.steps(path) and is_diffusers_folder(path):
        found = _read_diffusers(path, log, flag_name)
    elif bf.isdir(path):
        inside = [] if is_remote(path) or checkpoint.steps(path) else _newest_runs(path)
        if inside:
            raise ValueError(
                f"--{flag_name} {model_path}: is a folder of runs; the newest of them is {inside[0][0]}"
            )
        try:
            source = checkpoint.find(path, log=log)
        except ValueError as error:
            raise ValueError(f"--{flag_name} {error}; give a run directory or a .pt file") from None
        if length:
            found = _weights_of(source, config, path, _average(path, length, source.step, log))
        else:
            kind = _best_kind(source)
            found = _weights_of(source, config, source.path(kind), source.load(kind))
    else:
        if length:
            raise ValueError(f"--ema_length {length}: needs the directory of a run, not a file")
        kind = checkpoint.kind_of(path)
        what = OTHER_FILES.get(os.path.splitext(path)[1].lower())
        if what and kind is None:
            raise ValueError(f"--{flag_name} {model_path}: is {what}; give a run directory or a .pt file")
        if kind in ("opt", "state"):
            raise ValueError(
                f"--{flag_name} {model_path}: holds no weights; give a model or ema file, or the directory"
            )
        try:
            source = checkpoint.state_beside(path)
            weights = source.load(kind) if source else checkpoint.load_weights(path)
        except checkpoint.DamagedCheckpoint as error:
            others = "; give the directory, for its newest intact checkpoint"
            raise ValueError(
                f"--{flag_name} {error}{others if checkpoint.steps(bf.dirname(path)) else ''}"
            ) from None
        found = _weights_of(source, config, path, weights)
    _check_same_kind(f"--{flag_name} {path}", found.arguments, config)
    if not found.arguments:
        log(f"{path}: no arguments are stored with it; the flags and their defaults describe the model")
    return found


def _weights_of(
    source: Checkpoint | None, config: Flags, path: str, tensors: dict[str, th.Tensor]
) -> Weights:
    """`tensors` and the facts about them in their checkpoint, if there is one."""
    if source is None:
        return Weights(path, tensors, {}, [], 0, 0)
    names = source.state.get("data", {}).get("class_names", [])
    stored = _stored_arguments(source, config)
    return Weights(path, tensors, stored, names, source.step, source.state.get("samples", 0))


def _read_diffusers(folder: str, log: Callable[[str], None], flag_name: str) -> Weights:
    """The model that diffusers has saved in `folder`. :raises ValueError: it has no equivalent here."""
    source = read_folder(folder)
    try:
        model, arguments = import_model(source)
    except ValueError as error:
        raise ValueError(f"--{flag_name} {folder} cannot be converted: {error}") from None
    if not source.scheduler_config.get("clip_sample", True):
        log("its scheduler does not clip: draw with --clip_denoised False")
    return Weights(folder, model.state_dict(), arguments, [], 0, 0)


def load_trained(
    model_path: str,
    config: Flags,
    given: set[str],
    log: Callable[[str], None] = print,
    flag_name: str = "model_path",
) -> Trained:
    """Build the model whose weights are at `model_path`, and its diffusion.

    :param model_path, flag_name: see `read_weights`.
    :param config: the flags of this command; `given` names those that the user gave.
    :raises ValueError: there are no such weights, or a given flag contradicts them.
    """
    found = read_weights(model_path, config, log, flag_name)
    # The timesteps for drawing are a matter of this command, not of the training.
    stored = {name: value for name, value in found.arguments.items() if name != "timestep_respacing"}
    config = merge_stored_flags(config, given, stored)
    model, diffusion = create_from_flags(config)
    check_fit(model, found.tensors, config, f"--{flag_name} {found.path}")
    model.load_state_dict(found.tensors)
    log(f"weights: {found}")
    images = 0 if found.arguments.get("init_from") else found.samples
    return Trained(model.eval(), diffusion, config, found.path, found.class_names, found.step, images)


def open_model(config: Flags, given: set[str], project: str) -> Trained:
    """Open the model of --model_path, with the precision and cores of --precision and --num_workers.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``models`` and ``runs``.
    :raises ValueError: there is no such model, or it does not fit the flags.
    """
    return compute_with(load_trained(_choose_model(config, project), config, given), config)


def compute_with(trained: Trained, config: Flags) -> Trained:
    """A copy of `trained` whose model is a fast function, with the precision and cores of the flags."""
    chosen = choose(config.precision, config.num_workers)
    # Each process has measured its own speed, but all must draw in the same precision.
    compute = Compute(dist_util.broadcast(chosen.precision), chosen.workers)
    model = fast_model(trained.model, compute.precision, compute.workers)
    print(f"computing in {compute}")
    return replace(trained, model=model, compute=compute)


def with_flags(trained: Trained, config: Config, given: set[str]) -> Trained:
    """A copy of `trained` for the flags of another command, which draws or measures.

    :raises ValueError: a given flag contradicts the model.
    """
    stored = {name: value for name, value in trained.config.to_dict().items() if name != "timestep_respacing"}
    config = merge_stored_flags(config, given, stored)
    return replace(trained, config=config, diffusion=create_diffusion(config))


def open_like(
    path: str, config: Flags, class_names: Sequence[str], flag_name: str
) -> Callable[..., th.Tensor]:
    """Open a second model, which must take the same inputs as the model of `config`.

    :param path: as `model_path` of `load_trained`. :param class_names: of the model; empty if unknown.
    :param flag_name: the flag of the path.
    :return: a function like the `model` of `open_model`.
    :raises ValueError: there is no such model, or it takes other inputs; the message names the flag.
    """
    own = {"precision": config.precision, "num_workers": config.num_workers}
    other = load_trained(path, type(config)(**own), set(), flag_name=flag_name)
    same = [
        *names_of(type(config), Role.PROCESS),
        "image_size",
        "image_width",
        "learn_sigma",
        "class_cond",
        "num_classes",
    ]
    for name in [*same, "class_dropout", "channels"]:
        ours, theirs = getattr(config, name), getattr(other.config, name)
        if name == "channels":
            ours, theirs = config.colour_channels, other.config.colour_channels
        if ours != theirs and not (name == "class_dropout" and bool(ours) == bool(theirs)):
            raise ValueError(
                f"--{flag_name} {path}: has --{name} {theirs}, but the model has {ours}; they must agree"
            )
    if (
        config.class_cond
        and class_names
        and other.class_names
        and list(class_names) != list(other.class_names)
    ):
        raise ValueError(f"--{flag_name} {path}: has other classes than the model; they must agree")
    chosen = choose(config.precision, config.num_workers)
    return fast_model(other.model, dist_util.broadcast(chosen.precision), chosen.workers)
