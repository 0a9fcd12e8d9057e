"""The statistics of reference images on disk, so that they are computed once for each network."""

import hashlib
import json
import os
from collections.abc import Callable

import numpy as np

from improved_diffusion.data.cache import default_cache_dir
from improved_diffusion.evaluation.metrics import KEPT, Statistics
from improved_diffusion.storage import open_atomic

VERSION = 1  # raise it when statistics are computed differently; older files are then ignored


def cached_statistics(
    key: list[str | int], compute: Callable[[], Statistics], log: Callable[[str], object] = print
) -> Statistics:
    """What `compute` returns: read from the cache if it is there, else computed and stored.

    A damaged file in the cache is replaced.

    :param key: everything that the statistics depend on.
    """
    digest = hashlib.sha256(json.dumps([VERSION, *key]).encode()).hexdigest()[:24]
    path = os.path.join(default_cache_dir(), digest + ".statistics.npz")
    try:
        stored = _read(path)
        log(f"  statistics of {stored.count:,} images from the cache")
        return stored
    except FileNotFoundError:
        pass
    except Exception as error:  # on damaged files, zipfile and NumPy raise almost anything
        log(
            f"  the cached statistics cannot be used and are computed again ({error or type(error).__name__})"
        )
    statistics = compute()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open_atomic(path) as file:
            np.savez(file, **statistics._asdict())
    except OSError as error:
        log(f"  statistics are not cached: {error}")
    return statistics


def _read(path: str) -> Statistics:
    with np.load(path, allow_pickle=False) as arrays:
        stored = Statistics(int(arrays["count"]), arrays["mean"], arrays["covariance"], arrays["kept"])
    size = len(stored.mean)
    if stored.covariance.shape != (size, size) or stored.kept.shape != (min(stored.count, KEPT), size):
        raise ValueError("its arrays contradict each other")
    return stored
