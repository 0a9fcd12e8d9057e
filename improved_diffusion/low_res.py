"""The low-resolution images that a super-resolution model is shown beside the one it makes."""

from collections.abc import Iterator

import torch as th
import torch.nn.functional as F

from improved_diffusion.data.batch_stream import BatchStream


def shrink(images: th.Tensor, size: int) -> th.Tensor:
    """Images [N, C, H, W] as [N, C, size, size]; each pixel is the mean of those it takes the place of.

    Where the sizes do not divide, the areas that are averaged overlap by up to a pixel.
    """
    return F.interpolate(images, (size, size), mode="area")


class LowResStream:
    """The batches of `stream`, with the same images at `small_size` pixels as the model argument "low_res".

    Like the stream itself it can `seek`, and knows the number of `samples` it has given.
    """

    def __init__(self, stream: BatchStream, small_size: int):
        self._stream = stream
        self._small_size = small_size

    @property
    def samples(self) -> int:
        """The number of images given so far."""
        return self._stream.samples

    def seek(self, samples: int) -> None:
        """Continue as if `samples` images had been given."""
        self._stream.seek(samples)

    def __iter__(self) -> Iterator[tuple[th.Tensor, dict[str, th.Tensor]]]:
        return self

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        images, cond = next(self._stream)
        return images, {**cond, "low_res": shrink(images, self._small_size)}
