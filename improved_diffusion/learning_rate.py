"""The learning rate as a function of the step: a rise, a constant part, a fall to zero."""

import math

LR_DECAYS = ("none", "linear", "cosine")


def learning_rate(
    step: int,
    lr: float,
    warmup_steps: int = 0,
    anneal_steps: int = 0,
    decay: str = "none",
    decay_share: float = 1.0,
    total_steps: int = 0,
) -> float:
    """The learning rate after `step` updates: a linear rise over `warmup_steps`, then `lr`, then a fall to zero.

    :param anneal_steps: fall linearly from the first step on, over so many (improved-diffusion's way); 0: do not.
    :param decay: "none", "linear", or "cosine" (half a period: slow at first and at last).
    :param decay_share: the last share of `total_steps` over which it falls; 1: from the end of the rise on. With
        less than 1, a run can be prolonged from a checkpoint before its fall.
    """
    if decay != "none":
        start = max(warmup_steps, (1 - decay_share) * total_steps)
        left = min(max((total_steps - step) / (total_steps - start), 0.0), 1.0)
        lr *= left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2
    if warmup_steps:
        lr *= min(1.0, (step + 1) / warmup_steps)
    if anneal_steps:
        lr *= max(0.0, 1 - step / anneal_steps)
    return lr


def check_lr_schedule(
    warmup_steps: int, anneal_steps: int, decay: str, decay_share: float, total_steps: int
) -> None:
    """:raises ValueError: these arguments of `learning_rate` are impossible, or contradict each other."""
    if decay not in LR_DECAYS:
        raise ValueError(f"lr_decay {decay!r}: use one of {', '.join(LR_DECAYS)}")
    if not 0 < decay_share <= 1:
        raise ValueError(f"lr_decay_share {decay_share}: must lie above 0 and not above 1")
    if decay == "none":
        if decay_share != 1:
            raise ValueError(f"lr_decay_share {decay_share}: needs lr_decay linear or cosine")
    elif anneal_steps:
        raise ValueError(
            f"lr_decay {decay}: contradicts lr_anneal_steps {anneal_steps}; leave one of them out"
        )
    elif warmup_steps >= total_steps:
        raise ValueError(
            f"lr_warmup_steps {warmup_steps}: leaves nothing of total_steps {total_steps} for lr_decay {decay}"
        )
