"""A folder of images: finding its files, their classes, and decoding them all at once."""

import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import blobfile as bf
import numpy as np
from tqdm import tqdm

from improved_diffusion.cpu.machine import usable_cores
from improved_diffusion.data.cache import (
    UnusableCache,
    cache_path,
    default_cache_dir,
    read_cache,
    write_cache,
)
from improved_diffusion.data.decode import (
    EXTENSIONS,
    UNREADABLE,
    UnusableImage,
    height_width,
    inspect_image,
    read_image,
)
from improved_diffusion.storage import is_remote

CHUNK = 64  # files per task of the decoding threads
FILE, FOLDER, LINKED_FOLDER = "file", "folder", "linked folder"
# Why something in a folder is not read.
OTHER_FILE = "file name has no image extension"
KNOWN_FOLDER = "link to a folder that is read already"
BROKEN_LINK = "link that leads nowhere"
SPECIAL_FILE = "neither a file nor a folder"


class ImageFile(NamedTuple):
    """A file found in a folder.

    `name` is its path relative to that folder, with forward slashes. `size` is in bytes. `modified` is the time of
    the last change, which distinguishes versions of the file: in nanoseconds locally, in seconds remotely.
    """

    name: str
    path: str
    size: int
    modified: float


@dataclass
class Folder:
    """A folder's usable images, and a summary of all its files.

    `images` is uint8 [N, S, S, 3], or None when the set is to be streamed; `sizes` and `modes` count the
    usable files by "<width>x<height>" and Pillow mode; `skipped` names the unusable files by reason.
    """

    files: list[ImageFile]
    images: np.ndarray | None
    sizes: dict[str, int]
    modes: dict[str, int]
    skipped: dict[str, list[str]]
    cached: bool


def read_folder(
    root: str,
    image_size: int | tuple[int, int],
    *,
    cache_limit_gb: float,
    cache_dir: str | None,
    log: Callable[[str], object],
    progress: bool,
) -> Folder:
    """Read all images under `root`, an absolute local path or a blobfile URL.

    A set of at most `cache_limit_gb` (10^9 bytes) is decoded whole; of a larger one only the headers are
    read. Both are remembered in `cache_dir` (default: `default_cache_dir`).

    :raises OSError: the folder itself cannot be read.
    """
    files, others = list_files(root)
    height, width = height_width(image_size)
    streamed = len(files) * height * width * 3 > cache_limit_gb * 1e9
    cache = cache_path(cache_dir or default_cache_dir(), root, image_size, streamed)
    listing = _hash_lines(f"{file.name}\0{file.size}\0{file.modified}" for file in files)
    try:
        info, images = read_cache(cache, listing)
        cached = True
    except (FileNotFoundError, UnusableCache) as error:
        if isinstance(error, UnusableCache):
            log(f"reading {root} again: {error}")
        info, images = _read_files(files, None if streamed else image_size, progress)
        cached = False
        if files and UNREADABLE not in info["skipped"]:
            _try_to_write(cache, listing, info, images, log)
    unusable = {name for names in info["skipped"].values() for name in names}
    skipped = info["skipped"] | others
    return Folder(
        files=[file for file in files if file.name not in unusable],
        images=None if streamed else images,
        sizes=info["sizes"],
        modes=info["modes"],
        skipped=skipped,
        cached=cached,
    )


def list_files(root: str) -> tuple[list[ImageFile], dict[str, list[str]]]:
    """The image files under `root`, recursively and sorted by name, and the names of all others by reason.

    Hidden files and folders (their name starts with a dot) are left out. No folder is read twice: of several ways
    that lead there, one without links is taken, or else the first by name.
    """
    files: list[ImageFile] = []
    skipped: dict[str, list[str]] = {}
    seen: set[tuple | str] = set()
    folders, links = [(root, "")], []
    while folders or links:
        path, prefix = folders.pop() if folders else heapq.heappop(links)[::-1]
        identity = path if is_remote(path) else _identity(path)
        if identity in seen:
            skipped.setdefault(KNOWN_FOLDER, []).append(prefix.rstrip("/"))
            continue
        seen.add(identity)
        for kind, entry in _scan(path):
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if kind == FOLDER:
                folders.append((entry.path, f"{name}/"))
            elif kind == LINKED_FOLDER:
                heapq.heappush(links, (f"{name}/", entry.path))
            elif kind != FILE:
                skipped.setdefault(kind, []).append(name)
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                files.append(entry._replace(name=name))
            else:
                skipped.setdefault(OTHER_FILE, []).append(name)
    return sorted(files), {reason: sorted(names) for reason, names in sorted(skipped.items())}


