"""How close one set of images is to another, computed from feature vectors in double precision.

The memory does not grow with the number of images: means and covariances are sums, and metrics that compare vectors
use at most `KEPT` of them.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KEPT = 10_000  # vectors of a set that are kept for the metrics that compare vectors
BLOCK = 1024  # vectors processed at a time
NEIGHBOURS = 3  # of precision and recall
SEED = 0  # random choices below are the same each time


class Statistics(NamedTuple):
    """The statistics of the N feature vectors, of length D, of a set of images.

    `covariance` is divided by N - 1; `kept` is a random choice of the vectors, in the order of the images.
    """

    count: int
    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D]
    kept: np.ndarray  # float32 [min(N, KEPT), D]


def summarize(batches: Iterable[np.ndarray], count: int, keep: int = KEPT) -> Statistics:
    """The statistics of `count` feature vectors, given as arrays [n, D] of any n.

    Mean and covariance are updated block by block (Chan, Golub & LeVeque 1983, eq. 2.1), so that neither large
    means nor many images lose precision. The blocks do not depend on the arrays' sizes.

    :raises ValueError: fewer than two vectors.
    """
    if count < 2:
        raise ValueError(f"at least 2 images are needed, not {count}")
    chosen = _choose(count, keep)
    kept = mean = scatter = None
    done = 0
    for block in _in_blocks(batches):
        if kept is None:
            size = block.shape[1]
            kept, mean, scatter = (
                np.empty((len(chosen), size), np.float32),
                np.zeros(size),
                np.zeros((size, size)),
            )
        first, last = np.searchsorted(chosen, [done, done + len(block)])
        kept[first:last] = block[chosen[first:last] - done]

        centred = block.astype(np.float64)
        block_mean = centred.mean(axis=0)
        centred -= block_mean
        shift, total = block_mean - mean, done + len(block)
        scatter += centred.T @ centred + np.outer(shift, shift * (done * len(block) / total))
        mean += shift * (len(block) / total)
        done = total
    assert done == count, f"{done} feature vectors, not {count}"
    return Statistics(count, mean, scatter / (count - 1), kept)


def compare(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """All metrics of `samples` against `reference`, by name. The functions below define them.

    Precision and recall compare equal numbers of images, as their paper does; with `NEIGHBOURS` images or fewer there
    are none.
    """
    distance, spread = kernel_distance(samples.kept, reference.kept)
    count = min(len(samples.kept), len(reference.kept))
    found = {
        "frechet_distance": frechet_distance(
            samples.mean, samples.covariance, reference.mean, reference.covariance
        ),
        "kernel_distance": distance,
        "kernel_distance_std": spread,
    }
    if count > NEIGHBOURS:
        found["precision"], found["recall"] = precision_recall(
            *(stats.kept[_choose(len(stats.kept), count)] for stats in (reference, samples))
        )
    return found


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    The trace of (C1 C2)^1/2 is the sum of the singular values of C1^1/2 C2^1/2. These are real, and accurate even
    where the covariances are singular, as with fewer images than features.

    :param mean1: [D]. :param covariance1: symmetric [D, D]; likewise `mean2` and `covariance2`.
    """
    shift = mean1 - mean2
    mixed = np.linalg.svd(_root(covariance1) @ _root(covariance2), compute_uv=False).sum()
    distance = shift @ shift + np.trace(covariance1) + np.trace(covariance2) - 2 * mixed
    return float(max(distance, 0.0))  # by rounding, equal sets can have a distance below zero


