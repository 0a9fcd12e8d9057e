"""The gradient of a batch: computed in passes, in bfloat16 or float32, and added up in float32."""

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

# Passes at a time; more would wait for the Python interpreter, which runs one thread at a time.
SIDE_BY_SIDE = 4


class Gradients:
    """Computes the gradient of `model` as the sum of passes, one for each part of a batch.

    With ``"bf16"``, the passes use a copy of the weights in bfloat16. Weights and sums stay in float32 (Micikevicius et
    al. 2018, "Mixed Precision Training", arXiv 1710.03740). The range of bfloat16 is that of float32, so the loss needs
    no scaling. After an update, the caller must copy the new weights to `copies.in_16_bits`; `Optimizer.step` does it.

    A pass runs in one thread from beginning to end. The threads wait for each other once a step, after the last pass.
    The passes are added up in the order of their numbers, so the result does not depend on which ends first.

    The gradient is the sum of `values` and, after more than one pass, `more`: tensors in the order of the model's
    parameters. They keep the precision of the passes. The optimizer converts them, block by block, when it reads them.

    :param precision: "fp32" or "bf16".
    :param workers: the threads that run the passes; by default one, with one core.
    """

    def __init__(self, model: nn.Module, precision: str, workers: Workers | None = None):
        self.workers = workers or Workers(1)
        self.copies = ModelCopies(model, self.workers.count, precision)
        self.params = list(model.parameters())
        # Walking through a model takes Python longer than some of its layers take.
        self._parameters = {copy: list(copy.parameters()) for copy in self.copies.models}
        self.blocks = blocks_of(self.params)
        self._idle: SimpleQueue[nn.Module] = SimpleQueue()
        for copy in self.copies.models:
            self._idle.put(copy)
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Drop the gradient, which also frees its memory for activations."""
        self.values: list[th.Tensor] = []
        self.more: list[th.Tensor] = []
        # Gradients of passes that wait for an earlier pass, by number.
        self._waiting: dict[int, Sequence[th.Tensor]] = {}
        self._added = 0

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Lend a copy of the model for a pass. No other thread uses it within the `with` block."""
        copy = self._idle.get()
        try:
            yield copy
        finally:
            self._idle.put(copy)

    def add(self, loss: th.Tensor, model: nn.Module, number: int) -> None:
        """Add the gradient of a pass.

        :param loss: a scalar, computed with `model`.
        :param model: the copy from `self.model()`.
        :param number: the number of the pass, from 0 on since `clear`.
        """
        parameters = self._parameters[model]
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
            # First convert, then add: adding tensors of different types is several times slower.
            sums = [self.values[i].float() for i in block]
            th._foreach_add_(sums, [self.more[i].float() for i in block])
            for i, value in zip(block, sums):
                self.values[i] = value
        self.more = []

    def total(self) -> list[th.Tensor]:
        """Add `more` to `values`, and return `values`: the whole gradient, in the order of the parameters."""
        self._merge()
        return self.values

    def norm(self) -> float:
        """The Euclidean norm of the whole gradient."""
        if update.suits([*self.values, *self.more]):
            return update.norm(self.values, self.more, self.workers.run)
        norms = th._foreach_norm(self.total(), 2, dtype=th.float32)
        return th.linalg.vector_norm(th.stack(norms)).item()


@dataclass(frozen=True)
class Passes:
    """How a batch is cut into passes.

    :ivar side_by_side: passes that run at the same time. :ivar cores: of each pass. :ivar length: images of each pass.
    """

    side_by_side: int
    cores: int
    length: int

    def slices(self, size: int) -> list[slice]:
        """The parts of a batch of `size` images."""
        return [slice(start, min(start + self.length, size)) for start in range(0, size, self.length)]


def plan_passes(size: int, microbatch: int, cores: int) -> Passes:
    """Cut a batch of `size` images for `cores` cores, with at most `microbatch` images per core at a time.

    Passes with one core each are preferred. If another program takes one of the cores, only the passes of that core
    are late. A pass on several cores would wait for the slowest core at each of its hundreds of operations.
    """
    # as many as use the most cores; of several such numbers, the largest
    side_by_side = max(range(1, min(cores, SIDE_BY_SIDE, size) + 1), key=lambda n: (n * (cores // n), n))
    threads = cores // side_by_side
    return Passes(side_by_side, threads, min(microbatch * threads, -(-size // side_by_side)))
