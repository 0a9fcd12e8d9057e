"""Bits per dimension: how many bits per colour value a model needs, at most, to store an image without loss.

The number is the variational bound (Ho et al. 2020, eq. 5), a sum over all timesteps of the diffusion: the prior's
term, which no model can change, and one term "vb" per timestep.
"""

from collections.abc import Callable, Iterator
from typing import Any

import blobfile as bf
import numpy as np
import torch as th
from tqdm import tqdm

from improved_diffusion import dist_util
from improved_diffusion.data.batch_stream import SampleOrder
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.sample_util import from_uint8, per_image_noise
from improved_diffusion.storage import open_atomic, write_json

TERMS = ("vb", "mse", "xstart_mse")


def choose_images(count: int, size: int) -> np.ndarray:
    """The numbers of `count` different images of a set of `size`, in the order to measure them: int64 [count].

    The order is random and always the same. Most sets are sorted by class, and the first images, however many,
    must represent the whole set.
    """
    assert 0 < count <= size
    return SampleOrder(size, seed=0, deterministic=False, random_flip=False).indices(0, count)


def measure_bounds(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    images: ImageSet,
    numbers: np.ndarray,
    *,
    batch_size: int,
    labels: np.ndarray | None = None,
    clip_denoised: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[dict[str, th.Tensor]]:
    """Measure the bound of the images `numbers`, batch by batch, with one evaluation of the model per timestep.

    The noise of image i is a function of (`seed`, i), so its bound does not depend on `batch_size`, up to
    rounding.

    With several processes each measures its share, `batch_size` images at a time, and rank 0 gets all bounds.

    :param labels: the class of every image of the set, for a class-conditional model.
    :yield: the tensors that `GaussianDiffusion.calc_bpd_loop` returns, for the next `batch_size` images times the
        number of processes; on other ranks than 0, for their share of these.
    """
    starts = range(0, len(numbers), batch_size * dist_util.get_world_size())
    total_bpd = 0.0
    with tqdm(
        total=len(starts) * diffusion.num_timesteps,
        desc="measuring",
        unit="step",
        disable=not progress or dist_util.get_rank() > 0,
    ) as bar:

        def counted(*args: Any, **kwargs: Any) -> th.Tensor:
            bar.update()
            return model(*args, **kwargs)

        for start in starts:
            end = min(start + starts.step, len(numbers))
            mine = dist_util.share(range(start, end))
            # A process without a share measures one image and drops the result.
            batch = numbers[mine.start : mine.stop] if mine else numbers[:1]
            bounds = diffusion.calc_bpd_loop(
                counted,
                from_uint8(images.get(batch)),
                clip_denoised=clip_denoised,
                model_kwargs={} if labels is None else {"y": th.from_numpy(labels[batch])},
                randn_like=per_image_noise(seed, batch.tolist()),
            )
            for name, values in bounds.items():
                bounds[name] = th.from_numpy(dist_util.gather_arrays(values[: len(mine)].numpy()))
            total_bpd += bounds["total_bpd"].sum().item()
            bar.set_postfix_str(f"{total_bpd / end:.4f} bits/dim so far")
            yield bounds


class BoundTally:
    """The bounds of the images measured so far, and the means of their terms."""

    def __init__(self) -> None:
        self.total_bpd = np.zeros(0)
        self.prior_bpd = np.zeros(0)
        self._sums = dict.fromkeys(TERMS, 0.0)

    def add(self, bounds: dict[str, th.Tensor]) -> None:
        """Add the bounds of one batch, as `measure_bounds` yields them."""
        self.total_bpd = np.append(self.total_bpd, bounds["total_bpd"].double().numpy())
        self.prior_bpd = np.append(self.prior_bpd, bounds["prior_bpd"].double().numpy())
        for name in TERMS:
            self._sums[name] = self._sums[name] + bounds[name].double().sum(dim=0).numpy()

    def mean_terms(self, name: str) -> np.ndarray:
        """The mean over the images of "vb", "mse" or "xstart_mse" at each timestep, the noisiest first: [T]."""
        return self._sums[name] / len(self.total_bpd)

    @property
    def mean(self) -> float:
        """The mean bound, in bits per dimension."""
        return float(self.total_bpd.mean())

    @property
    def standard_error(self) -> float | None:
        """The standard error of `mean`; None with fewer than two images."""
        count = len(self.total_bpd)
        return float(self.total_bpd.std(ddof=1) / np.sqrt(count)) if count > 1 else None

    def summary(self) -> dict[str, Any]:
        """The mean bound and its parts, by the names that they have in ``nll.json``."""
        return {
            "bits_per_dim": self.mean,
            "standard_error": self.standard_error,
            "prior_bits_per_dim": float(self.prior_bpd.mean()),
            "images": len(self.total_bpd),
        }

    def write(self, out_dir: str, facts: dict[str, Any]) -> None:
        """Write the results so far into `out_dir`, and replace those written before.

        ``<name>_terms.npz`` (arr_0: `mean_terms`) for the three terms, ``bpd.npz`` (total_bpd and prior_bpd,
        [N]), and ``nll.json`` with the mean bound and `facts` about what was measured.
        """
        for name in TERMS:
            with open_atomic(bf.join(out_dir, f"{name}_terms.npz")) as file:
                np.savez(file, self.mean_terms(name))
        with open_atomic(bf.join(out_dir, "bpd.npz")) as file:
            np.savez(file, total_bpd=self.total_bpd, prior_bpd=self.prior_bpd)
        write_json(bf.join(out_dir, "nll.json"), {**self.summary(), **facts})
