"""The endless stream of training batches: the order of the images, their flips, and pixels as numbers in [-1, 1].

The stream is a function of (seed, position): position p, counted from the start of training, always holds the
same image with the same flip. So neither a restart, nor the number of workers, nor the number of processes
that share a batch changes what is trained on.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.util import Finalize

import numpy as np
import torch as th
from torch.utils.data import DataLoader, Dataset

from improved_diffusion.data.image_set import ImageSet

ORDER, FLIPS = 0, 1  # the independent random sequences that belong to a seed


class BatchStream:
    """Iterate for ever over (x, cond): x float32 [B, 3, S, S] in [-1, 1]; cond {"y": int64 [B]} or {}.

    The set is shown in a new random order every epoch, one epoch after the other without a gap: a batch may
    reach into the next epoch, and a set that is smaller than a batch repeats within it.

    :param images: what to show (see `image_datasets.read_images`).
    :param batch_size: the number of images in the global batch, that of all shards together.
    :param class_cond: give the classes as "y".
    :param deterministic: keep the order of the set instead of shuffling it.
    :param random_flip: mirror each image, left to right, with probability 1/2.
    :param data_workers: processes that decode ahead where the set is not held in memory.
    :param shard: which contiguous slice of every global batch this stream gives, out of `num_shards`; where
        the batch does not divide, sizes differ by one.
    :raises ValueError: a bad argument; the message begins with its name.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        class_cond: bool = False,
        deterministic: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        data_workers: int = 0,
        shard: int = 0,
        num_shards: int = 1,
    ):
        assert 0 <= shard < num_shards
        if batch_size < num_shards:
            raise ValueError(
                f"batch_size {batch_size}: is shared by {num_shards} process(es), "
                "each of which needs at least one image"
            )
        if class_cond and images.labels is None:
            raise ValueError(
                f"class_cond True: needs classes, and the images in {images.summary['source']} have none; "
                "name the files <class>_<anything>.png or put each class into a folder of its own"
            )
        if data_workers < 0:
            raise ValueError(f"data_workers {data_workers}: must not be negative")
        self._images = images
        self._order = SampleOrder(len(images), seed, deterministic, random_flip)
        self._batch_size = batch_size
        self._offset = batch_size * shard // num_shards
        self._share = batch_size * (shard + 1) // num_shards - self._offset
        self._class_cond = class_cond
        self._data_workers = data_workers
        self._samples = 0
        self._loader: Iterator[th.Tensor] | None = None

    @property
    def samples(self) -> int:
        """The number of images given so far, by all shards together."""
        return self._samples

    def seek(self, samples: int) -> None:
        """Continue as if `samples` images had been given: what a resumed run calls."""
        assert samples >= 0
        self._samples = samples
        self._loader = None

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        first = self._samples + self._offset
        pixels = self._read(first)
        cond = {}
        if self._class_cond:
            cond["y"] = th.from_numpy(self._images.labels[self._order.indices(first, self._share)])
        self._samples += self._batch_size
        # In place, and a true division: both keep x bit-equal to float32(pixels) / 127.5 - 1.
        return pixels.float().div_(127.5).sub_(1), cond

    def _read(self, first: int) -> th.Tensor:
        """This shard's pixels, uint8 [B, 3, S, S], from position `first` of the stream on."""
        batches = _Batches(self._images, self._order, self._share)
        if self._images.in_memory:
            return th.from_numpy(batches[first])
        if self._loader is None:
            exiting = multiprocessing.Event()
            Finalize(self, exiting.set, exitpriority=0)
            self._loader = iter(
                DataLoader(
                    batches,
                    batch_size=None,
                    sampler=itertools.count(first, self._batch_size),
                    num_workers=self._data_workers,
                    worker_init_fn=partial(_belong_to_the_main_process, exiting),
                    generator=th.Generator(),  # or it would draw from, and so change, the global generator
                )
            )
        return next(self._loader)


class SampleOrder:
    """Which image is at each position of the stream, and whether it is mirrored there."""

    def __init__(self, num_images: int, seed: int, deterministic: bool, random_flip: bool):
        self._num_images = num_images
        self._seed = seed
        self._deterministic = deterministic
        self._random_flip = random_flip
        self._epoch = -1
        self._permutation = np.arange(num_images)

    def indices(self, first: int, count: int) -> np.ndarray:
        """The images at positions `first` to `first + count - 1`: int64 [count]."""
        epochs, places = np.divmod(np.arange(first, first + count), self._num_images)
        parts = [self._order_of(epoch)[places[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(parts)

    def flips(self, first: int, count: int) -> np.ndarray:
        """Whether to mirror the images at positions `first` to `first + count - 1`: bool [count]."""
        if not self._random_flip:
            return np.zeros(count, dtype=bool)
        # Philox is a function of a counter, and each count gives four words: start at the right one.
        block, skip = divmod(first, 4)
        return _random_words(self._seed, FLIPS, block, skip + count)[skip:] >> 63 == 1

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch and not self._deterministic:
            words = _random_words(self._seed, ORDER, int(epoch) << 64, self._num_images)
            self._permutation = np.argsort(words, kind="stable")
            self._epoch = epoch
        return self._permutation


class _Batches(Dataset):
    """The pixels of a shard's batches, by their first position: what a DataLoader's workers are given."""

    def __init__(self, images: ImageSet, order: SampleOrder, share: int):
        self._images = images
        self._order = order
        self._share = share

    def __getitem__(self, first: int) -> np.ndarray:
        pixels = self._images.get(self._order.indices(first, self._share))
        flips = self._order.flips(first, self._share)
        pixels[flips] = pixels[flips, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _belong_to_the_main_process(exiting: multiprocessing.Event, worker: int) -> None:
    """Let a worker leave signals to the main process, and end with it, however that ends.

    Ctrl-C reaches the whole process group, but the step under way still needs its data. When the main process exits,
    multiprocessing sends its workers SIGTERM and waits for them: only after `exiting` is set does that mean them.
    """

    def on_sigterm(number: int, frame) -> None:
        if exiting.is_set():
            os._exit(0)

    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    # torch looks whether a worker has another parent now; it never has one where a server forked it.
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


def _random_words(seed: int, sequence: int, counter: int, count: int) -> np.ndarray:
    """Uniform uint64 [count]; raw words, because those are the same in every version of NumPy."""
    key = np.array([seed % 2**64, sequence], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
