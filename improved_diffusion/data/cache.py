"""Decoded image sets on disk, so that the second start with the same folder decodes nothing.

A cache file is a line with the CRC-32 of everything after it, a line of JSON, and the pixels as raw bytes. Everything
that the package keeps for later lies in the same folder: ``python -m improved_diffusion.data.cache`` lists it, and with
``delete`` deletes it.
"""

import hashlib
import json
import os
import sys
import zlib

import numpy as np
from platformdirs import user_cache_dir

from improved_diffusion.storage import open_atomic

VERSION = 1  # raise it when pictures are decoded differently; older caches are then ignored


class UnusableCache(ValueError):
    """A cache file cannot be used and must be written again; the message says why."""


def default_cache_dir() -> str:
    """``$IMPROVED_DIFFUSION_CACHE``, or this user's cache folder in the place the platform has for it."""
    return os.environ.get("IMPROVED_DIFFUSION_CACHE") or user_cache_dir("improved_diffusion", appauthor=False)


def cache_path(cache_dir: str, source: str, image_size: int | tuple[int, int], streamed: bool) -> str:
    """The file in `cache_dir` for the folder with absolute path `source` read in this way."""
    key = json.dumps([VERSION, source, image_size, streamed])
    return os.path.join(cache_dir, hashlib.sha256(key.encode()).hexdigest()[:24] + ".images")


def write_cache(path: str, listing: str, info: dict, images: np.ndarray) -> None:
    """Store `images` and JSON-able `info` about them, for the folder whose list of files has hash `listing`.

    :raises OSError: the folder of `path` cannot be made or written, or is full.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    header = json.dumps({"listing": listing, "shape": images.shape, "info": info}).encode() + b"\n"
    pixels = np.ascontiguousarray(images).reshape(-1)
    checksum = zlib.crc32(pixels, zlib.crc32(header))
    with open_atomic(path) as file:
        file.write(b"%08x\n" % checksum)
        file.write(header)
        file.write(pixels)


def read_cache(path: str, listing: str) -> tuple[dict, np.ndarray]:
    """What `write_cache` stored at `path`: info and images.

    :raises FileNotFoundError: there is no such cache yet.
    :raises UnusableCache: it is damaged, or belongs to another `listing` than this one.
    """
    try:
        with open(path, "rb") as file:
            checksum, header = file.readline(), file.readline()
            pixels = np.fromfile(file, dtype=np.uint8)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableCache(f"its cache cannot be read ({error})") from error
    if checksum != b"%08x\n" % zlib.crc32(pixels, zlib.crc32(header)):
        raise UnusableCache("its cache is damaged")
    stored = json.loads(header)
    if stored["listing"] != listing:
        raise UnusableCache("its files have changed")
    return stored["info"], pixels.reshape(stored["shape"])


def list_cache(cache_dir: str) -> list[tuple[str, int, str]]:
    """The files of the package in `cache_dir`: path, size in bytes, and what each is."""
    kinds = {
        ".images": "decoded images of a folder",
        ".statistics.npz": "statistics of reference images",
        ".pt": "network for image_eval.py",
    }
    found = []
    for name in sorted(os.listdir(cache_dir)) if os.path.isdir(cache_dir) else []:
        path = os.path.join(cache_dir, name)
        what = next((what for end, what in kinds.items() if name.endswith(end)), "")
        if what:
            found.append((path, os.path.getsize(path), what))
    return found


def main(arguments: list[str]) -> None:
    """List what lies in the cache, or delete it. Whatever is deleted is computed or downloaded again when needed."""
    if arguments not in ([], ["delete"]):
        sys.exit("usage: python -m improved_diffusion.data.cache [delete]")
    cache_dir = default_cache_dir()
    files = list_cache(cache_dir)
    for path, size, what in files:
        print(f"{size / 1e6:10,.1f} MB  {os.path.basename(path)}  {what}")
        if arguments:
            os.remove(path)
    done = "deleted from" if arguments else "in"
    print(f"{sum(size for _, size, _ in files) / 1e6:10,.1f} MB {done} {cache_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
