"""Models to and from diffusers: a `UNetModel` becomes a `UNet2DModel` that computes the same, and the reverse.

Both are UNets after Ho et al. 2020. They differ in names, options (see `diffusers_config`) and the order of the
attention's weights. The library diffusers itself is not needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn

from improved_diffusion.convert.diffusers_config import (
    UNET_OPTIONS,
    diffusion_flags,
    model_flags,
    scheduler_config,
    unet_config,
)
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from improved_diffusion.unet import Downsample, ResBlock, UNetModel, Upsample

# From the names of layers here to their names in diffusers. One layer here may be several there.
OUTSIDE_BLOCKS = {
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "label_emb": ("class_embedding",),
    "input_blocks.0.0": ("conv_in",),
    "out.0": ("conv_norm_out",),
    "out.2": ("conv_out",),
}
RES_BLOCK = {
    "in_layers.0": ("norm1",),
    "in_layers.2": ("conv1",),
    "emb_layers.1": ("time_emb_proj",),
    "out_layers.0": ("norm2",),
    "out_layers.3": ("conv2",),
    "skip_connection": ("conv_shortcut",),
}
ATTENTION_BLOCK = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}
# Old files, such as google/ddpm-cifar10-32, have other names, which diffusers still accepts.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class DiffusersModel:
    """A `UNet2DModel` and its scheduler: both configurations, and the weights by name."""

    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    weights: dict[str, th.Tensor]


def export_model(model: UNetModel, flags: dict[str, Any]) -> DiffusersModel:
    """Convert `model` for diffusers.

    :param flags: those that describe the model and its diffusion.
    :raises ValueError: diffusers cannot express a flag; the message names it.
    """
    configs = unet_config(model, flags), scheduler_config(flags)
    state = model.state_dict()
    weights = {}
    for ours, theirs in _parameter_names(model).items():
        parts = [state[ours]]
        if len(theirs) > 1:
            # Here: queries, keys and values of each head in turn. There: all queries, all keys, all values.
            parts = [
                part.flatten(0, 1) for part in state[ours].unflatten(0, (flags["num_heads"], 3, -1)).unbind(1)
            ]
        for name, part in zip(theirs, parts):
            # The attention's convolutions of width 1 are linear layers there.
            weights[name] = (part.squeeze(2) if part.dim() == 3 else part).contiguous()
    return DiffusersModel(*configs, weights)


def import_model(source: DiffusersModel) -> tuple[UNetModel, dict[str, Any]]:
    """The model that computes the same as a `UNet2DModel`.

    :return: the model, with its weights, and the flags that describe it and its diffusion.
    :raises ValueError: this project cannot express an option, or the weights do not fit the configuration;
        the message names it.
    """
    flags = {**model_and_diffusion_defaults(), **model_flags(source.unet_config)}
    flags.update(diffusion_flags(source.scheduler_config, flags["learn_sigma"]))
    model, _ = create_model_and_diffusion(**flags)
    model.load_state_dict(_imported_state(model, source.weights, flags["num_heads"]))
    if not {**UNET_OPTIONS, **source.unet_config}["flip_sin_to_cos"]:
        # There, the first half of these weights belongs to the sines; here, to the cosines.
        weight = model.time_embed[0].weight.data
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
    return model, flags


def _imported_state(model: UNetModel, weights: dict[str, th.Tensor], num_heads: int) -> dict[str, th.Tensor]:
    """The state dict of `model`, made from the weights of a `UNet2DModel`.

    :raises ValueError: a weight is missing, left over or of another shape.
    """
    weights = {_present_name(name): tensor for name, tensor in weights.items()}
    state = {}
    for ours, theirs in _parameter_names(model).items():
        shape = model.get_parameter(ours).shape
        parts = []
        for name in theirs:
            part = weights.pop(name, None)
            expected = (shape[0] // len(theirs), *(shape[1:2] if len(shape) == 3 else shape[1:]))
            if not isinstance(part, th.Tensor) or part.shape != expected:
                found = "is no tensor in the file"
                if isinstance(part, th.Tensor):
                    found = f"has the shape {list(part.shape)}"
                raise ValueError(f"{name} {found}; the configuration requires the shape {list(expected)}")
            parts.append(part)
        if len(parts) > 1:
            parts = [th.stack([part.unflatten(0, (num_heads, -1)) for part in parts], dim=1).flatten(0, 2)]
        state[ours] = parts[0].reshape(shape)
    if weights:
        raise ValueError(f"{next(iter(weights))} is in the file, but not in the configuration's model")
    return state


def _present_name(name: str) -> str:
    """The present name of a weight, whatever the age of its file."""
    *path, layer, kind = name.rsplit(".", 2)
    return ".".join([*path, OLD_ATTENTION.get(layer, layer), kind]) if path else name


def _parameter_names(model: UNetModel) -> dict[str, tuple[str, ...]]:
    """The name or names of every parameter of `model` in a `UNet2DModel`."""
    layers = {**OUTSIDE_BLOCKS}
    layers.update(_names_along(list(enumerate(model.input_blocks))[1:], "input_blocks", "down_blocks"))
    layers.update(_names_along(enumerate(model.output_blocks), "output_blocks", "up_blocks"))
    for i, (layer, block) in enumerate(zip(model.middle_block, (0, 0, 1))):
        layers.update(_names_within(layer, f"middle_block.{i}", "mid_block", block))
    names = {}
    for parameter, _ in model.named_parameters():
        layer, kind = parameter.rsplit(".", 1)
        names[parameter] = tuple(f"{theirs}.{kind}" for theirs in layers[layer])
    return names


def _names_along(
    blocks: Iterable[tuple[int, nn.Sequential]], ours: str, theirs: str
) -> dict[str, tuple[str, ...]]:
    """The names of the layers on the way down or up: one list of blocks here, one list per level there."""
    names = {}
    level = block = 0
    for i, layers in blocks:
        for j, layer in enumerate(layers):
            names.update(_names_within(layer, f"{ours}.{i}.{j}", f"{theirs}.{level}", block))
        block += 1
        if isinstance(layers[-1], Downsample | Upsample):
            level, block = level + 1, 0
    return names


def _names_within(layer: nn.Module, ours: str, theirs: str, block: int) -> dict[str, tuple[str, ...]]:
    """The names of the parts of `layer`, which is `ours` here and in block `block` of level `theirs` there."""
    if isinstance(layer, Downsample):
        return {f"{ours}.op": (f"{theirs}.downsamplers.0.conv",)}
    if isinstance(layer, Upsample):
        return {f"{ours}.conv": (f"{theirs}.upsamplers.0.conv",)}
    kind, parts = ("resnets", RES_BLOCK) if isinstance(layer, ResBlock) else ("attentions", ATTENTION_BLOCK)
    return {
        f"{ours}.{part}": tuple(f"{theirs}.{kind}.{block}.{name}" for name in names)
        for part, names in parts.items()
    }
