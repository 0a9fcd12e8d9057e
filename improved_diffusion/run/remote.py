"""Runs whose --log_dir is a URL: they work in a local folder, a mirror of the remote one.

Tables grow line by line, and objects in a cloud do not. So everything there is fetched when a run starts, and
whatever has changed is copied back after each checkpoint and at the end. Between two checkpoints the cloud is
behind, and what an abrupt end leaves there is the last checkpoint, from which the run goes on.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import blobfile as bf

from improved_diffusion import logger
from improved_diffusion.run import checkpoint
from improved_diffusion.storage import is_remote

PICTURES = (
    "samples"  # the folder, within that of a run, for what it draws on the way; the workbook shows them
)


@contextlib.contextmanager
def working_folder(log_dir: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """The local folder in which the run `log_dir` works, and a function that brings `log_dir` up to date.

    For a local `log_dir` this is itself, and the function does nothing. That function never fails: what cannot
    be copied is reported and tried again the next time, at the latest when the block ends.

    :raises OSError: `log_dir` cannot be read, or is not up to date in the end; the message then names the
        folder, which is kept.
    """
    if not is_remote(log_dir):
        yield log_dir, lambda: None
        return
    folder = tempfile.mkdtemp(prefix="improved_diffusion-")
    mirror = _Mirror(folder, log_dir)
    try:
        mirror.fetch()
    except Exception as error:  # blobfile has errors of its own besides OSError
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"{log_dir}: cannot be read ({error})") from error
    try:
        yield folder, mirror.publish_or_warn
    finally:
        logger.close()  # its files are about to be deleted
        try:
            mirror.publish()
        except Exception as error:
            raise OSError(
                f"{log_dir}: could not be brought up to date ({error}); everything is in {folder}"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)


class _Mirror:
    """A local folder and the remote one that is to be the same; within them, only the folder `PICTURES` takes part.

    Files are known by their path in there, with "/" on every system.
    """

    def __init__(self, folder: str, url: str):
        self.folder = folder
        self.url = url
        # The size and the time of each file when it was copied.
        self.published: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Copy everything from the remote folder, which need not exist."""
        for part in ("", PICTURES):
            source, target = bf.join(self.url, part) if part else self.url, os.path.join(self.folder, part)
            if not bf.isdir(source):
                continue
            os.makedirs(target, exist_ok=True)
            for entry in bf.scandir(source):
                if entry.is_file:
                    bf.copy(entry.path, os.path.join(target, entry.name))
        self.published = self._present()

    def publish(self) -> None:
        """Make the remote folder like the local one.

        A checkpoint's state file, which makes it complete, comes last of the new files and goes first of those
        that are no more, so that there is a complete checkpoint all the time.
        """
        present = self._present()
        for name in sorted(present, key=_is_state):
            if self.published.get(name) != present[name]:
                bf.copy(os.path.join(self.folder, name), bf.join(self.url, name), overwrite=True)
                self.published[name] = present[name]
        for name in sorted(self.published.keys() - present.keys(), key=_is_state, reverse=True):
            bf.remove(bf.join(self.url, name))
            del self.published[name]

    def publish_or_warn(self) -> None:
        """As `publish`, except that a failure is no reason to stop a run."""
        try:
            self.publish()
        except Exception as error:
            logger.log(
                f"WARNING: {self.url} is not up to date ({error}); tried again after the next checkpoint"
            )

    def _present(self) -> dict[str, tuple[int, int]]:
        found = {}
        for part in ("", PICTURES):
            folder = os.path.join(self.folder, part)
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                path = os.path.join(folder, name)
                if os.path.isfile(path) and not name.startswith("."):
                    stat = os.stat(path)
                    found[f"{part}/{name}" if part else name] = (stat.st_size, stat.st_mtime_ns)
        return found


def _is_state(name: str) -> bool:
    return checkpoint.kind_of(name) == "state"
