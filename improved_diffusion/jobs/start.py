"""Starting a run from the weights of another model (--init_from)."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch as th

from improved_diffusion.config import TrainingFlags, levels_of
from improved_diffusion.flags import Role, declared, defaults, names_of, with_defaults
from improved_diffusion.jobs.fit import CLASSES, check_fit
from improved_diffusion.jobs.runs import Weights
from improved_diffusion.script_util import count_classes
from improved_diffusion.unet import UNetModel

Config = TypeVar("Config", bound=TrainingFlags)

# Flags in which the two models may differ. The sizes only affect the resolutions of the levels.
MAY_DIFFER = (
    "image_size",
    "image_width",
    "large_size",
    "small_size",
    "class_cond",
    "num_classes",
    "class_dropout",
)


def merge_for_start(config: Config, given: set[str], source: Weights) -> Config:
    """The flags of a run that starts from `source`. Flags of the model that were not `given` come from the source.

    The number of classes comes from the data. With another image size, the levels stay the same.

    :raises ValueError: the weights do not fit a given flag; the message names all such flags.
    """
    if not source.arguments:
        return config
    kind = type(config)
    theirs = with_defaults(kind(), set(), source.arguments)
    names = [*names_of(kind, Role.ARCHITECTURE, Role.PROCESS), "sigma_small"]
    taken = {name: getattr(theirs, name) for name in names if name != "num_classes"}
    if not (config.class_cond if "class_cond" in given else theirs.class_cond):
        taken["class_dropout"] = 0.0
    elif not theirs.class_cond:
        del taken["class_dropout"]
    if not with_defaults(config, given, taken).class_dropout:
        taken["guidance_scale"] = 1.0
    size = with_defaults(config, given, taken).output_height
    if size != theirs.output_height:
        multipliers, factors = levels_of(theirs)
        side = size // theirs.patch_size
        sides = [side // factor for factor in factors if factor < 2 ** len(multipliers)]
        taken["channel_mult"] = ",".join(map(str, multipliers))
        taken["attention_resolutions"] = ",".join(map(str, sides))
    merged = with_defaults(config, given, taken)
    same_levels = {
        name: ours == others
        for name, ours, others in zip(
            ("channel_mult", "attention_resolutions"), levels_of(merged), levels_of(theirs)
        )
    }
    differing = [
        f"--{name} {getattr(merged, name)} (it has {'none' if taken[name] == '' else taken[name]})"
        for name, declaration in declared(kind).items()
        if declaration.role is Role.ARCHITECTURE
        and name in given
        and name not in MAY_DIFFER
        and not same_levels.get(name, getattr(merged, name) == taken[name])
    ]
    if differing:
        raise ValueError(
            f"--init_from {source.path}: is a model of another shape than {', '.join(differing)}; leave "
            f"{'this flag' if len(differing) == 1 else 'these flags'} out"
        )
    return merged


def check_start(model: UNetModel, source: Weights, config: TrainingFlags) -> None:
    """:raises ValueError: the weights do not fit `model`. The class embedding need not fit."""
    rows = source.tensors.get(CLASSES, th.empty(0, 4 * model.model_channels))
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != CLASSES}
    if model.num_classes is not None:
        tensors[CLASSES] = rows.new_empty(model.num_classes, rows.shape[1])
    check_fit(model, tensors, config, f"--init_from {source.path}")


def load_start(
    model: UNetModel, source: Weights, config: TrainingFlags, class_names: Sequence[str]
) -> dict[str, Any]:
    """Load the weights of `source` into `model`. Classes with the same name get their embedding from the source.

    The embedding of any other class starts as that of "no class" or, if the source has none, as the mean of all.

    :param config: the flags of the run.
    :param class_names: the names of the classes of the data.
    :return: for the records of the run: the origin of the weights, and texts about what was taken and what is new.
    :raises ValueError: the weights do not fit.
    """
    check_start(model, source, config)
    tensors, fate = _with_classes(model, source, config, class_names)
    model.load_state_dict(tensors)
    usual, others = defaults(type(config)), source.arguments
    names = [name for name in names_of(type(config), Role.ARCHITECTURE, Role.PROCESS) if name in others]
    names = [name for name in names if name != "num_classes"]
    taken, anew = ["weights"], ["step 0", "optimizer", "moving averages (which begin at these weights)"]
    for name in names:
        now, before = getattr(config, name), others[name]
        if now != before:
            anew.append(f"--{name} {now} (before: {'not given' if before == '' else before})")
        elif now != usual[name]:
            taken.append(f"--{name} {now}")
    for known, entries in ((True, taken), (False, anew)):
        entries += [text for text, is_taken in fate if is_taken is known]
    return {
        "path": source.path,
        "step": source.step,
        "samples": source.samples,
        "taken": ", ".join(taken),
        "anew": ", ".join(anew),
    }


def _with_classes(
    model: UNetModel, source: Weights, config: TrainingFlags, class_names: Sequence[str]
) -> tuple[dict[str, th.Tensor], list[tuple[str, bool]]]:
    """The tensors of the source with a class embedding for `model`, and texts about its classes (True: taken)."""
    tensors = dict(source.tensors)
    rows = tensors.pop(CLASSES, None)
    if rows is None and model.num_classes is None:
        return tensors, []
    if rows is None:
        classes = th.zeros(0, 4 * model.model_channels)
        without = classes.new_zeros(classes.shape[1])
    else:
        has_row_without = source.arguments.get("class_dropout", 0) > 0
        classes = rows[:-1] if has_row_without else rows
        without = rows[-1] if has_row_without else rows.float().mean(0)
    if model.num_classes is None:
        bias = tensors["time_embed.2.bias"]
        tensors["time_embed.2.bias"] = bias.float() + without
        return tensors, [(f"no classes (before: {len(classes)})", False)]
    embedding = without.float().repeat(model.num_classes, 1)
    count = count_classes(config)
    if source.class_names and class_names:
        old = {name: number for number, name in enumerate(source.class_names[: len(classes)])}
        pairs = [(new, old[name]) for new, name in enumerate(class_names[:count]) if name in old]
    else:
        pairs = [(number, number) for number in range(count)] if count == len(classes) else []
    for new, old_number in pairs:
        embedding[new] = classes[old_number]
    tensors[CLASSES] = embedding
    fate = [(f"{len(pairs)} of {count} classes", True)] if pairs else []
    if len(pairs) < count:
        fate.append((f"{count - len(pairs)} of {count} classes", False))
    return tensors, fate