def kernel_distance(
    features1: np.ndarray, features2: np.ndarray, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """The squared maximum mean discrepancy for the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4).

    The estimate is unbiased: its mean does not depend on the number of images, and may be negative.

    :param features1: [N, D]; likewise `features2`.
    :return: mean and standard deviation over random subsets of both sets. If neither set is larger than a subset,
        there is only one, and the standard deviation is 0.
    :raises ValueError: a set has fewer than two images.
    """
    size = min(subset_size, len(features1), len(features2))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 images in each set")
    if len(features1) == len(features2) == size:
        subsets = 1
    rng = np.random.default_rng(SEED)
    estimates = []
    for _ in range(subsets):
        x, y = (
            features[rng.choice(len(features), size, replace=False)].astype(np.float64)
            for features in (features1, features2)
        )
        within = sum(kernel.sum() - kernel.trace() for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y)))
        estimates.append(within / (size * (size - 1)) - 2 * _cubic_kernel(x, y).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), exact.

    Each image of a set has a ball around it that reaches to its `neighbours`-th nearest neighbour in the set.

    :param reference: features [N, D] of real images; `samples`: features [M, D] of generated ones.
    :return: precision, the share of samples that lie in the ball of a real image, and recall, the share of
        real images that lie in the ball of a sample.
    :raises ValueError: a set has no more than `neighbours` images.
    """
    if min(len(reference), len(samples)) <= neighbours:
        raise ValueError(f"precision and recall need at least {neighbours + 1} images in each set")
    # This does not change distances, and large means lose no precision.
    centre = reference.mean(axis=0, dtype=np.float64)
    reference_radii = _radii(reference, neighbours, centre)
    sample_radii = _radii(samples, neighbours, centre)
    real_samples, covered = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows in _blocks(len(reference)):
        for columns in _blocks(len(samples)):
            distances = _squared_distances(reference[rows], samples[columns], centre)
            real_samples[columns] |= (distances <= reference_radii[rows, None]).any(axis=0)
            covered[rows] |= (distances <= sample_radii[columns]).any(axis=1)
    return float(real_samples.mean()), float(covered.mean())


class InceptionScore:
    """exp of the mean KL divergence of an image's classes from those of all (Salimans et al. 2016, sec. 4).

    :param count: N, the number of images to come.
    :param splits: number of parts of the set that get a score each. The parts are drawn at random, because image
        files are often sorted by class.
    """

    def __init__(self, count: int, splits: int = 10):
        splits = min(splits, count)
        self._part = np.random.default_rng(SEED).permutation(count) % splits
        self._sizes = np.bincount(self._part, minlength=splits)
        self._entropies = np.zeros(splits)
        self._sums = None
        self._done = 0

    def add(self, probabilities: np.ndarray) -> None:
        """Add the class probabilities, [n, C], of the next n images."""
        probabilities = probabilities.astype(np.float64)
        if self._sums is None:
            self._sums = np.zeros((len(self._sizes), probabilities.shape[1]))
        parts = self._part[self._done : self._done + len(probabilities)]
        members = parts == np.arange(len(self._sizes))[:, None]
        self._sums += members @ probabilities
        self._entropies += members @ _p_log_p(probabilities).sum(axis=1)
        self._done += len(probabilities)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts."""
        assert self._done == len(self._part), f"{self._done} images, not {len(self._part)}"
        marginals = self._sums / self._sizes[:, None]
        scores = np.exp(self._entropies / self._sizes - _p_log_p(marginals).sum(axis=1))
        return float(scores.mean()), float(scores.std())


def _choose(count: int, keep: int) -> np.ndarray:
    """At most `keep` of the numbers below `count`, at random, in ascending order."""
    if keep >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(SEED).choice(count, keep, replace=False))


def _in_blocks(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of all `batches` in arrays of `BLOCK` rows; the last may have fewer."""
    held, rows = [], 0
    for batch in batches:
        while len(batch):
            part, batch = batch[: BLOCK - rows], batch[BLOCK - rows :]
            held.append(part)
            rows += len(part)
            if rows == BLOCK:
                yield np.concatenate(held)
                held, rows = [], 0
    if held:
        yield np.concatenate(held)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    # Rounding turns an eigenvalue of zero into a tiny number, whose square root is not tiny.
    noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    roots = np.sqrt(np.where(values > noise, values, 0.0))
    return (vectors * roots) @ vectors.T


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _squared_distances(a: np.ndarray, b: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """float64 [n, m] from [n, D] and [m, D]."""
    a, b = a - centre, b - centre
    return np.maximum((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T), 0.0)


def _radii(features: np.ndarray, neighbours: int, centre: np.ndarray) -> np.ndarray:
    """The squared distance of each vector to its `neighbours`-th nearest other one: float64 [N]."""
    radii = np.empty(len(features))
    for rows in _blocks(len(features)):
        nearest = np.full((rows.stop - rows.start, neighbours), np.inf)
        for columns in _blocks(len(features)):
            distances = _squared_distances(features[rows], features[columns], centre)
            if rows == columns:
                np.fill_diagonal(distances, np.inf)
            candidates = np.concatenate([nearest, distances], axis=1)
            nearest = np.partition(candidates, neighbours - 1, axis=1)[:, :neighbours]
        radii[rows] = nearest[:, -1]
    return radii


def _p_log_p(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))
