"""Recipes: sets of training flags that were measured to learn well in hours of CPU time (docs/recipes.md)."""

from typing import Any

# What does not depend on the images.
_SMALL = {
    "prediction": "v",
    "schedule_sampler": "log-normal",
    "loss_weighting": "edm",
    "batch_size": 32,
    "microbatch": 16,
    "optimizer": "muon",
    "lr": 1.6e-3,
    "lr_warmup_steps": 150,
    "lr_decay": "linear",
    "grad_clip": 1.0,
    "ema_lengths": "0.05,0.1",
}
# What each value of --recipe sets.
RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": {
        **_SMALL,
        "class_cond": True,
        "class_dropout": 0.1,
        "guidance_scale": 2.0,
        "random_flip": True,
    },
    "small": _SMALL,
}


def explain() -> str:
    """What the recipes set, as the end of a help text."""

    def listed(values: dict[str, Any]) -> str:
        return " ".join(f"--{name} {value}" for name, value in values.items())

    more = {name: value for name, value in RECIPES["cifar10"].items() if name not in _SMALL}
    return f"both set {listed(_SMALL)}; cifar10 also sets {listed(more)}"
