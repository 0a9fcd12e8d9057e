"""Reads sets of images from a folder, an .npz file or the package itself, and describes them in words."""

import hashlib
import os
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import blobfile as bf
import numpy as np
from PIL import Image

from improved_diffusion.cpu.machine import memory_gb
from improved_diffusion.data.batch_stream import BatchStream
from improved_diffusion.data.builtin_images import BUILTIN_COUNT, CLASS_NAMES, builtin_set
from improved_diffusion.data.decode import MAX_ASPECT, fit_image, height_width, is_grey, to_grey
from improved_diffusion.data.folder import classify, fingerprint, read_folder
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.flags import one_line
from improved_diffusion.storage import absolute, is_remote, open_input

BUILTIN = "builtin"
NAMES_SHOWN = 5  # names of skipped files in a summary, for each reason
CLASSES_SHOWN = 12
# An array in an .npz file may have this many bytes, or this many times the size of the file if that is more. Pictures
# are compressed to a tenth at best, zeros to a thousandth.
MAX_UNPACKED = 10**9
MAX_COMPRESSION = 200
MAX_CLASSES = 100_000  # labels in an .npz file must be below it


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int | tuple[int, int],
    class_cond: bool = False,
    deterministic: bool = False,
    random_flip: bool = False,
    seed: int = 0,
    data_workers: int = 0,
    cache_limit_gb: float = 2.0,
    channels: int = 3,
) -> BatchStream:
    """An endless iterator over batches of the images of `data_dir`; see `read_images` and `BatchStream`.

    :raises ValueError: an argument or the data are unusable; the message begins with the argument or the place.
    """
    images = read_images(data_dir, image_size, channels=channels, cache_limit_gb=cache_limit_gb)
    return BatchStream(
        images,
        batch_size,
        class_cond=class_cond,
        deterministic=deterministic,
        random_flip=random_flip,
        seed=seed,
        data_workers=data_workers,
    )


def read_images(
    data_dir: str,
    image_size: int | tuple[int, int],
    *,
    channels: int = 3,
    cache_limit_gb: float = 2.0,
    cache_dir: str | None = None,
    log: Callable[[str], object] = print,
    progress: bool = True,
) -> ImageSet:
    """Read a set of images, scaled and cropped to squares (see `data.decode.fit_image`).

    :param data_dir: one of three. A folder of image files, searched recursively; their names give the classes (see
        `data.folder.classify`). An .npz file, whose images are ``arr_0`` or the first uint8 array [N, H, W, 3 or 1],
        and whose classes, if any, are ``arr_1`` or ``labels``. Or "builtin": pictures that the package draws. The
        folder or file may be a blobfile URL.
    :param image_size: the side of the squares, in pixels; or (height, width) of rectangles.
    :param channels: 3 for colours, 1 for grey; 0: grey if all files are (by their mode, or the shape of the array).
    :param cache_limit_gb: a folder whose pixels take at most this many GB (10^9 bytes) is kept in memory. Images of
        a larger folder are decoded when they are needed. An .npz file is always kept in memory.
    :param cache_dir: where the pixels of a folder are stored for the next start; by default
        `data.cache.default_cache_dir`.
    :param log: called with each line about the cache that a user should see.
    :param progress: whether to show a progress bar, on a terminal.
    :raises ValueError: there are no usable images; the message begins with the place.
    :raises OSError: the folder, or a folder in it, may not be read.
    """
    if not data_dir:
        raise ValueError("unspecified data directory: give a folder of images, an .npz file or builtin")
    if min(height_width(image_size)) < 1:
        raise ValueError(f"image_size {image_size}: must be at least 1")
    if cache_limit_gb < 0:
        raise ValueError(f"cache_limit_gb {cache_limit_gb}: must not be negative")
    if data_dir == BUILTIN:
        return _read_builtin(image_size, channels)
    source = absolute(data_dir)
    if source.lower().endswith(".npz"):
        return _read_npz(source, image_size, channels)
    if not (bf.isdir(source) if is_remote(source) else os.path.isdir(source)):
        problem = "is neither a folder nor an .npz file" if _exists(source) else "does not exist"
        raise ValueError(f"{source} {problem}")

    folder = read_folder(
        source,
        image_size,
        cache_limit_gb=cache_limit_gb,
        cache_dir=cache_dir,
        log=log,
        progress=progress,
    )
    if not folder.files:
        why = "; ".join(f"{len(names)} x {reason}" for reason, names in folder.skipped.items())
        raise ValueError(f"{source} holds no usable image ({why or 'it is empty'})")
    class_names, labels = classify([file.name for file in folder.files])
    channels = channels or (1 if all(map(is_grey, folder.modes)) else 3)
    return ImageSet(
        image_size=image_size,
        channels=channels,
        images=_with_channels(folder.images, channels),
        files=None if folder.images is not None else folder.files,
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(folder.files),
        summary=_summary(source, folder.sizes, folder.modes, folder.skipped, folder.cached),
    )


