"""Threads that compute at the same time, each on its own cores, and the copies of a model that they use."""

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch as th
from torch import nn

DTYPES = {"fp32": th.float32, "bf16": th.bfloat16}
Result = TypeVar("Result")


class Workers:
    """`count` threads with `cores` cores each, for tasks that do not depend on each other."""

    def __init__(self, count: int, cores: int = 1):
        self.count = count
        # A thread that has never set its number of cores takes the last number that any thread has set. So this
        # thread sets its own before the workers set theirs.
        th.set_num_threads(th.get_num_threads())
        self._pool = ThreadPoolExecutor(count, "worker", initializer=th.set_num_threads, initargs=(cores,))

    def run(self, tasks: Iterable[Callable[[], Result]]) -> list[Result]:
        """Run all `tasks`, at most `count` at a time.

        :return: their results, in the order of the tasks.
        :raises Exception: after all tasks have ended, the exception of the first task that raised one.
        """
        futures = [self._pool.submit(task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]


class ModelCopies:
    """`count` copies of `model` that share their weights but not their gradients.

    With ``"fp32"``, the weights are those of the model. With ``"bf16"``, the weights of the model's `torso` (or all, if
    it has none) are replaced by bfloat16 copies.

    :param weights: tensors to use instead of the model's parameters, in their order, such as a moving average.
    :ivar models: the copies.
    :ivar in_16_bits: for each parameter, its bfloat16 copy, or None. The copies do not follow later updates by
        themselves.
    """

    def __init__(
        self, model: nn.Module, count: int, precision: str, weights: Sequence[th.Tensor] | None = None
    ):
        own = list(model.parameters())
        sources = [p.detach() for p in own] if weights is None else list(weights)
        torso = {id(p) for part in getattr(model, "torso", [model]) for p in part.parameters()}
        dtype = DTYPES[precision]
        # `to` copies only where the type changes; elsewhere it returns the source itself.
        shared = [source.to(dtype) if id(p) in torso else source for p, source in zip(own, sources)]
        self.in_16_bits = [new if new is not old else None for new, old in zip(shared, sources)]
        self.models = []
        for _ in range(count):
            parameters = {id(p): nn.Parameter(tensor, p.requires_grad) for p, tensor in zip(own, shared)}
            self.models.append(copy.deepcopy(model, parameters))
