"""Feature vectors of images: from the genuine Inception network, another TorchScript network, or the pixels."""

import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F

from improved_diffusion.cpu.workers import Workers
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.evaluation import inception
from improved_diffusion.evaluation.metrics import InceptionScore
from improved_diffusion.progress import Progress

INCEPTION, PIXEL = "inception", "pixel"
PIXEL_SIDE = 16
MAX_FEATURES = 8192  # their covariance takes half a GB


class Extractor(NamedTuple):
    """A function from images, uint8 [n, H, W, 3], to float32 features [n, D].

    `fingerprint` is another one for other features. `classifier`, if any, is the weight [C, D] of the layer that
    turns features into the logits of C classes.
    """

    name: str
    fingerprint: str
    compute: Callable[[np.ndarray], np.ndarray]
    classifier: np.ndarray | None = None

    @property
    def is_inception(self) -> bool:
        """Whether this is the network that defines the FID."""
        return self.fingerprint == inception.SHA256

    def metric(self, name: str) -> str:
        """The name of the metric `name` for these features. Only Inception's Frechet distance is called FID."""
        if not self.is_inception:
            return f"{name}[{self.name}]"
        return name.replace("frechet_distance", "fid").replace("kernel_distance", "kid")


def load_extractor(features: str, inception_weights: str = "") -> Extractor:
    """The extractor of the given name.

    :param features: "inception"; "pixel": the colours of the image, averaged to at most 16x16; or the path of a
        TorchScript file whose module takes uint8 [n, 3, H, W] and returns [n, D]. If it has an argument
        `return_features`, that is set, and the Inception Score is computed with its `output.weight` [C, D].
    :param inception_weights: the file of the Inception network; empty: the one in the cache, downloaded if needed.
    :raises ValueError: there is no such file, or it is of another kind.
    :raises DownloadError: the Inception network could not be downloaded.
    """
    if inception_weights and features != INCEPTION:
        raise ValueError(
            f"inception_weights {inception_weights}, features {features}: contradict each other; leave one of them out"
        )
    if features == PIXEL:
        return Extractor(PIXEL, f"{PIXEL}-{PIXEL_SIDE}", _pixel_features)
    if features == INCEPTION:
        return _load_network(inception.find_inception(inception_weights), "inception_weights")
    path = os.path.abspath(os.path.expanduser(features))
    if not os.path.isfile(path):
        raise ValueError(
            f"features {path}: there is no such file; give inception, pixel or a TorchScript file"
        )
    return _load_network(path, "features")


def extract(
    images: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int,
    score: InceptionScore | None = None,
    doing: str,
) -> Iterator[np.ndarray]:
    """The features of all `images`, in order, in arrays [n, D].

    :param batch_size: images that a core computes at a time.
    :param score: gets the class probabilities of the images, if the extractor has a classifier.
    :param doing: the text of the progress bar.
    :raises ValueError: the extractor does not work on these images.
    """
    workers = Workers(th.get_num_threads())
    at_once = batch_size * workers.count
    with Progress(len(images), 1, doing) as progress:
        for start in range(0, len(images), at_once):
            pixels = images.get(np.arange(start, min(start + at_once, len(images))))
            parts = [pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size)]
            features = np.concatenate(workers.run([partial(extractor.compute, part) for part in parts]))
            if score is not None:
                score.add(_softmax(features @ extractor.classifier.T))
            progress.step(len(pixels))
            progress.finish(len(pixels))
            yield features


def _pixel_features(pixels: np.ndarray) -> np.ndarray:
    x = th.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(x, min(PIXEL_SIDE, x.shape[-1])).flatten(1).numpy()


def _softmax(logits: np.ndarray) -> np.ndarray:
    return th.from_numpy(logits).double().softmax(dim=1).numpy()


def _load_network(path: str, argument: str) -> Extractor:
    """:param argument: of `load_extractor`, which names the file."""
    fingerprint = inception.sha256_of(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = th.jit.load(path, map_location="cpu").eval()
        parameters = [parameter.name for parameter in network.forward.schema.arguments]
    except Exception as error:  # torch raises almost anything here
        # Of a file that is no archive, torch only says what it might be.
        reason = f" ({_reason(error)})" if zipfile.is_zipfile(path) else ""
        raise ValueError(f"{argument} {path}: is not a TorchScript module{reason}") from None
    options = {"return_features": True} if "return_features" in parameters else {}

    def compute(pixels: np.ndarray) -> np.ndarray:
        x = th.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        try:
            with th.inference_mode():
                features = network(x, **options)
        except Exception as error:
            shape = "x".join(map(str, pixels.shape[1:3]))
            raise ValueError(f"{path}: fails on images of {shape} pixels ({_reason(error)})") from None
        if not isinstance(features, th.Tensor) or features.ndim != 2 or len(features) != len(pixels):
            raise ValueError(f"{path}: must turn n images into features of shape [n, D]")
        if features.shape[1] > MAX_FEATURES:
            raise ValueError(f"{path}: {features.shape[1]:,} features are too many; at most {MAX_FEATURES:,}")
        if not features.isfinite().all():
            raise ValueError(f"{path}: computes features that are NaN or infinite")
        return features.float().numpy()

    name = os.path.basename(path).encode("utf-8", "replace").decode()  # what is no text could not be printed
    classifier = network.state_dict().get("output.weight") if options else None
    return Extractor(name, fingerprint, compute, None if classifier is None else classifier.float().numpy())


def _reason(error: Exception) -> str:
    """The last line of an error, which says what is wrong. torch puts a traceback of its own before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
