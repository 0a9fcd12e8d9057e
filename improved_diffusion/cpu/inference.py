"""Evaluating a trained model fast: the batch split over the cores, in 16 or 32 bits, without gradients."""

from collections.abc import Callable, Sequence
from functools import partial

import torch as th
from torch import nn

from improved_diffusion.cpu.workers import ModelCopies, Workers

# Matrix products of fewer rows are computed by other algorithms, which round differently. With this many, most
# processors compute an image alike in any batch; on the rest, batches of different sizes differ by rounding.
MIN_SLICE = 4


def fast_model(
    model: nn.Module, precision: str, num_workers: int, weights: Sequence[th.Tensor] | None = None
) -> Callable[..., th.Tensor]:
    """`model` as a function on float32 images that splits a batch over `num_workers` cores.

    It computes in `precision`, ``"fp32"`` or ``"bf16"``, with the weights as they are now, in eval mode.

    :param weights: tensors to take instead of the model's parameters, in their order, such as a moving average.
    """
    workers = Workers(num_workers)
    copies = ModelCopies(model, num_workers, precision, weights)
    for replica in copies.models:
        replica.eval()

    def evaluate(replica: nn.Module, part: dict[str, th.Tensor]) -> th.Tensor:
        with th.no_grad():
            return replica(**part).float()

    def split(x: th.Tensor, timesteps: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        count = len(x)
        batch = {"x": x, "timesteps": timesteps, **kwargs}
        if count < MIN_SLICE:
            filled = th.arange(MIN_SLICE) % count
            batch = {key: value[filled] for key, value in batch.items()}
        slices = max(1, min(num_workers, count // MIN_SLICE))
        parts = zip(*(value.tensor_split(slices) for value in batch.values()))
        tasks = [
            partial(evaluate, replica, dict(zip(batch, part))) for replica, part in zip(copies.models, parts)
        ]
        return th.cat(workers.run(tasks))[:count]

    return split
