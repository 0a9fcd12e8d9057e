"""Gradients of a batch: microbatches side by side on the cores, in 16 or 32 bits, added up in 32 bits."""

from collections.abc import Callable, Sequence
from functools import partial

import torch as th
from torch import nn

from improved_diffusion.nn import dropout_seeds
from improved_diffusion.workers import ModelCopies, Workers


class Gradients:
    """Computes gradients of `model` as sums over parts of a batch, one part per worker at a time.

    The parts are added in their order, whoever computed them, so the number of workers does not change a bit of
    the result. With ``"bf16"`` the passes compute in 16 bits from a copy of the weights; the weights and the sums
    stay in 32 (Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740; bfloat16 has the exponents
    of float32, and needs no scaling of the loss).

    :param model: its parameters' `grad` is what `compute` sets.
    """

    def __init__(self, model: nn.Module, precision: str, workers: Workers):
        self.params = list(model.parameters())
        self.workers = workers
        self.copies = ModelCopies(model, workers.count, precision)
        self.shares = workers.share(self.params)

    def compute(
        self,
        losses: Sequence[Callable[[nn.Module], tuple[th.Tensor, dict]]],
        masks: Sequence[Sequence[int]],
    ) -> list[dict]:
        """Set the gradient to that of the sum of all `losses`.

        :param losses: for each part of the batch, a function of the model that returns the part's share of the
            loss, a scalar, and whatever else is to be returned. It is called in a thread of its own.
        :param masks: for each part, the seeds of its images' dropout masks.
        :return: what else each part returned.
        """
        self.workers.run(partial(self.copies.update, share) for share in self.shares)
        details = []
        count = self.workers.count
        for start in range(0, len(losses), count):
            some = slice(start, start + count)
            parts = zip(self.copies.models, losses[some], masks[some])
            results = self.workers.run(partial(_differentiate, *part) for part in parts)
            details += [detail for _, detail in results]
            gradients = [gradient for gradient, _ in results]
            self.workers.run(partial(self._add, share, gradients, start == 0) for share in self.shares)
        return details

    def _add(
        self, blocks: Sequence[Sequence[int]], gradients: Sequence[Sequence[th.Tensor]], first: bool
    ) -> None:
        """Add up the `gradients` of the parameters in `blocks`; `first`: from zero on."""
        for block in blocks:
            params = [self.params[i] for i in block]
            parts = [[gradient[i] for i in block] for gradient in gradients]
            if first:
                for p, gradient in zip(params, parts.pop(0)):
                    p.grad = gradient.to(p.dtype)
            sums = [p.grad for p in params]
            for part in parts:
                # In two steps: adding numbers of different types is several times slower.
                th._foreach_add_(sums, [g.to(s.dtype) for g, s in zip(part, sums)])

    def clear(self) -> None:
        """Make room for activations."""
        for p in self.params:
            p.grad = None

    def norm(self) -> float:
        """The norm of the whole gradient."""
        norms: list[th.Tensor | None] = [None] * len(self.params)

        def measure(blocks: Sequence[Sequence[int]]) -> None:
            for block in blocks:
                for i, norm in zip(block, th._foreach_norm([self.params[i].grad for i in block])):
                    norms[i] = norm

        self.workers.run(partial(measure, share) for share in self.shares)
        return th.linalg.vector_norm(th.stack(norms)).item()


def _differentiate(
    model: nn.Module, loss_of: Callable[[nn.Module], tuple[th.Tensor, dict]], masks: Sequence[int]
) -> tuple[Sequence[th.Tensor], dict]:
    """The gradient of what `loss_of` makes of `model`, with respect to each parameter."""
    with dropout_seeds(
        masks
    ):  # also on the way back, for gradient checkpointing evaluates layers again there
        loss, detail = loss_of(model)
        return th.autograd.grad(loss, list(model.parameters())), detail
