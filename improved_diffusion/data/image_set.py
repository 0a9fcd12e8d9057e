"""A set of images to train on: pixels by index, classes, and a summary of its source."""

import itertools
import warnings

import numpy as np

from improved_diffusion.data.decode import UnusableImage, read_image, to_grey
from improved_diffusion.data.folder import ImageFile


class ImageSet:
    """N images of one size S, as uint8, either held in memory or decoded when they are asked for.

    :ivar image_size: S, or (height, width) where the images are not square.
    :ivar channels: C: 1 for grey images, 3 for colours (RGB).
    :ivar in_memory: whether `get` only has to look them up.
    :ivar labels: the class of each image, int64 [N], or None if there are no classes.
    :ivar class_names: the name of each class.
    :ivar fingerprint: a hash of the set's content, whatever its place.
    :ivar summary: what was read, ready for JSON: "source", "images", "bytes" (in memory), "sizes" (of the
        files, "WxH": "min" and "max" by area, "most_common"), "modes" and "classes" (name -> number of
        images), "skipped" (reason -> number of files), "skipped_names" (reason -> the first few) and
        "cached".
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        images: np.ndarray | None,
        files: list[ImageFile] | None,
        labels: np.ndarray | None,
        class_names: list[str],
        fingerprint: str,
        summary: dict,
        channels: int = 3,
    ):
        assert (images is None) != (files is None)
        self.image_size = image_size
        self.channels = channels
        self.in_memory = images is not None
        self.labels = labels
        self.class_names = class_names
        self.fingerprint = fingerprint
        self._images = images
        self._files = files
        counts = np.bincount(labels, minlength=len(class_names)).tolist() if labels is not None else []
        self.summary = summary | {
            "images": len(self),
            "bytes": images.nbytes if images is not None else 0,
            "classes": dict(zip(class_names, counts)),
        }

    def __len__(self) -> int:
        return len(self._files if self._images is None else self._images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(self, indices: np.ndarray) -> "ImageSet":
        """The images `indices`, an integer array, as a set with the same classes, fingerprint and source."""
        return ImageSet(
            image_size=self.image_size,
            channels=self.channels,
            images=None if self._images is None else self._images[indices],
            files=None if self._files is None else [self._files[index] for index in indices],
            labels=None if self.labels is None else self.labels[indices],
            class_names=self.class_names,
            fingerprint=self.fingerprint,
            summary=self.summary,
        )

    def get(self, indices: np.ndarray) -> np.ndarray:
        """The images `indices`, an integer array [B], as a new array: uint8 [B, S, S, C]."""
        if self._images is not None:
            return self._images[indices]
        return np.stack([self._decode(int(index)) for index in indices])

    def _decode(self, index: int) -> np.ndarray:
        """Image `index` of a streamed set or, if its file is damaged, the next good one of its class.

        At the start only the headers were read, and one damaged file must not end days of training.
        """
        label = self.labels[index] if self.labels is not None else None
        following = itertools.chain(range(index, len(self)), range(index))
        alike = (i for i in following if label is None or self.labels[i] == label)
        for candidate in itertools.islice(alike, 100):
            try:
                pixels = read_image(self._files[candidate].path, self.image_size)[0]
            except UnusableImage as error:
                reason = error
                continue
            if candidate != index:
                warnings.warn(f"{self._files[index].path} is {reason}: used the next image", stacklevel=2)
            return to_grey(pixels) if self.channels == 1 else pixels
        raise ValueError(f"cannot read an image any more: {self._files[index].path}: {reason}")
