"""Fast evaluation of a trained model: the batch is split over the cores, in bfloat16 or float32, without gradients."""

from collections.abc import Callable, Sequence
from functools import partial

import torch as th
from torch import nn

from improved_diffusion.cpu.workers import ModelCopies, Workers

# With fewer rows, matrix products are computed by other algorithms, which round differently. With at least this many
# images in a slice, most processors give the same result for an image in any batch; others differ by rounding.
MIN_SLICE = 4


def fast_model(
    model: nn.Module, precision: str, num_workers: int, weights: Sequence[th.Tensor] | None = None
) -> Callable[..., th.Tensor]:
    """`model` in eval mode as a function of (x, timesteps, ...) that splits the batch over `num_workers` cores.

    The function returns float32. It uses the weights as they are now; later updates do not reach its bfloat16 copies.

    :param precision: ``"fp32"`` or ``"bf16"``, in which it computes.
    :param weights: tensors to use instead of the model's parameters, in their order, such as a moving average.
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
