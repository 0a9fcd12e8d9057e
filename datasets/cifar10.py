"""Prepare CIFAR-10 for training: one PNG per image, in cifar_train/ and cifar_test/.

    python cifar10.py                                        downloads the official archive (170 MB)
    python cifar10.py --archive cifar-10-python.tar.gz       uses a copy of yours

A run that was interrupted is finished by the next one. Nothing in the archive's pickles is ever executed.
Needs only NumPy, Pillow and tqdm.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import os
import pickle
import pickletools
import re
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_NAME = "cifar-10-python.tar.gz"
CONNECT_TIMEOUT = 15  # seconds, for connecting and for each wait for data

BATCHES = {
    "cifar_train": ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"],
    "cifar_test": ["test_batch"],
}
META = "batches.meta"
MEMBERS = {META, *BATCHES["cifar_train"], *BATCHES["cifar_test"]}
MAX_MEMBER_BYTES = 64_000_000  # a batch of the official archive has 31 million
MAX_ARCHIVE_BYTES = 500_000_000  # unpacked; the official archive has 186 million
MARKER = ".complete"  # in a finished folder: a text file with the number of its images
NUM_CLASSES = 10


class Cifar(NamedTuple):
    """The archive's content: class names and, per folder, images, uint8 [N, 32, 32, 3], and labels, [N]."""

    class_names: list[str]
    splits: dict[str, tuple[np.ndarray, np.ndarray]]


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Prepare CIFAR-10 as folders of PNG files.")
    parser.add_argument("--archive", help=f"your copy of {ARCHIVE_NAME} (default: download it)")
    parser.add_argument(
        "--out_dir",
        default=os.path.dirname(os.path.abspath(__file__)),
        help="where to make cifar_train and cifar_test (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.archive, arguments.out_dir)
    except (ValueError, OSError) as error:
        print(f"cifar10.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncifar10.py: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def prepare(archive: str | None, out_dir: str, *, url: str = URL, md5: str = MD5) -> None:
    """Write the images of `archive`, or if it is None of the one at `url`, as PNG files into `out_dir`.

    :param md5: the checksum of the official archive.
    :raises ValueError: there is no usable archive; the message says what to do.
    :raises OSError: `out_dir` cannot be written.
    """
    out_dir = os.path.abspath(os.path.expanduser(out_dir))
    folders = {split: os.path.join(out_dir, split) for split in BATCHES}
    if archive is not None or not all(prepared_count(folder) for folder in folders.values()):
        os.makedirs(out_dir, exist_ok=True)
        if archive is None:
            archive = obtain_archive(out_dir, url, md5)
        else:
            warn_of_other_md5(archive, md5)
        cifar = read_archive(archive)
        for split, folder in folders.items():
            write_images(folder, *cifar.splits[split], cifar.class_names)
    for folder in folders.values():
        print(f"{prepared_count(folder):,} images in {folder}")


def prepared_count(folder: str) -> int:
    """The number of images in `folder`, or 0 if it is unfinished or files are missing."""
    try:
        with open(os.path.join(folder, MARKER), encoding="utf-8") as file:
            count = int(file.read())
    except (OSError, ValueError):
        return 0
    return count if len(_existing_images(folder)) == count else 0


def obtain_archive(out_dir: str, url: str, md5: str) -> str:
    """The path of the official archive in `out_dir`. It is downloaded unless an intact one is there.

    :raises ValueError: it cannot be downloaded.
    """
    path = os.path.join(out_dir, ARCHIVE_NAME)
    if os.path.isfile(path):
        if md5_of(path) == md5:
            return path
        print(f"{path} is damaged or incomplete: downloading it again")
    download(url, path, md5)
    return path


def download(url: str, path: str, md5: str, flag: str = "--archive") -> None:
    """Download `url`. The file gets the name `path` only when its checksum is right.

    Until then the data are in ``<path>.part``. The next try continues it if the server allows that.

    :param flag: with which one's own copy can be given instead, for the message.
    :raises ValueError: there is no connection, it broke, or the checksum is wrong.
    """
    part = path + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    print(f"downloading {url}")
    with contextlib.closing(_connect(url, have, flag)) as response:
        resumed = response.status == 206
        if not resumed:
            have = 0
        rest = response.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path)) as bar,
        ):
            for chunk in _chunks(response, url, flag):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and os.path.getsize(part) < total:
        raise ValueError(f"the connection to {url} broke; run this again to continue")
    found = md5_of(part)
    if found != md5:
        os.unlink(part)
        raise ValueError(f"the download from {url} has md5 {found} instead of {md5}: deleted, run this again")
    os.replace(part, path)


def warn_of_other_md5(archive: str, md5: str) -> None:
    """Print a warning when `archive` is not the official one.

    :raises ValueError: it cannot be read.
    """
    try:
        found = md5_of(archive)
    except OSError as error:
        raise ValueError(f"cannot read --archive {archive}: {error.strerror}") from None
    if found != md5:
        print(f"warning: {archive} has md5 {found}, the official archive {md5}; using it anyway")


