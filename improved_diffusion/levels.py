"""The levels of a UNet: how many an image size allows, how wide they are, and which have attention."""

import math

# The channel multipliers of improved-diffusion (32, 64, 256), and similar ones for other sizes.
CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 1, 2, 2, 4, 4),
}
DEFAULT_ATTENTION = "16,8"
MAX_LEVELS = 10
MAX_MULTIPLIER = 64
MAX_ATTENTION_SIDE = 128  # pixels; at 128, attention needs memory for 2^28 numbers per head and image


def channel_multipliers(text: str, image_size: int) -> tuple[int, ...]:
    """The channel multipliers of all levels.

    :param text: numbers separated by commas; empty: chosen by the image size.
    :param image_size: in pixels.
    :raises ValueError: the text is malformed, or the image size does not allow so many levels. The message begins with
        the name of the argument.
    """
    if text:
        multipliers = _integers(text, "channel_mult")
        if len(multipliers) > MAX_LEVELS or max(multipliers) > MAX_MULTIPLIER:
            raise ValueError(
                f"channel_mult: use at most {MAX_LEVELS} levels and multipliers up to {MAX_MULTIPLIER}"
            )
        divisor = 2 ** (len(multipliers) - 1)
        if image_size % divisor:
            raise ValueError(
                f"image_size {image_size}: the {len(multipliers)} levels of the channel multipliers need a multiple "
                f"of {divisor}; try {image_size // divisor * divisor or divisor}, or fewer levels"
            )
        return multipliers
    if image_size in CHANNEL_MULT:
        return CHANNEL_MULT[image_size]
    nearest = min(CHANNEL_MULT, key=lambda size: abs(math.log(size / image_size)))
    halvings = (image_size & -image_size).bit_length() - 1  # how often the size can be divided by 2
    if halvings == 0:
        raise ValueError(
            f"image_size {image_size}: an odd size cannot be halved; try {image_size + 1}, or channel_mult 1"
        )
    # A level of less than 4 pixels would be of no use.
    while halvings > 1 and image_size >> halvings < 4:
        halvings -= 1
    return CHANNEL_MULT[nearest][: halvings + 1]


def attention_factors(text: str, image_size: int, levels: int) -> tuple[int, ...]:
    """The downsampling factors of the levels with attention.

    :param text: resolutions in pixels, separated by commas; resolutions above the image size are ignored.
    :param image_size: in pixels. :param levels: the number of levels.
    :raises ValueError: the text is malformed, or a resolution does not exist or is too large. The message begins with
        the name of the argument.
    """
    sizes = [image_size >> level for level in range(levels)]
    resolutions = _integers(text, "attention_resolutions") if text else ()
    if text == DEFAULT_ATTENTION and any(image_size % r for r in resolutions if r <= image_size):
        resolutions = tuple(size for size in sizes if size <= 16)
    for resolution in resolutions:
        if resolution <= image_size and image_size % resolution:
            raise ValueError(
                f"attention_resolutions {resolution}: does not divide the image size {image_size}; this model "
                f"has the resolutions {', '.join(map(str, sizes))}"
            )
    # The middle of the model, at its lowest resolution, always has attention.
    largest = max([sizes[-1], *(resolution for resolution in resolutions if resolution in sizes)])
    if largest > MAX_ATTENTION_SIDE:
        raise ValueError(
            f"attention_resolutions, channel_mult: attention at {largest}x{largest} pixels needs more memory "
            f"than there is; at most {MAX_ATTENTION_SIDE}x{MAX_ATTENTION_SIDE}"
        )
    return tuple(image_size // resolution for resolution in resolutions if resolution <= image_size)


def check_width(
    image_width: int, height: int, levels: int, attention: tuple[int, ...], patch_size: int = 1
) -> None:
    """Check that a UNet, whose levels are those of its height, can take images of this width.

    :param image_width: in pixels. :param height: in positions, of `patch_size` pixels.
    :param attention: the downsampling factors with attention.
    :raises ValueError: it cannot; the message begins with the name of the argument.
    """
    divisor = patch_size * 2 ** (levels - 1)
    if image_width % divisor:
        raise ValueError(
            f"image_width {image_width}: the {levels} levels of the model need a multiple of {divisor}; try "
            f"{image_width // divisor * divisor or divisor}"
        )
    width = image_width // patch_size
    finest = min([factor for factor in attention if factor < 2**levels] + [2 ** (levels - 1)])
    if (height // finest) * (width // finest) > MAX_ATTENTION_SIDE**2:
        raise ValueError(
            f"image_width {image_width}: attention at {width // finest}x{height // finest} pixels needs more memory "
            f"than there is; at most as much as {MAX_ATTENTION_SIDE}x{MAX_ATTENTION_SIDE}"
        )


def _integers(text: str, name: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{name} {text[:80]!r}: expected positive whole numbers separated by commas")
    return numbers
