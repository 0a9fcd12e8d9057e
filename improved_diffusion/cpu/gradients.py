"""Gradients of a batch: computed in passes, in 16 or 32 bits, and added up in 32 bits."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch as th
from torch import nn

from improved_diffusion.cpu.optimizer import blocks_of
from improved_diffusion.cpu.workers import ModelCopies, Workers
from improved_diffusion.kernels import update

SIDE_BY_SIDE = 4  # passes: more would wait for Python, which interprets one of them at a time


class Gradients:
    """Computes gradients of `model` as sums over parts of a batch, one pass for each.

    With ``"bf16"`` the passes compute in 16 bits from a copy of the weights; the weights and the sums stay in 32
    (Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740; bfloat16 has the exponents of float32,
    and needs no scaling of the loss). After an update, `copies.in_16_bits` must follow the weights, as
    `Optimizer.step` lets them.

    One thread computes a pass from beginning to end, and the threads meet once, when all passes are done. Neither
    where the passes run nor in which order they end changes a bit of the result: they are added up in their order.

    The gradient is the sum of `values` and `more` (empty after a single pass), tensors in the order of the
    model's parameters. What a pass has computed in 16 bits stays in 16 bits until the optimizer has it in the caches.

    :param workers: the threads that run the passes; by default one, with one core.
    """

    def __init__(self, model: nn.Module, precision: str, workers: Workers | None = None):
        self.workers = workers or Workers(1)
        self.copies = ModelCopies(model, self.workers.count, precision)
        self.params = list(model.parameters())
        self.blocks = blocks_of(self.params)
        self._idle: SimpleQueue[nn.Module] = SimpleQueue()
        for copy in self.copies.models:
            self._idle.put(copy)
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begin anew, and make room for activations."""
        self.values: list[th.Tensor] = []
        self.more: list[th.Tensor] = []
        self._waiting: dict[int, Sequence[th.Tensor]] = {}  # passes that ended before an earlier one
        self._added = 0

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """A model to compute a pass with, which no other thread uses meanwhile."""
        copy = self._idle.get()
        try:
            yield copy
        finally:
            self._idle.put(copy)

    def add(self, loss: th.Tensor, model: nn.Module, number: int) -> None:
        """Add the gradient of pass `number`, counted from 0 since `clear`.

        :param loss: a scalar that was computed with `model`.
        """
        parameters = list(model.parameters())
        # Here, and not in the update, because here each core does it for its own pass.
        gradient = update.in_order(th.autograd.grad(loss, parameters), parameters)
        with self._lock:
            self._waiting[number] = gradient
            while self._added in self._waiting:
                self._append(self._waiting.pop(self._added))
                self._added += 1

    def _append(self, gradient: Sequence[th.Tensor]) -> None:
        if not self.values:
            self.values = list(gradient)
            return
        self._merge()
        self.more = list(gradient)

    def _merge(self) -> None:
        """Add `more` to `values`."""
        for block in self.blocks if self.more else []:
            # In two steps: adding numbers of different types is several times slower.
            sums = [self.values[i].float() for i in block]
            th._foreach_add_(sums, [self.more[i].float() for i in block])
            for i, value in zip(block, sums):
                self.values[i] = value
        self.more = []

    def total(self) -> list[th.Tensor]:
        """The whole gradient in one part: `values`, to which `more` has been added."""
        self._merge()
        return self.values

    def norm(self) -> float:
        """The norm of the whole gradient."""
        if update.suits([*self.values, *self.more]):
            return update.norm(self.values, self.more, self.workers.run)
        norms = th._foreach_norm(self.total(), 2, dtype=th.float32)
        return th.linalg.vector_norm(th.stack(norms)).item()


@dataclass(frozen=True)
class Passes:
    """How a batch is cut: passes of `length` images, `side_by_side` of them at a time, each on `cores` cores."""

    side_by_side: int
    cores: int
    length: int

    def slices(self, size: int) -> list[slice]:
        """The parts of a batch of `size` images."""
        return [slice(start, min(start + self.length, size)) for start in range(0, size, self.length)]


def plan_passes(size: int, microbatch: int, cores: int) -> Passes:
    """How to cut a batch of `size` images for `cores` cores, of which each takes at most `microbatch` images.

    A pass on one core waits for nobody: when another program takes a core, only that core's share is late. A pass on
    several cores stands still at each of its hundreds of operations until the last core is done.
    """
    side_by_side = max(range(1, min(cores, SIDE_BY_SIDE, size) + 1), key=lambda n: (n * (cores // n), n))
    threads = cores // side_by_side
    return Passes(side_by_side, threads, min(microbatch * threads, -(-size // side_by_side)))