def read_archive(path: str) -> Cifar:
    """Read and check the CIFAR-10 archive at `path`.

    :raises ValueError: it is damaged, incomplete, or not what it should be.
    """
    contents = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=_Unpacked(file), mode="r|") as archive:
            for member in archive:
                if member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{path} is not CIFAR-10: {member.name} has {member.size:,} bytes")
                name = member.name.rpartition("/")[2]
                if name in MEMBERS and member.isfile():
                    contents[name] = _unpickle(archive.extractfile(member).read(), f"{name} in {path}")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is not a complete .tar.gz archive: {error}") from None
    missing = sorted(MEMBERS - contents.keys())
    if missing:
        raise ValueError(f"{path} is not the CIFAR-10 archive for Python: it lacks {', '.join(missing)}")
    splits = {}
    for split, names in BATCHES.items():
        parts = [_check_batch(contents[name], f"{name} in {path}") for name in names]
        splits[split] = tuple(np.concatenate(arrays) for arrays in zip(*parts))
    return Cifar(_check_class_names(contents[META], f"{META} in {path}"), splits)


def write_images(folder: str, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    """Write `images` as ``<class>_<index>.png`` into `folder`, except those that are already there."""
    os.makedirs(folder, exist_ok=True)
    existing = _existing_images(folder)
    bar = tqdm(zip(images, labels), total=len(images), desc=os.path.basename(folder), unit="img")
    for index, (image, label) in enumerate(bar):
        name = f"{class_names[label]}_{index:05d}.png"
        if name not in existing:
            # Complete or not at all: a later run must find only whole pictures under their names.
            temporary = os.path.join(folder, ".part")
            Image.fromarray(image).save(temporary, format="png")
            os.replace(temporary, os.path.join(folder, name))
    temporary = os.path.join(folder, MARKER + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{len(images)}\n")
    os.replace(temporary, os.path.join(folder, MARKER))


def md5_of(path: str) -> str:
    """The MD5 checksum of the file at `path`, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _existing_images(folder: str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name.endswith(".png") and entry.stat().st_size}


def _connect(url: str, start: int, flag: str) -> http.client.HTTPResponse:
    """An open response with the bytes of `url` from `start` on, or with all of them."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file ends at `start`
            return _connect(url, 0, flag)
        raise _download_error(url, error, flag) from None
    except (OSError, http.client.HTTPException) as error:
        raise _download_error(url, error, flag) from None


def _chunks(response: http.client.HTTPResponse, url: str, flag: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(1 << 18)
        except (OSError, http.client.HTTPException) as error:
            raise _download_error(url, error, flag) from None
        if not chunk:
            return
        yield chunk


def _download_error(url: str, error: Exception, flag: str) -> ValueError:
    return ValueError(
        f"cannot download {url} ({getattr(error, 'reason', None) or error}); "
        f"run this again, or download the file yourself and pass it with {flag}"
    )


class _Unpacked:
    """The bytes of `file`, decompressed if it is a gzip file. Absurdly many raise `tarfile.ReadError`."""

    def __init__(self, file: BinaryIO):
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if is_gzip else file
        self._left = MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes")
        return data


def _empty_array(*_) -> np.ndarray:
    return np.zeros(0, dtype=np.uint8)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Other encodings, such as "hex", enlarge the text, and a pickle could do that again and again.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for dicts of lists, strings, numbers and NumPy arrays. It cannot call anything else."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): None,  # only an argument of `_reconstruct`; it is not called
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return self.ALLOWED[module, name]


def _unpickle(data: bytes, where: str) -> dict:
    try:
        for opcode, argument, position in pickletools.genops(data):
            # Python allocates as many places for objects as the largest object number asks for.
            if opcode.name in ("PUT", "LONG_BINPUT") and argument > position:
                raise pickle.UnpicklingError("it asks for more memory than it has objects")
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is damaged or malicious: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a CIFAR-10 batch")
    return content


def _check_batch(batch: dict, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of a batch."""
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise ValueError(f"{where} has no images: its data must be uint8 [N, 3072]")
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(type(label) is int and 0 <= label < NUM_CLASSES for label in labels)
    ):
        raise ValueError(f"{where} has no labels: each image must have one from 0 to {NUM_CLASSES - 1}")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _check_class_names(meta: dict, where: str) -> list[str]:
    names = meta.get("label_names")
    # They become file names, in which the underscore ends the class.
    if (
        not isinstance(names, list)
        or len(names) != NUM_CLASSES
        or not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9-]{1,40}", name) for name in names)
        or len({name.lower() for name in names}) != NUM_CLASSES
    ):
        raise ValueError(f"{where} must name {NUM_CLASSES} classes, in letters, digits and hyphens")
    return names


if __name__ == "__main__":
    sys.exit(main())