def describe(images: ImageSet) -> str:
    """A few lines of text about the images: their number, place, sizes, classes, and the files that were skipped."""
    about = images.summary
    megabytes = about["bytes"] / 1e6
    where = f"{megabytes:,.0f} MB in memory" if images.in_memory else "decoded while they are used"
    cached = ", from the cache" if about["cached"] else ""
    size = _named_size(images.image_size)
    smallest, largest, most_common = (about["sizes"][key] for key in ("min", "max", "most_common"))
    if smallest == largest == size:
        sizes = f"all {size}"
    elif smallest == largest:
        sizes = f"all {smallest}, scaled and cropped to {size}"
    else:
        sizes = f"{smallest} to {largest}, mostly {most_common}, scaled and cropped to {size}"
    lines = [
        f"{about['images']:,} images from {about['source']} ({where}{cached})",
        f"  sizes:   {sizes}",
        f"  modes:   {_counts(about['modes'])}"
        + (", as one channel of grey" if images.channels == 1 else ""),
    ]
    if images.class_names:
        lines.append(f"  classes: {images.num_classes:,} ({_counts(about['classes'], CLASSES_SHOWN)})")
    else:
        lines.append("  classes: none (neither file names nor folders name any)")
    for reason, count in about["skipped"].items():
        names = about["skipped_names"][reason]
        more = ", ..." if count > len(names) else ""
        lines.append(f"  skipped: {count:,} x {reason} ({', '.join(names)}{more})")
    # Names of files and classes may contain invalid text, line ends and control characters of terminals.
    return "\n".join(map(one_line, lines)).encode("utf-8", "replace").decode("utf-8")


def _named_size(image_size: int | tuple[int, int]) -> str:
    """As sizes are named in summaries, the width first."""
    height, width = height_width(image_size)
    return f"{width}x{height}"


def _with_channels(images: np.ndarray | None, channels: int) -> np.ndarray | None:
    """Images [N, S, S, 3] as [N, S, S, `channels`], and None as None."""
    return to_grey(images) if images is not None and channels == 1 else images


def _read_builtin(image_size: int | tuple[int, int], channels: int) -> ImageSet:
    _check_memory(BUILTIN, BUILTIN_COUNT, image_size)
    images, labels = builtin_set(image_size)
    channels = channels or 3
    return ImageSet(
        image_size=image_size,
        channels=channels,
        images=_with_channels(images, channels),
        files=None,
        labels=labels,
        class_names=CLASS_NAMES,
        fingerprint=_hash_arrays(images, labels),
        summary=_summary(BUILTIN, {_named_size(image_size): len(images)}, {"RGB": len(images)}),
    )


def _read_npz(path: str, image_size: int | tuple[int, int], channels: int) -> ImageSet:
    try:
        with open_input(path) as file:
            _check_archive(file)
            with np.load(file, allow_pickle=False) as arrays:
                pixels = _find_images(arrays)
                names = [name for name in ("arr_1", "labels") if name in arrays.files]
                labels = np.asarray(arrays[names[0]]) if names else None
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # for a damaged file, zipfile and NumPy raise exceptions of many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as an .npz file of images: {reason}") from None
    _check_memory(path, len(pixels), image_size)
    class_names = []
    if labels is not None:
        labels = _checked_labels(labels, len(pixels), path)
        class_names = [str(label) for label in range(labels.max() + 1)]
    count, height, width, found = pixels.shape
    channels = channels or found
    hashed = _hash_arrays(pixels) if labels is None else _hash_arrays(pixels, labels)
    return ImageSet(
        image_size=image_size,
        channels=channels,
        images=_with_channels(_fit_all(pixels, image_size), channels),
        files=None,
        labels=labels,
        class_names=class_names,
        fingerprint=hashed,
        summary=_summary(path, {f"{width}x{height}": count}, {"RGB" if found == 3 else "L": count}),
    )


