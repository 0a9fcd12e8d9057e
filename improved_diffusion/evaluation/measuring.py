"""Computing the statistics of image features that the metrics need."""

import numpy as np

from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.evaluation.features import Extractor, extract
from improved_diffusion.evaluation.metrics import InceptionScore, Statistics, compare, summarize
from improved_diffusion.evaluation.reference import cached_statistics


def statistics_of(
    images: ImageSet, extractor: Extractor, batch_size: int, doing: str, score: InceptionScore | None = None
) -> Statistics:
    """The statistics of the features of `images`; the arguments are those of `features.extract`."""
    batches = extract(images, extractor, batch_size=batch_size, score=score, doing=doing)
    return summarize(batches, len(images))


def reference_statistics(reference: ImageSet, extractor: Extractor, batch_size: int) -> Statistics:
    """`statistics_of` the reference, computed once for each network."""
    return cached_statistics(
        [reference.fingerprint, reference.image_size, extractor.fingerprint],
        lambda: statistics_of(reference, extractor, batch_size, "measuring the reference"),
    )


def measure(real: Statistics, images: np.ndarray, extractor: Extractor, batch_size: int) -> dict[str, float]:
    """All metrics of `images`, uint8 [N, H, W, 3 or 1], against those with the statistics `real`.

    :return: see `metrics.compare`.
    """
    drawn = ImageSet(
        image_size=images.shape[1:3],
        images=np.broadcast_to(images, (*images.shape[:3], 3)),
        files=None,
        labels=None,
        class_names=[],
        fingerprint="",
        summary={},
    )
    return compare(statistics_of(drawn, extractor, batch_size, "measuring"), real)
