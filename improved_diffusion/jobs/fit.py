"""Checking that weights fit a model and, if not, finding the flags that they need from their shapes."""

import math
from collections.abc import Mapping

import torch as th

from improved_diffusion.config import UNetFlags, levels_of
from improved_diffusion.script_util import is_super_resolution

CLASSES = "label_emb.weight"  # the class embedding, a row for each class


def check_fit(model: th.nn.Module, tensors: Mapping[str, th.Tensor], config: UNetFlags, where: str) -> None:
    """Compare the names and shapes of weights with those of a model.

    :param config: the flags from which `model` was built.
    :param where: the beginning of the message: the flag and the path of the weights.
    :raises ValueError: they differ. The message gives the flags that the weights need, if their shapes show it.
    """
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    if not names:
        return
    try:
        needed = needed_flags(theirs, config)
    except (KeyError, IndexError, ZeroDivisionError):
        needed = []
    if needed:
        problem = f"they need {' '.join(needed)}"
    else:
        name = next(name for name in [*ours, *theirs] if name in names)
        problem = f"{name} has the shape {theirs.get(name, 'none')} instead of {ours.get(name, 'none')}"
    raise ValueError(
        f"{where}: its weights do not fit the model that the flags describe ({problem}); give the flags it was "
        "trained with"
    )


def needed_flags(shapes: Mapping[str, tuple[int, ...]], config: UNetFlags) -> list[str]:
    """The flags, with values, of a UNet whose weights have these `shapes`, as far as they differ from `config`.

    :raises KeyError, IndexError, ZeroDivisionError: the weights are not those of such a UNet.
    """
    channels, inputs = shapes["input_blocks.0.0.weight"][:2]
    inputs //= 2 if is_super_resolution(config) else 1
    colours = 1 if math.isqrt(inputs) ** 2 == inputs else 3  # times the square of the patch size
    patch_size = math.isqrt(inputs // colours)
    levels: list[list[int]] = [[]]  # the numbers of the blocks of each level
    number = 1
    while any(name.startswith(f"input_blocks.{number}.") for name in shapes):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(number)
        number += 1
    firsts = [level[0] for level in levels]
    widths = [shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    multipliers = tuple(width // channels for width in widths)
    attended = {
        2**level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in shapes
    }
    scaled = shapes[f"input_blocks.{firsts[0]}.0.emb_layers.1.weight"][0] == 2 * widths[0]
    found = {
        "num_channels": channels,
        "num_res_blocks": len(levels[0]),
        "patch_size": patch_size,
        "learn_sigma": shapes["out.2.weight"][0] == 2 * inputs,
        "use_scale_shift_norm": scaled,
        "class_cond": CLASSES in shapes,
    }
    needed = [f"--{name} {value}" for name, value in found.items() if value != getattr(config, name)]
    if colours != config.colour_channels:
        needed.append(f"--channels {colours}")
    our_multipliers, factors = levels_of(config)
    if multipliers != our_multipliers:
        needed.append(f"--channel_mult {','.join(map(str, multipliers))}")
    if attended != {factor for factor in factors if factor < 2 ** len(our_multipliers)}:
        side = config.output_height // patch_size
        needed.append(
            f"--attention_resolutions {','.join(str(side // f) for f in sorted(attended) if f <= side)}"
        )
    if found["class_cond"] and config.class_cond:
        rows = shapes[CLASSES][0] - (config.class_dropout > 0)
        if rows != config.num_classes:
            needed.append(f"--num_classes {rows}")
    return needed