def _check_archive(file: BinaryIO) -> None:
    """Check that `file` is a zip archive, and that its arrays are not larger than pictures can be, before unpacking.

    :raises ValueError: it is not.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no .npz archive")
    file.seek(0, os.SEEK_END)
    length = file.tell()
    with zipfile.ZipFile(file) as archive:
        unpacked = max((member.file_size for member in archive.infolist()), default=0)
    if unpacked > max(MAX_UNPACKED, MAX_COMPRESSION * length):
        raise ValueError(f"{length:,} bytes would unpack to {unpacked:,}, which no pictures do")
    file.seek(0)


def _check_memory(source: str, count: int, image_size: int | tuple[int, int]) -> None:
    """Check that a set of images fits in memory. :raises ValueError: it does not."""
    height, width = height_width(image_size)
    gigabytes, available = count * height * width * 3 / 2**30, memory_gb()
    if available is not None and gigabytes > available:
        raise ValueError(
            f"{source}: {count:,} images of {width}x{height} pixels take {gigabytes:,.0f} GB of "
            f"memory, and this machine has {available:,.0f}; give a smaller image size"
        )


def _find_images(arrays: np.lib.npyio.NpzFile) -> np.ndarray:
    """The array of images, uint8 [N, H, W, 3 or 1]. :raises ValueError: there is none."""
    for name in ["arr_0"] if "arr_0" in arrays.files else arrays.files:
        array = np.asarray(arrays[name])
        if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3) and array.size:
            if max(array.shape[1:3]) > MAX_ASPECT * min(array.shape[1:3]):
                raise ValueError(f"its images are more than {MAX_ASPECT} times as long as wide")
            return array
    raise ValueError("it holds no uint8 array of shape [N, H, W, 3] or [N, H, W, 1]")


def _checked_labels(labels: np.ndarray, count: int, path: str) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: its labels must be {count} whole numbers, one for each image")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise ValueError(f"{path}: its labels must be from 0 to {MAX_CLASSES - 1}")
    return labels.astype(np.int64)


def _fit_all(pixels: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
    """Images uint8 [N, H, W, 3 or 1], scaled and cropped to [N, S, S, 3]."""
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    if pixels.shape[1:3] == height_width(image_size):
        return np.ascontiguousarray(pixels)
    return np.stack([fit_image(Image.fromarray(np.ascontiguousarray(image)), image_size) for image in pixels])


def _summary(
    source: str,
    sizes: dict[str, int],
    modes: dict[str, int],
    skipped: dict[str, list[str]] | None = None,
    cached: bool = False,
) -> dict:
    def area(size: str) -> int:
        width, height = size.split("x")
        return int(width) * int(height)

    skipped = skipped or {}
    return {
        "source": source,
        "sizes": {
            "min": min(sizes, key=area),
            "max": max(sizes, key=area),
            "most_common": max(sizes, key=sizes.get),
        },
        "modes": modes,
        "skipped": {reason: len(names) for reason, names in skipped.items()},
        "skipped_names": {reason: names[:NAMES_SHOWN] for reason, names in skipped.items()},
        "cached": cached,
    }


def _counts(counts: dict[str, int], shown: int = 8) -> str:
    """``a 5, b 3, ...``"""
    parts = [f"{name} {count:,}" for name, count in counts.items()]
    return ", ".join(parts[:shown] + ["..."] * (len(parts) > shown))


def _exists(path: str) -> bool:
    return bf.exists(path) if is_remote(path) else os.path.exists(path)


def _hash_arrays(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
