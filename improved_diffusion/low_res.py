"""The low-resolution images that a super-resolution model gets as its second input."""

from collections.abc import Iterator

import torch as th
import torch.nn.functional as F

from improved_diffusion.data.batch_stream import BatchStream


def shrink(images: th.Tensor, size: int) -> th.Tensor:
    """Images [N, C, H, W] reduced to [N, C, size, size]. Each pixel is the mean of the area that it replaces.

    If `size` does not divide H and W, neighbouring areas overlap by up to one pixel.
    """
    return F.interpolate(images, (size, size), mode="area")


class LowResStream:
    """The batches of `stream`, with the same images at `small_size` pixels as the model argument "low_res".

    An endless iterator of (images [N, 3, H, W], dict of model arguments), like `BatchStream` itself.
    """

    def __init__(self, stream: BatchStream, small_size: int):
        self._stream = stream
        self._small_size = small_size

    @property
    def samples(self) -> int:
        """The number of images that were returned so far."""
        return self._stream.samples

    def seek(self, samples: int) -> None:
        """Continue as if `samples` images had been returned."""
        self._stream.seek(samples)

    def __iter__(self) -> Iterator[tuple[th.Tensor, dict[str, th.Tensor]]]:
        return self

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        images, cond = next(self._stream)
        return images, {**cond, "low_res": shrink(images, self._small_size)}
