"""One image file, of any size and colour mode, as a square of uint8 RGB."""

import contextlib
import threading
from collections.abc import Iterator

import blobfile as bf
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from improved_diffusion.storage import is_remote

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
UNREADABLE = (
    "missing or not readable"  # unlike the other reasons, this one can change while the file stays the same
)
MAX_ASPECT = 1000  # longer ones would be enlarged to gigabytes before their centre is cut out


MAX_PIXELS_IN_FLIGHT = (
    100_000_000  # decoded at a time, by all threads together; of 4 bytes, and copied once or twice
)


class UnusableImage(ValueError):
    """An image file cannot be used. The message is one of few reasons, so that a summary can count them."""


class _Budget:
    """An amount that threads share: who asks for more than is left has to wait."""

    def __init__(self, limit: int):
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Take `amount` meanwhile; more than the limit only when nobody else has taken anything."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


_in_flight = _Budget(MAX_PIXELS_IN_FLIGHT)


def read_image(path: str, image_size: int | tuple[int, int]) -> tuple[np.ndarray, tuple[int, int], str]:
    """Decode the image at `path`, a local path or a blobfile URL, and fit it into a square.

    EXIF orientation is applied, transparency becomes white, 16 bits are scaled to 8, and an animation gives its
    first frame. A picture that already has the right size is not resampled.

    :param image_size: S, or (height, width) for a rectangle.
    :return: pixels, uint8 [S, S, 3]; (width, height) of the file; its Pillow mode, such as "RGB" or "P".
    :raises UnusableImage: with the reason.
    """
    with _opened(path) as image, _in_flight.taken(image.width * image.height):
        size, mode = image.size, image.mode
        image.load()
        return fit_image(_to_rgb(ImageOps.exif_transpose(image)), image_size), size, mode


def inspect_image(path: str) -> tuple[tuple[int, int], str]:
    """(width, height) and Pillow mode of the image at `path`, from its header alone.

    :raises UnusableImage: with the reason.
    """
    with _opened(path) as image:
        return image.size, image.mode


def height_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """The sides of images of this size: a number for squares, or height and width."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def is_grey(mode: str) -> bool:
    """Whether images of a Pillow mode have shades of grey only."""
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels, uint8 [..., 3], as their luma [..., 1] (ITU-R BT.601, as Pillow computes it); grey stays as it is."""
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[..., None]


def fit_image(image: Image.Image, image_size: int | tuple[int, int]) -> np.ndarray:
    """Scale an RGB image until it just covers `image_size`, and cut out the centre: uint8 [S, S, 3].

    A large image is first halved by box filtering as often as possible, then scaled bicubically. Halving uses every
    pixel of a large photograph at a fraction of the cost.

    :param image_size: S, or (height, width).
    """
    height, width = height_width(image_size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image)[top : top + height, left : left + width]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image at `path`, open. Any error inside the block becomes an `UnusableImage`."""
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(bf.BlobFile(path, "rb")) if is_remote(path) else path
            image = stack.enter_context(Image.open(file))
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UnusableImage(f"more than {MAX_ASPECT} times as long as wide")
            yield image
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UnusableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty or not an image"
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return "too many pixels"
    if isinstance(error, OSError) and error.errno:  # the system's errors have a number, Pillow's have none
        return UNREADABLE
    return "damaged or truncated"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which turns nearly all of a 16 bit picture white.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_float(np.asarray(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_float(values: np.ndarray) -> Image.Image:
    """Floats as 8-bit grey. Values are taken as [0, 1] if none exceeds 1, else as [0, 255]."""
    if not np.isfinite(values).all():
        raise UnusableImage("has infinite or undefined pixels")
    scale = 255.0 if values.max() <= 1 else 1.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
