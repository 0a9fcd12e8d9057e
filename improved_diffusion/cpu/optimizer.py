"""AdamW or Muon, and the moving averages of the weights, in blocks of parameters that fit in the caches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch as th
from torch import nn
from torch.optim.adamw import adamw

from improved_diffusion.cpu.muon import muon, settings
from improved_diffusion.kernels import update
from improved_diffusion.nn import update_ema

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 2**16  # numbers; the caches hold several times as many


def blocks_of(tensors: Sequence[th.Tensor]) -> list[list[int]]:
    """The indices of `tensors`, in blocks that fit in the caches, so that several operations on a block stay there."""
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

    Memory limits its speed, so it reads every number once for the update, the averages and the copies. (PyTorch's
    `torch.optim.AdamW` does one operation on all parameters after the other, and loads PyTorch's compiler: 66 MB.)

    :param params: the parameters, float32.
    :param run: a function that runs the parts of an update, such as `Workers.run`; by default, one after the other.
    :param matrices: the indices of the parameters that Muon updates (see `muon`); their ``exp_avg`` is its momentum.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        run: update.Run = update.in_turn,
        matrices: Sequence[int] = (),
    ):
        self.params = list(params)
        self.matrices = sorted(matrices, key=lambda i: -self.params[i].numel())
        self.others = [i for i in range(len(self.params)) if i not in self.matrices]
        self.lr = lr
        self.weight_decay = weight_decay
        self.run = run
        self.blocks = [
            [self.others[i] for i in block] for block in blocks_of([self.params[i] for i in self.others])
        ]
        self.counts = th.zeros(len(self.params))
        self.steps = list(self.counts.unbind())  # views of `counts`
        self.moments = {name: [th.zeros_like(p) for p in self.params] for name in MOMENTS}
        for i in self.matrices:
            self.moments["exp_avg_sq"][i] = th.zeros(0)

    @th.no_grad()
    def step(
        self,
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]] = (),
        copies: Sequence[th.Tensor | None] = (),
        factor: float = 1.0,
        more: Sequence[th.Tensor] = (),
    ) -> None:
        """Update the parameters with the learning rate `lr`, then the moving averages and copies.

        All sequences of tensors are in the order of the parameters.

        :param gradient: bfloat16 or float32.
        :param averages: the tensors and the decay of each moving average.
        :param copies: for each parameter, its bfloat16 copy, or None.
        :param factor: the gradient is multiplied by it.
        :param more: a second part of the gradient, which is added to the first; may be empty.
        """
        copies = copies or [None] * len(self.params)
        whole = (gradient, averages, copies, factor, more)
        if self.matrices:
            self.counts[self.matrices] += 1
            self.run([partial(self._step_matrix, i, *whole) for i in self.matrices])
        if not self._step_fused(*whole):
            self.run([partial(self._step_block, block, *whole) for block in self.blocks])

    def _step_fused(
        self,
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]],
        copies: Sequence[th.Tensor | None],
        factor: float,
        more: Sequence[th.Tensor],
    ) -> bool:
        """`step` for the parameters that AdamW updates, by the compiled kernel. :return: whether it could be used."""

        def picked(tensors: Sequence) -> list:
            return [tensors[i] for i in self.others] if tensors else []

        done = update.adamw(
            picked(self.params),
            picked(gradient),
            (picked(self.moments["exp_avg"]), picked(self.moments["exp_avg_sq"])),
            self.counts[self.others] + 1,
            update.AdamWSettings(self.lr, BETAS, EPSILON, self.weight_decay, factor),
            [(picked(tensors), decay) for tensors, decay in averages],
            picked(copies),
            picked(more),
            self.run,
        )
        if done:
            self.counts[self.others] += 1
        return done

    @th.no_grad()
    def _step_matrix(
        self,
        index: int,
        gradient: Sequence[th.Tensor],
        averages: Sequence[tuple[Sequence[th.Tensor], float]],
        copies: Sequence[th.Tensor | None],
        factor: float,
        more: Sequence[th.Tensor],
    ) -> None:
        """`step` for the parameter `index`, which Muon updates."""
        param, momentum = self.params[index], self.moments["exp_avg"][index]
        if update.muon(
            *(param, gradient[index], momentum, settings(param.shape, self.lr, self.weight_decay, factor)),
            [(tensors[index], decay) for tensors, decay in averages],
            copies[index],
            more[index] if more else None,
        ):
            return
        value = gradient[index].to(th.float32, copy=True)
        if more:
            value += more[index]
        value *= factor
        muon(param, value, momentum, self.lr, self.weight_decay)
        self._follow([index], averages, copies)

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
        """`step` for the parameters whose indices are in `block`, with PyTorch's operations."""
        params = [self.params[i] for i in block]
        gradients = [gradient[i].float() for i in block]
        if more:
            gradients = [value + more[i] for value, i in zip(gradients, block)]
        adamw(
            params,
            [value * factor for value in gradients],
            *([self.moments[name][i] for i in block] for name in MOMENTS),
            [],
            [self.steps[i] for i in block],  # adamw increments them
            fused=True,
            lr=self.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=self.weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        self._follow(block, averages, copies)

    def _follow(
        self,
        block: Sequence[int],
        averages: Sequence[tuple[Sequence[th.Tensor], float]],
        copies: Sequence[th.Tensor | None],
    ) -> None:
        """Update the averages and copies of the parameters whose indices are in `block`."""
        params = [self.params[i] for i in block]
        for tensors, decay in averages:
            update_ema([tensors[i] for i in block], params, decay)
        for i in block:
            if copies[i] is not None:
                copies[i].copy_(self.params[i])

    def state_tensors(self) -> list[th.Tensor]:
        """The tensors that change from step to step, in an order that depends only on the parameters."""
        seconds = [self.moments["exp_avg_sq"][i] for i in self.others]
        return [self.counts, *self.moments["exp_avg"], *seconds]

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of `torch.optim.AdamW`, whose `load_state_dict` can read it."""
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
        """Load the moments and step counts from a state of `torch.optim.AdamW`. Its settings are ignored.

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
