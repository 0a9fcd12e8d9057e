"""Gradients of a batch: computed in passes, in 16 or 32 bits, and added up in 32 bits."""

from collections.abc import Callable, Sequence

import torch as th
from torch import nn

from improved_diffusion.cpu.optimizer import blocks_of
from improved_diffusion.cpu.workers import ModelCopies
from improved_diffusion.kernels import update
from improved_diffusion.nn import dropout_seeds

LossOf = Callable[[nn.Module], tuple[th.Tensor, dict]]


class Gradients:
    """Computes gradients of `model` as sums over parts of a batch, one pass for each.

    With ``"bf16"`` the passes compute in 16 bits from a copy of the weights; the weights and the sums stay in 32
    (Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740; bfloat16 has the exponents of float32,
    and needs no scaling of the loss).

    Whoever changes the weights has `copies.in_16_bits` follow, as `Optimizer.step` does.

    `values` is the gradient, tensors in the order of the model's parameters. What one pass has computed in 16 bits
    stays so: whoever goes on with it makes 32 bits of it while it is in the caches.
    """

    def __init__(self, model: nn.Module, precision: str):
        self.params = list(model.parameters())
        self.copies = ModelCopies(model, 1, precision)
        self.blocks = blocks_of(self.params)
        self.values: list[th.Tensor] = []

    def compute(self, losses: Sequence[LossOf], masks: Sequence[Sequence[int]]) -> list[dict]:
        """Set the gradient to that of the sum of all `losses`.

        :param losses: for each part of the batch, a function of the model that returns the part's share of the
            loss, a scalar, and whatever else is to be returned.
        :param masks: for each part, the seeds of its images' dropout masks.
        :return: what else each part returned.
        """
        details = []
        for number, part in enumerate(zip(losses, masks)):
            gradient, detail = _differentiate(self.copies.models[0], *part)
            self._add(gradient, first=number == 0)
            details.append(detail)
        return details

    def _add(self, gradient: Sequence[th.Tensor], first: bool) -> None:
        """Add `gradient` to the sum; `first`: let it be that."""
        if first:
            self.values = list(gradient)
            return
        for block in self.blocks:
            # In two steps: adding numbers of different types is several times slower.
            sums = [self.values[i].float() for i in block]
            th._foreach_add_(sums, [gradient[i].float() for i in block])
            for i, value in zip(block, sums):
                self.values[i] = value

    def clear(self) -> None:
        """Make room for activations."""
        self.values = []

    def norm(self) -> float:
        """The norm of the whole gradient."""
        if update.suits(self.values):
            return update.norm(self.values)
        norms = th._foreach_norm(self.values, 2, dtype=th.float32)
        return th.linalg.vector_norm(th.stack(norms)).item()


def _differentiate(
    model: nn.Module, loss_of: LossOf, masks: Sequence[int]
) -> tuple[Sequence[th.Tensor], dict]:
    """The gradient of what `loss_of` makes of `model`, with respect to each parameter."""
    # Also on the way back, for gradient checkpointing evaluates layers again there.
    with dropout_seeds(masks):
        loss, detail = loss_of(model)
        return th.autograd.grad(loss, list(model.parameters())), detail
