"""Prepare Fashion-MNIST for training: one grey PNG per image, in fashion_train/ and fashion_test/.

    python fashion_mnist.py                       downloads the four official files (31 MB)
    python fashion_mnist.py --files FOLDER        uses copies of yours

70,000 pictures of clothes, 28x28 in shades of grey, in ten classes (Xiao et al. 2017, arXiv 1708.07747; licence: MIT).
A run that was interrupted is finished by the next one. Files of the same names and format, such as those of MNIST,
can be given too, with --class_names. Needs only NumPy, Pillow and tqdm.
"""

import argparse
import gzip
import math
import os
import re
import sys
import zlib

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cifar10 import download, md5_of, prepared_count, write_images

URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
# By folder: the names of images and labels, with the checksums on the data set's own page.
FILES = {
    "fashion_train": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    },
    "fashion_test": {
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
# In the order of the labels; the underscore would end the class in a file's name.
CLASS_NAMES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle-boot"
MAX_BYTES = 200_000_000  # unpacked; the largest official file has 47 million


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Prepare Fashion-MNIST as folders of grey PNG files.")
    parser.add_argument("--files", help="folder with your copies of the four files (default: download them)")
    parser.add_argument("--class_names", default=CLASS_NAMES, help="ten names (default: %(default)s)")
    parser.add_argument(
        "--out_dir",
        default=os.path.dirname(os.path.abspath(__file__)),
        help="where to make fashion_train and fashion_test (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.files, arguments.out_dir, class_names=arguments.class_names)
    except (ValueError, OSError) as error:
        print(f"fashion_mnist.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfashion_mnist.py: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def prepare(
    files: str | None,
    out_dir: str,
    *,
    class_names: str = CLASS_NAMES,
    url: str = URL,
    known: dict[str, dict[str, str]] = FILES,
) -> None:
    """Write the images in the folder `files`, or if it is None in the files at `url`, as PNG files into `out_dir`.

    :param class_names: ten, separated by commas.
    :param known: the names and checksums of the official files.
    :raises ValueError: a file is missing, damaged or something else; the message says what to do.
    :raises OSError: `out_dir` cannot be written.
    """
    names = _check_class_names(class_names)
    out_dir = os.path.abspath(os.path.expanduser(out_dir))
    for split, checksums in known.items():
        folder = os.path.join(out_dir, split)
        if files is not None or not prepared_count(folder):
            os.makedirs(out_dir, exist_ok=True)
            paths = [_find(files, out_dir, name, url, md5) for name, md5 in checksums.items()]
            write_images(folder, *read_split(*paths, classes=len(names)), names)
        print(f"{prepared_count(folder):,} images in {folder}")


def read_split(images_path: str, labels_path: str, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, H, W] and labels [N] of a pair of files. :raises ValueError: they are not what they should be."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: has {len(labels):,} labels for {len(images):,} images")
    if len(labels) and labels.max() >= classes:
        raise ValueError(f"{labels_path}: has the label {labels.max()}, of {classes} classes")
    return images, labels


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """The uint8 array in a file of the format IDX, which may be compressed.

    The format: two zeros, 8 for uint8, the number of dimensions, their sizes in four bytes each, the values.

    :raises ValueError: it is damaged, or no such array.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with (gzip.open if is_gzip else open)(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{path}: is no IDX file of bytes in {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) != start + math.prod(shape) or not math.prod(shape):
        raise ValueError(f"{path}: damaged or incomplete")
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape)


def _find(files: str | None, out_dir: str, name: str, url: str, md5: str) -> str:
    """The path of an official file: the user's, or in `out_dir`, where it is downloaded unless it is there."""
    if files is None:
        path = os.path.join(out_dir, name)
        if not os.path.isfile(path) or md5_of(path) != md5:
            download(url + name, path, md5, "--files FOLDER")
        return path
    path = os.path.join(os.path.expanduser(files), name)
    if not os.path.isfile(path):
        raise ValueError(f"--files {files}: has no {name}")
    if md5_of(path) != md5:
        print(f"warning: {path} is not the official file of Fashion-MNIST; using it anyway")
    return path


def _check_class_names(text: str) -> list[str]:
    names = text.split(",")
    if len(names) != 10 or len({name.lower() for name in names}) != 10:
        raise ValueError(f"--class_names {text}: expected ten names, separated by commas")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", name):
            raise ValueError(f"--class_names {name!r}: use letters, digits and hyphens only")
    return names


if __name__ == "__main__":
    sys.exit(main())
