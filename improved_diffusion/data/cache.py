"""Decoded image sets on disk, so that the second start with the same folder decodes nothing.

A cache file is a line with the CRC-32 of everything after it, a line of JSON, and the pixels as raw bytes.
"""

import hashlib
import json
import os
import sys
import zlib

import numpy as np

from improved_diffusion.storage import open_atomic

VERSION = 1  # raise it when pictures are decoded differently: older caches are then left alone


class UnusableCache(ValueError):
    """A cache file that has to be rebuilt; its message says why."""


def default_cache_dir() -> str:
    """``$IMPROVED_DIFFUSION_CACHE``, or this user's cache folder in the place the platform has for it."""
    chosen = os.environ.get("IMPROVED_DIFFUSION_CACHE")
    if chosen:
        return chosen
    home = os.path.expanduser("~")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.join(home, "AppData", "Local")
    elif sys.platform == "darwin":
        base = os.path.join(home, "Library", "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.path.join(base, "improved_diffusion")


def cache_path(cache_dir: str, source: str, image_size: int, streamed: bool) -> str:
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
