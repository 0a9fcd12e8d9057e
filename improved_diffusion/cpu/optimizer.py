"""AdamW and the moving averages of the weights, block by block of the parameters."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch as th
from torch import nn
from torch.optim.adamw import adamw

from improved_diffusion.kernels import update
from improved_diffusion.nn import update_ema

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 2**16  # numbers, of which the caches hold several times as many


def blocks_of(tensors: Sequence[th.Tensor]) -> list[list[int]]:
    """The indices of `tensors` in blocks: what is done to a block step by step finds it in the caches again."""
    blocks: list[list[int]] = [[]]
    size = 0
    for index in sorted(range(len(tensors)), key=lambda i: -tensors[i].numel()):
        if size >= BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(index)
        size += tensors[index].numel()
    return blocks


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), with the state of PyTorch's AdamW.

    Its time goes into moving numbers between memory and cores, so each is fetched once for all that is done to
    it. (`torch.optim.AdamW` itself goes through all parameters at once, and loads PyTorch's compiler: 66 MB.)

    :param run: what runs the parts of an update, perhaps side by side, such as `Workers.run`.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, weight_decay: float, run: update.Run = update.in_turn
    ):
        self.params = list(params)
        self.lr = lr
        self.weight_decay = weight_decay
        self.run = run
        self.blocks = blocks_of(self.params)
        self.counts = th.zeros(len(self.params))
        self.steps = list(self.counts.unbind())  # views: they count together
        self.moments = {name: [th.zeros_like(p) for p in self.params] for name in MOMENTS}

    @th.no_grad()
    def step(
        self,
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]] = (),
        copies: Sequence[th.Tensor | None] = (),
        factor: float = 1.0,
        more: Sequence[th.Tensor] = (),
    ) -> None:
        """Update the parameters with learning rate `lr`, then the moving averages and copies by them.

        :param gradient: in the order of the parameters, in 16 or 32 bits.
        :param averages: of each moving average, the tensors, in the order of the parameters, and the decay.
        :param copies: in the order of the parameters, what is to be a copy of them in 16 bits, or None.
        :param factor: what the gradient is multiplied by.
        :param more: a second part of the gradient, to be added to the first, or nothing.
        """
        copies = copies or [None] * len(self.params)
        moments = self.moments["exp_avg"], self.moments["exp_avg_sq"]
        settings = update.AdamWSettings(self.lr, BETAS, EPSILON, self.weight_decay, factor)
        tensors = self.params, gradient, moments, self.counts + 1, settings, averages, copies
        if update.adamw(*tensors, more, self.run):
            self.counts += 1
            return
        whole = (averages, copies, factor, more)
        self.run([partial(self._step_block, block, gradient, *whole) for block in self.blocks])

    @th.no_grad()
    def _step_block(
        self,
        block: Sequence[int],
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]],
        copies: Sequence[th.Tensor | None],
        factor: float,
        more: Sequence[th.Tensor],
    ) -> None:
        """`step` for the parameters whose numbers are in `block`, by operations of PyTorch."""
        params = [self.params[i] for i in block]
        gradients = [gradient[i].float() for i in block]
        if more:
            gradients = [value + more[i] for value, i in zip(gradients, block)]
        adamw(
            params,
            [value * factor for value in gradients],
            *([self.moments[name][i] for i in block] for name in MOMENTS),
            [],
            [self.steps[i] for i in block],  # it counts them
            fused=True,
            lr=self.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        for tensors, decay in averages:
            update_ema([tensors[i] for i in block], params, decay)
        for i in block:
            if copies[i] is not None:
                copies[i].copy_(self.params[i])

    def state_tensors(self) -> list[th.Tensor]:
        """All that changes from step to step, in an order that depends on the parameters alone."""
        return [self.counts, *self.moments["exp_avg"], *self.moments["exp_avg_sq"]]

    def state_dict(self) -> dict[str, Any]:
        """As that of `torch.optim.AdamW` on these parameters, for its `load_state_dict` to read."""
        state = {
            i: {"step": step, **{name: self.moments[name][i] for name in MOMENTS}}
            for i, step in enumerate(self.steps)
        }
        group = {
            "lr": self.lr,
            "betas": BETAS,
            "eps": EPSILON,
            "weight_decay": self.weight_decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
            "params": list(range(len(self.params))),
        }
        return {"state": state, "param_groups": [group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and numbers of steps from a state of `torch.optim.AdamW`, but no settings.

        :raises ValueError: `state` belongs to other parameters.
        """
        entries = state["state"]
        if entries and set(entries) != set(range(len(self.params))):
            raise ValueError(
                f"the optimizer's state is one of {len(entries)} parameters, not {len(self.params)}"
            )
        for i, entry in entries.items():
            for target, name in zip(
                (self.steps[i], *(self.moments[m][i] for m in MOMENTS)), ("step", *MOMENTS)
            ):
                value = th.as_tensor(entry[name])
                if value.numel() != target.numel():
                    raise ValueError(f"the optimizer's {name} of parameter {i} has another shape")
                target.copy_(value.view_as(target))
