"""The learning rate as a function of the step: a linear rise, a constant part, a fall to zero."""

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
    """The learning rate of the update after `step` others.

    :param lr: the learning rate of the constant part.
    :param warmup_steps: the number of steps in which it rises linearly from zero; 0: no rise.
    :param anneal_steps: the number of steps in which it falls linearly to zero, from the first step on, as in
        improved-diffusion; 0: no such fall.
    :param decay: the shape of the fall to zero at `total_steps`: "linear", "cosine" (half a period), or "none".
    :param decay_share: the share of `total_steps`, at their end, in which it falls; 1: it falls from the end of the
        rise on. Below 1, a run can be continued beyond `total_steps` from a checkpoint before the fall.
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
    """Check these arguments of `learning_rate`.

    :raises ValueError: one is out of range, or two contradict each other.
    """
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
