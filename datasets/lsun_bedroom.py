"""Prepare LSUN bedrooms, or any other LSUN category, for training: one square PNG per image.

    python lsun_bedroom.py bedroom_train_lmdb lsun_train

The first argument is the folder with data.mdb that LSUN's download.py leaves after unzipping. A run that was
interrupted is finished by the next one. Needs the package lmdb: pip install "improved_diffusion[lsun]".
"""

import argparse
import io
import os
import sys
from collections.abc import Iterable

from PIL import Image
from tqdm import tqdm

from improved_diffusion.data.decode import MAX_ASPECT, fit_image

MAX_NAMED = 5  # unusable images that are reported one by one


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Prepare an LSUN category as a folder of PNG files.")
    parser.add_argument("--image-size", "--image_size", type=int, default=256, help="side in pixels (256)")
    parser.add_argument("--prefix", default="bedroom", help="beginning of the file names (bedroom)")
    parser.add_argument("lmdb_path", help="folder of an LSUN category, such as bedroom_train_lmdb")
    parser.add_argument("out_dir", help="folder to write the images to")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.lmdb_path, arguments.out_dir, arguments.image_size, arguments.prefix)
    except (ValueError, OSError) as error:
        print(f"lsun_bedroom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlsun_bedroom.py: interrupted; run it again to continue", file=sys.stderr)
        return 130
    return 0


def prepare(lmdb_path: str, out_dir: str, image_size: int = 256, prefix: str = "bedroom") -> None:
    """Write the images of the LMDB folder as ``<prefix>_NNNNNNN.png``, except those that are already there.

    The number is the image's place in the database. Images are scaled so that the shorter side fits, and
    cropped in the centre. Those that cannot be decoded are reported and left out.

    :raises ValueError: an argument is unusable, or the package lmdb is missing; the message says what to do.
    :raises OSError: `out_dir` cannot be written.
    """
    if not 1 <= image_size <= 4096:
        raise ValueError(f"--image-size {image_size}: must be from 1 to 4096")
    if not prefix or os.path.basename(prefix) != prefix:
        raise ValueError(f"--prefix {prefix!r}: must be the beginning of a file name")
    lmdb = _import_lmdb()
    if not os.path.isfile(os.path.join(lmdb_path, "data.mdb")):
        raise ValueError(f"{lmdb_path} is not an LSUN category: there is no data.mdb in it")
    os.makedirs(out_dir, exist_ok=True)
    try:
        with (
            lmdb.open(lmdb_path, readonly=True, lock=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            count = transaction.stat()["entries"]
            unusable = _write_images(transaction.cursor(), count, out_dir, image_size, prefix)
    except lmdb.Error as error:
        raise ValueError(f"{lmdb_path} is damaged: {error}") from None
    print(f"{count - unusable:,} images in {out_dir}" + (f"; {unusable:,} left out" if unusable else ""))


def _import_lmdb():
    try:
        import lmdb
    except ImportError:
        raise ValueError('the package lmdb is missing: pip install "improved_diffusion[lsun]"') from None
    return lmdb


def _write_images(
    entries: Iterable[tuple[bytes, bytes]], count: int, out_dir: str, image_size: int, prefix: str
) -> int:
    """Write the images of all (key, encoded image). :return: the number of those that cannot be decoded."""
    existing = set(os.listdir(out_dir))
    unusable = 0
    bar = tqdm(entries, total=count, desc=prefix, unit="img")
    for index, (key, content) in enumerate(bar):
        name = f"{prefix}_{index:07d}.png"
        if name in existing:
            continue
        try:
            image = _decode(content, image_size)
        except Exception as error:  # Pillow's decoders raise almost anything on damaged images
            unusable += 1
            if unusable <= MAX_NAMED:
                bar.write(f"left out image {index} ({key.decode('ascii', 'replace')}): {error}")
            continue
        # Complete or not at all: a later run must find only whole pictures under their names.
        temporary = os.path.join(out_dir, ".part")
        image.save(temporary, format="png")
        os.replace(temporary, os.path.join(out_dir, name))
    return unusable


def _decode(content: bytes, image_size: int) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ValueError(f"it is more than {MAX_ASPECT} times as long as wide")
        return Image.fromarray(fit_image(image.convert("RGB"), image_size))


if __name__ == "__main__":
    sys.exit(main())
