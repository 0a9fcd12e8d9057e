"""The configurations of diffusers' UNet2DModel and DDPMScheduler, and the flags that mean the same here.

An option that only one side has is refused by name.
"""

import math
from itertools import compress
from typing import Any

from improved_diffusion.gaussian_diffusion import MAX_BETA
from improved_diffusion.nn import NUM_GROUPS
from improved_diffusion.unet import AttentionBlock, Downsample, UNetModel

# The options of UNet2DModel and DDPMScheduler that matter here, with their defaults.
UNET_OPTIONS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
SCHEDULER_OPTIONS = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "prediction_type": "epsilon",
    "thresholding": False,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}

# Options that are fixed in this project, with the values that mean the same.
UNET_ACCEPTED = {
    "in_channels": [1, 3],
    "center_input_sample": [False],
    "time_embedding_type": ["positional"],
    "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1],
    "downsample_type": ["conv"],
    "upsample_type": ["conv"],
    "act_fn": ["silu", "swish"],
    "norm_num_groups": [NUM_GROUPS],
    "attn_norm_num_groups": [None, NUM_GROUPS],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [True],
    "class_embed_type": [None],
}
SCHEDULER_ACCEPTED = {
    "_class_name": ["DDPMScheduler", "DDIMScheduler"],
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
    "trained_betas": [None],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False],
    "clip_sample_range": [1.0],
    "rescale_betas_zero_snr": [False],
}
# The options that --ddpm_details sets.
DETAILS = {
    False: {"freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1},
    True: {"freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0},
}
PREDICTION_TYPES = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def unet_config(model: UNetModel, flags: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the `UNet2DModel` that computes the same as `model`, which `flags` describe.

    :raises ValueError: diffusers cannot express a flag; the message names it.
    """
    levels = [[]]
    for layers in model.input_blocks[1:]:
        if isinstance(layers[0], Downsample):
            levels.append([])
        else:
            levels[-1].append(layers)
    channels = [blocks[0][0].out_layers[0].num_channels for blocks in levels]
    if channels[0] != model.model_channels:
        raise ValueError(
            f"--channel_mult {flags['channel_mult']}: diffusers' UNet2DModel starts with as many channels as its "
            "first level has, so the first multiplier would have to be 1"
        )
    if flags["patch_size"] > 1:
        raise ValueError(f"--patch_size {flags['patch_size']}: diffusers' UNet2DModel knows no patches")
    attentions = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    if len({attention.attention.num_heads for attention in attentions}) > 1:
        raise ValueError(
            f"--num_heads_upsample {flags['num_heads_upsample']}: diffusers' UNet2DModel has the same number of heads "
            "on the way up as on the way down"
        )
    widths = {attention.norm.num_channels // flags["num_heads"] for attention in attentions}
    if flags["num_heads"] > 1 and len(widths) > 1:
        raise ValueError(
            f"--num_heads {flags['num_heads']}: diffusers' UNet2DModel has heads of one width on all levels, and those "
            f"of this model have {' and '.join(map(str, sorted(widths)))} channels"
        )
    with_attention = [len(blocks[0]) > 1 for blocks in levels]
    return {
        **UNET_OPTIONS,
        "_class_name": "UNet2DModel",
        "sample_size": [flags["image_size"], flags["image_width"]]
        if flags["image_width"]
        else flags["image_size"],
        "in_channels": flags["channels"] or 3,
        "out_channels": (flags["channels"] or 3) * (2 if flags["learn_sigma"] else 1),
        "block_out_channels": channels,
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in with_attention],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(with_attention)],
        "layers_per_block": flags["num_res_blocks"],
        "dropout": flags["dropout"],
        "attention_head_dim": None if flags["num_heads"] == 1 else widths.pop(),
        "attn_norm_num_groups": NUM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "num_class_embeds": model.label_emb.num_embeddings if flags["class_cond"] else None,
        **DETAILS[flags["ddpm_details"]],
    }


def scheduler_config(flags: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the `DDPMScheduler` for the diffusion that `flags` describe.

    :raises ValueError: diffusers cannot express a flag; the message names it.
    """
    prediction = "x_start" if flags["predict_xstart"] else flags["prediction"]
    if prediction not in PREDICTION_TYPES:
        raise ValueError(
            f"--prediction {prediction}: diffusers has no equivalent; its models are given x_t unscaled"
        )
    steps = flags["diffusion_steps"]
    if flags["rescale_timesteps"] and steps != 1000:
        raise ValueError(
            f"--rescale_timesteps True: diffusers gives a model the timesteps 0 to {steps - 1}, and this "
            "one was trained on 0 to 1000"
        )
    beta_start, beta_end = _linear_range(steps)
    if flags["noise_schedule"] == "linear" and beta_end > MAX_BETA:
        raise ValueError(
            f"--diffusion_steps {steps}: the linear schedule of so few steps is cut off at {MAX_BETA}, which "
            "diffusers does not do"
        )
    if flags["learn_sigma"]:
        variance_type = "learned_range"
    else:
        variance_type = "fixed_small" if flags["sigma_small"] else "fixed_large"
    return {
        **SCHEDULER_OPTIONS,
        "num_train_timesteps": steps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": SCHEDULES[flags["noise_schedule"]],
        "variance_type": variance_type,
        "prediction_type": PREDICTION_TYPES[prediction],
        "clip_sample": True,
    }


def model_flags(config: dict[str, Any]) -> dict[str, Any]:
    """The flags that a `UNet2DModel`'s configuration stands for.

    :raises ValueError: this project cannot express an option; the message names it.
    """
    config = {**UNET_OPTIONS, **config}
    _check_accepted(config, UNET_ACCEPTED)
    if config["resnet_time_scale_shift"] == "scale_shift" and config["attn_norm_num_groups"] is None:
        raise ValueError(
            "attn_norm_num_groups None: with resnet_time_scale_shift 'scale_shift' this leaves the attention in the "
            "middle block without normalisation, which it always has in this project"
        )
    details = {name: config[name] for name in DETAILS[False]}
    if details not in DETAILS.values():
        raise ValueError(
            f"{_listed(details)}: this project knows {_listed(DETAILS[False])}, and {_listed(DETAILS[True])}, but no "
            "mixture"
        )
    if config["out_channels"] not in (config["in_channels"], 2 * config["in_channels"]):
        raise ValueError(
            f"out_channels {config['out_channels']}: expected as many as in_channels, or twice as many with a learned "
            "variance"
        )
    size, width = config["sample_size"], 0
    if isinstance(size, list) and len(size) == 2:
        size, width = size
        width = 0 if width == size else _whole_number("sample_size", width)
    size = _whole_number("sample_size", size)
    channels = [_whole_number("block_out_channels", number) for number in _list(config, "block_out_channels")]
    if any(number % channels[0] for number in channels):
        raise ValueError(f"block_out_channels {channels}: in this project all are multiples of the first")
    if config["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise ValueError(
            f"time_embedding_dim {config['time_embedding_dim']}: in this project it is four times the first of "
            f"block_out_channels, {4 * channels[0]}"
        )
    attention = _levels_with_attention(config)
    if len(attention) != len(channels):
        raise ValueError(f"block_out_channels {channels}: not as many as down_block_types")
    classes = config["num_class_embeds"]
    if type(config["dropout"]) not in (int, float):
        raise ValueError(f"dropout {config['dropout']!r}: expected a number")
    return {
        "image_size": size,
        "image_width": width,
        "num_channels": channels[0],
        "num_res_blocks": _whole_number("layers_per_block", config["layers_per_block"]),
        "num_heads": _heads(config["attention_head_dim"], [*compress(channels, attention), channels[-1]]),
        "attention_resolutions": ",".join(str(size >> level) for level, has in enumerate(attention) if has),
        "channel_mult": ",".join(str(number // channels[0]) for number in channels),
        "dropout": float(config["dropout"]),
        "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
        "channels": config["in_channels"],
        "class_cond": classes is not None,
        "num_classes": 0 if classes is None else _whole_number("num_class_embeds", classes),
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "ddpm_details": details == DETAILS[True],
    }


def diffusion_flags(config: dict[str, Any], learn_sigma: bool) -> dict[str, Any]:
    """The flags that mean the same as a scheduler's configuration.

    :raises ValueError: this project cannot express an option; the message names it.
    """
    config = {**SCHEDULER_OPTIONS, **config}
    _check_accepted(config, SCHEDULER_ACCEPTED)
    variance_type = config["variance_type"]
    if learn_sigma != (variance_type == "learned_range"):
        raise ValueError(
            f"variance_type {variance_type!r}: contradicts the model's {6 if learn_sigma else 3} out_channels; "
            "learned_range needs 6, all others 3"
        )
    steps = _whole_number("num_train_timesteps", config["num_train_timesteps"])
    if config["beta_schedule"] == "linear":
        ours = dict(zip(("beta_start", "beta_end"), _linear_range(steps)))
        theirs = {name: config[name] for name in ours}
        if not all(_close(theirs[name], ours[name]) for name in ours):
            raise ValueError(
                f"{_listed(theirs)}: the linear schedule of {steps} steps has {_listed(ours)} in this project"
            )
    return {
        "diffusion_steps": steps,
        "noise_schedule": {theirs: ours for ours, theirs in SCHEDULES.items()}[config["beta_schedule"]],
        "sigma_small": variance_type.startswith("fixed_small"),
        "predict_xstart": config["prediction_type"] == "sample",
        "prediction": "v" if config["prediction_type"] == "v_prediction" else "epsilon",
        "rescale_timesteps": False,
    }


def _check_accepted(config: dict[str, Any], accepted: dict[str, list]) -> None:
    for name, values in accepted.items():
        if config[name] not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(
                f"{name} {config[name]!r}: this project has no equivalent; it knows only {known}"
            )


def _levels_with_attention(config: dict[str, Any]) -> list[bool]:
    """For each level, from the top, whether it has attention."""
    kinds = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    down, up = _list(config, "down_block_types"), _list(config, "up_block_types")
    for kind in (*down, *up):
        if kind not in [*kinds]:
            raise ValueError(
                f"down_block_types, up_block_types: this project has no equivalent of {kind!r}; it knows only "
                f"{', '.join(kinds)}"
            )
    attention = [kinds[kind] for kind in down]
    if [kinds[kind] for kind in reversed(up)] != attention:
        raise ValueError(
            f"up_block_types {up}: in this project the levels with attention are the same on the way up and down"
        )
    return attention


def _heads(width: Any, channels: list[int]) -> int:
    """The number of attention heads of `width` channels each, on levels with these numbers of `channels`."""
    if width is None:
        return 1
    width = _whole_number("attention_head_dim", width)
    numbers = {number / width for number in channels}
    if len(numbers) > 1 or not min(numbers).is_integer():
        raise ValueError(
            f"attention_head_dim {width}: the levels with attention have {channels} channels, so their numbers of "
            "heads would differ; in this project all levels have the same number of heads"
        )
    return int(numbers.pop())


def _linear_range(steps: int) -> tuple[float, float]:
    """First and last beta of the linear schedule with this number of steps."""
    return 0.0001 * 1000 / steps, 0.02 * 1000 / steps


def _close(value: Any, expected: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-6)


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _whole_number(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} {value!r}: expected a whole number above 0")
    return value


def _list(config: dict[str, Any], name: str) -> list:
    if not isinstance(config[name], list | tuple) or not config[name]:
        raise ValueError(f"{name} {config[name]!r}: expected a list")
    return list(config[name])