def classify(names: list[str]) -> tuple[list[str], np.ndarray | None]:
    """Class names, sorted, and the class of each file, int64 [N]; ``([], None)`` if the names give no classes.

    The class is the part of the file's name before the first underscore, where every file has one; otherwise
    the folder that holds it, where every file is in a sub-folder. Prefixes that are all the same
    (``IMG_0001.jpg``) are ignored if the folders differ.
    """
    folders = [name.rpartition("/")[0] for name in names]
    prefixes = [name.rpartition("/")[2].partition("_") for name in names]
    classes = [prefix if underscore else "" for prefix, underscore, _ in prefixes]
    if all(folders) and (not all(classes) or len(set(classes)) == 1 < len(set(folders))):
        classes = folders
    if not all(classes):
        return [], None
    class_names, labels = np.unique(classes, return_inverse=True)
    return class_names.tolist(), labels.astype(np.int64)


def fingerprint(files: list[ImageFile]) -> str:
    """A hash of names and sizes. A copy of the folder has the same hash, a changed folder another."""
    return _hash_lines(f"{file.name}\0{file.size}" for file in files)


def _identity(folder: str) -> tuple | str:
    """What is the same for all paths to a folder."""
    found = os.stat(folder)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)


def _scan(folder: str) -> Iterator[tuple[str, ImageFile]]:
    """The entries of one folder, each after its kind: FILE, FOLDER, LINKED_FOLDER, or the reason why it is none."""
    if is_remote(folder):
        for entry in bf.scandir(folder):
            kind = FOLDER if entry.is_dir else FILE
            size, modified = (0, 0.0) if entry.is_dir else (entry.stat.size, entry.stat.mtime)
            yield kind, ImageFile(entry.name, entry.path, size, modified)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            size, modified = 0, 0
            try:
                if entry.is_dir():
                    kind = LINKED_FOLDER if entry.is_symlink() else FOLDER
                elif entry.is_file():
                    kind, stat = FILE, entry.stat()
                    size, modified = stat.st_size, stat.st_mtime_ns
                else:
                    kind = BROKEN_LINK if entry.is_symlink() else SPECIAL_FILE
            except OSError:  # a link to itself, for example
                kind = BROKEN_LINK
            yield kind, ImageFile(entry.name, entry.path, size, modified)


def _read_files(
    files: list[ImageFile], image_size: int | tuple[int, int] | None, progress: bool
) -> tuple[dict, np.ndarray]:
    """Decode `files` on all processors, or, where `image_size` is None, read their headers only.

    :return: JSON-able sizes, modes and skipped as in `Folder`, and the pixels of the usable files (of none
        where `image_size` is None).
    """
    sides = height_width(image_size or 0)
    images = np.empty((len(files) if image_size else 0, *sides, 3), dtype=np.uint8)

    def read(start: int) -> list[tuple[str, str] | str]:
        """(size, mode) of each file of a chunk, or the reason why it is unusable."""
        results = []
        for index, file in enumerate(files[start : start + CHUNK], start):
            try:
                if image_size:
                    images[index], size, mode = read_image(file.path, image_size)
                else:
                    size, mode = inspect_image(file.path)
                results.append((f"{size[0]}x{size[1]}", mode))
            except UnusableImage as error:
                results.append(str(error))
        return results

    results = []
    executor = ThreadPoolExecutor(max_workers=min(32, usable_cores()))
    bar = tqdm(total=len(files), desc="reading images", unit="img", disable=None if progress else True)
    try:
        for chunk in executor.map(read, range(0, len(files), CHUNK)):
            results += chunk
            bar.update(len(chunk))
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()

    skipped = {}
    for file, result in zip(files, results):
        if isinstance(result, str):
            skipped.setdefault(result, []).append(file.name)
    usable = [result for result in results if not isinstance(result, str)]
    if image_size and skipped:
        images = images[[not isinstance(result, str) for result in results]]
    sizes, modes = Counter(size for size, _ in usable), Counter(mode for _, mode in usable)
    return {"sizes": sizes, "modes": modes, "skipped": skipped}, images


def _try_to_write(cache: str, listing: str, info: dict, images: np.ndarray, log: Callable) -> None:
    try:
        write_cache(cache, listing, info, images)
    except OSError as error:
        log(f"the decoded images could not be cached, so the next start decodes them again: {error}")


def _hash_lines(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    # File names that are not valid text reach Python as lone surrogates.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
