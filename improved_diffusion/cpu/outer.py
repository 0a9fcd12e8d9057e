"""The outer optimizer of rounds: processes that take several steps each on their own before they meet.

In a round, each of R processes takes K steps with its own optimizer and its own part of the data. At its end, all
continue from the same weights, which the mean change of the round and a momentum of earlier changes decide.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv 2311.08105,
algorithm 1. Without momentum and with a learning rate of 1, it is local SGD (Stich 2018, arXiv 1805.09767): the mean
of the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch as th

LEARNING_RATE = 0.7  # as in DiLoCo, as is Nesterov's momentum
MOMENTUM = 0.9


class Outer:
    """Nesterov's momentum on the weights at the ends of rounds.

    :param params: the parameters, float32, all with the values of the start of a round.
    """

    def __init__(self, params: Sequence[th.Tensor]):
        self.params = [p.detach() for p in params]
        self.start = th.cat([p.flatten() for p in self.params])
        self.momentum = th.zeros_like(self.start)

    def begin(self) -> None:
        """Begin a round at the present weights."""
        th.cat([p.flatten() for p in self.params], out=self.start)

    def change(self) -> th.Tensor:
        """The weights at the start of the round minus the present ones: float32, [number of weights]."""
        return self.start - th.cat([p.flatten() for p in self.params])

    def step(self, change: th.Tensor) -> None:
        """Set the weights to those after the round.

        :param change: the mean of `change()` over all processes. It is overwritten.
        """
        self.momentum.mul_(MOMENTUM).add_(change)
        change.add_(self.momentum, alpha=MOMENTUM)
        self.start.sub_(change, alpha=LEARNING_RATE)
        for p, value in zip(self.params, self.start.split([p.numel() for p in self.params])):
            p.copy_(value.view_as(p))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint between two rounds holds, besides the weights."""
        return {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`. :raises RuntimeError: it belongs to other parameters."""
        self.momentum.copy_(state["momentum"])
