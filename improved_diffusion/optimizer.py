"""AdamW and the moving averages of the weights: every worker updates a share of the parameters."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch as th
from torch import nn
from torch.optim import AdamW

from improved_diffusion.nn import update_ema
from improved_diffusion.workers import Workers


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), with the state of `torch.optim.AdamW`.

    Its time goes into moving numbers between memory and cores, so each is fetched once for all that is done to it.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, weight_decay: float, workers: Workers):
        self.params = list(params)
        self.workers = workers
        self.shares = workers.share(self.params)
        self._adamw = AdamW(self.params, lr=lr, weight_decay=weight_decay, fused=True)
        for p in self.params:
            self._adamw.state[p] = {
                "step": th.zeros(()),
                "exp_avg": th.zeros_like(p),
                "exp_avg_sq": th.zeros_like(p),
            }

    def step(self, lr: float, averages: Sequence[tuple[Sequence[th.Tensor], float]]) -> None:
        """Update the parameters by their `grad`, then the moving averages by them.

        :param lr: the learning rate.
        :param averages: of each moving average, the tensors, in the order of the parameters, and the decay.
        """
        self._adamw.param_groups[0]["lr"] = lr
        self.workers.run(partial(self._update, share, averages) for share in self.shares)

    @th.no_grad()
    def _update(
        self, blocks: Sequence[Sequence[int]], averages: Sequence[tuple[Sequence[th.Tensor], float]]
    ) -> None:
        group = self._adamw.param_groups[0]
        for block in blocks:
            params = [self.params[i] for i in block]
            states = [self._adamw.state[p] for p in params]
            steps = [state["step"] for state in states]
            th._foreach_add_(steps, 1)
            th._fused_adamw_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for tensors, decay in averages:
                update_ema([tensors[i] for i in block], params, decay)

    def state_dict(self) -> dict[str, Any]:
        """As that of `torch.optim.AdamW`."""
        return self._adamw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and numbers of steps; the settings stay those of this optimizer.

        :raises ValueError: `state` belongs to other parameters.
        """
        settings = {key: value for key, value in self._adamw.param_groups[0].items() if key != "params"}
        self._adamw.load_state_dict(state)
        self._adamw.param_groups[0].update(settings)

    def state(self, p: nn.Parameter) -> dict[str, th.Tensor]:
        """The moments and the number of steps of parameter `p`."""
        return self._adamw.state[p]
