"""Gradients of a batch: computed in passes, in 16 or 32 bits, and added up in 32 bits."""

import torch as th
from torch import nn

from improved_diffusion.cpu.optimizer import blocks_of
from improved_diffusion.cpu.workers import ModelCopies
from improved_diffusion.kernels import update


class Gradients:
    """The gradient of a model, as a sum over parts of a batch, one pass for each.

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

    @property
    def model(self) -> nn.Module:
        """What to compute the losses with."""
        return self.copies.models[0]

    def add(self, loss: th.Tensor) -> None:
        """Add the gradient of `loss`, a scalar computed with `model`, to `values`."""
        gradient = th.autograd.grad(loss, list(self.model.parameters()))
        if not self.values:
            self.values = list(gradient)
            return
        for block in self.blocks:
            # In two steps: adding numbers of different types is several times slower.
            sums = [self.values[i].float() for i in block]
            th._foreach_add_(sums, [gradient[i].float() for i in block])
            for i, value in zip(block, sums):
                self.values[i] = value

    def clear(self) -> None:
        """Begin anew, and make room for activations."""
        self.values = []

    def norm(self) -> float:
        """The norm of the whole gradient."""
        if update.suits(self.values):
            return update.norm(self.values)
        norms = th._foreach_norm(self.values, 2, dtype=th.float32)
        return th.linalg.vector_norm(th.stack(norms)).item()
