"""The Inception network that defines the FID: finding, downloading and checking its file."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable

from tqdm import tqdm

from improved_diffusion.data.cache import default_cache_dir
from improved_diffusion.storage import open_atomic, open_input

FILE_NAME = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE_NAME}"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
TIMEOUT = 15  # seconds, for connecting and for each wait for data
CHUNK = 2**18


class DownloadError(ValueError):
    """The file could not be downloaded, or its checksum is wrong."""


def find_inception(weights: str = "", log: Callable[[str], object] = print) -> str:
    """The path of the file. If it is not in the user's cache yet, it is downloaded there.

    :param weights: the path of the user's own copy; empty: take the one in the cache.
    :raises ValueError: `weights` does not exist or is another file.
    :raises DownloadError: the download failed.
    :raises OSError: the cache cannot be written.
    """
    if weights:
        path = os.path.abspath(os.path.expanduser(weights))
        if not os.path.isfile(path):
            raise ValueError(f"inception_weights {path}: there is no such file")
        if sha256_of(path) != SHA256:
            raise ValueError(
                f"inception_weights {path}: is not {FILE_NAME}, which defines the FID (its SHA-256 differs); download "
                f"it from {URL}, or choose other features"
            )
        return path
    path = os.path.join(default_cache_dir(), FILE_NAME)
    if not os.path.isfile(path) or sha256_of(path) != SHA256:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        log(f"downloading {URL}")
        _download(path)
    return path


def sha256_of(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(path: str) -> None:
    """Download the file. It gets the name `path` only when its checksum is right."""
    digest = hashlib.sha256()
    with open_atomic(path) as file:
        try:
            with urllib.request.urlopen(URL, timeout=TIMEOUT) as response:
                size = response.headers.get("Content-Length")
                with tqdm(total=size and int(size), unit="B", unit_scale=True, desc=FILE_NAME) as bar:
                    while chunk := response.read(CHUNK):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", "") or error
            raise DownloadError(f"{URL} cannot be downloaded ({reason})") from None
        if digest.hexdigest() != SHA256:
            raise DownloadError(f"the download from {URL} is damaged or another file (its SHA-256 differs)")
