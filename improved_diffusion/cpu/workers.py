"""Threads that compute side by side, each on cores of its own, and the copies of a model that they compute with."""

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch as th
from torch import nn

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}
Result = TypeVar("Result")


class Workers:
    """`count` threads with a core each, for work that falls into independent parts.

    :param cores: of each thread.
    """

    def __init__(self, count: int, cores: int = 1):
        self.count = count
        # What the workers set becomes the default of every thread that has not set or used its own number yet.
        th.set_num_threads(th.get_num_threads())
        self._pool = ThreadPoolExecutor(count, "worker", initializer=th.set_num_threads, initargs=(cores,))

    def run(self, tasks: Iterable[Callable[[], Result]]) -> list[Result]:
        """Run all `tasks`, at most `count` at a time.

        :return: their results, in order.
        :raises Exception: the first that a task raised, when all have ended.
        """
        futures = [self._pool.submit(task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]


class ModelCopies:
    """Copies of `model` that share one set of weights, and have gradients of their own.

    With ``"bf16"``, that is a set in 16 bits of the weights in the model's `torso` (where it has one, else of all);
    the other weights are the model's own. `in_16_bits` holds, in the order of the parameters, the tensors that have to
    follow when these change, or None.

    :param weights: tensors to take instead of the model's parameters, in their order, such as a moving average.
    """

    def __init__(
        self, model: nn.Module, count: int, precision: str, weights: Sequence[th.Tensor] | None = None
    ):
        own = list(model.parameters())
        sources = [p.detach() for p in own] if weights is None else list(weights)
        torso = {id(p) for part in getattr(model, "torso", [model]) for p in part.parameters()}
        dtype = DTYPES[precision]
        # What differs from its source in type is a copy; the rest is the source itself.
        shared = [source.to(dtype) if id(p) in torso else source for p, source in zip(own, sources)]
        self.in_16_bits = [new if new is not old else None for new, old in zip(shared, sources)]
        self.models = []
        for _ in range(count):
            parameters = {id(p): nn.Parameter(tensor, p.requires_grad) for p, tensor in zip(own, shared)}
            self.models.append(copy.deepcopy(model, parameters))
