"""Runs in cloud storage. They work in a local folder, which is copied to the remote directory now and then.

Cloud storage has no files that grow line by line, as tables do. So the remote files are downloaded when a run starts,
and the changed ones are uploaded after each checkpoint and at the end. If the run ends abruptly, the remote directory
holds the last checkpoint, from which it can be continued.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

import blobfile as bf

from improved_diffusion import logger
from improved_diffusion.run import checkpoint
from improved_diffusion.storage import is_remote

PICTURES = "samples"  # the folder of a run for the pictures that it draws during training


@contextlib.contextmanager
def working_folder(log_dir: str) -> Iterator[tuple[str, Callable[[Iterable[str]], None]]]:
    """The local folder in which the run `log_dir` works, and a function that uploads its changes to `log_dir`.

    A local `log_dir` is itself the folder, and the function does nothing. The function gets the names of the files that
    the run has deleted, to delete them in `log_dir` too. Other files that disappear, as when the system cleans up its
    temporary folders, stay there. The function raises no errors: what fails is logged, and tried again by the next call
    and at the end of the block.

    :raises OSError: `log_dir` cannot be read, or an upload failed at the end of the block. The message then names the
        local folder, which is kept.
    """
    if not is_remote(log_dir):
        yield log_dir, lambda deleted: None
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
                f"{log_dir}: could not be brought up to date ({error}); all files are in {folder}"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)


class _Mirror:
    """A local folder and its remote copy. Of the folders in it, only `PICTURES` is copied.

    Files are named by their path within the folder, with "/" on every system.
    """

    def __init__(self, folder: str, url: str):
        self.folder = folder
        self.url = url
        # The size and modification time of each file when it was last copied.
        self.published: dict[str, tuple[int, int]] = {}
        self.deleted: set[str] = set()  # files that are still to be deleted in the remote folder

    def fetch(self) -> None:
        """Download all files of the remote folder, if it exists."""
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
        """Upload what is new or has changed, and then delete what the run has deleted.

        State files are uploaded last and deleted first, so that every remote state file belongs to a complete
        checkpoint.
        """
        present = self._present()
        for name in sorted(present, key=_is_state):
            if self.published.get(name) != present[name]:
                bf.copy(os.path.join(self.folder, name), bf.join(self.url, name), overwrite=True)
                self.published[name] = present[name]
        for name in sorted(self.deleted - present.keys(), key=_is_state, reverse=True):
            if name in self.published:
                bf.remove(bf.join(self.url, name))
                del self.published[name]
        self.deleted.clear()

    def publish_or_warn(self, deleted: Iterable[str]) -> None:
        """As `publish`, but log a failure instead of raising it. :param deleted: files that the run has deleted."""
        self.deleted.update(deleted)
        try:
            self.publish()
        except Exception as error:
            logger.log(f"WARNING: {self.url} is not up to date ({error}); the next checkpoint tries again")

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
