"""The lock of a run directory, which lets one process at a time train in it."""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from improved_diffusion.storage import is_remote, open_atomic

LOCK_NAME = ".lock"
OWNER_NAME = ".lock-owner.json"
# Errors of file systems without locks, such as some network file systems.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}


@contextlib.contextmanager
def run_lock(folder: str, log: Callable[[str], object] = print) -> Iterator[Callable[[], None]]:
    """Hold the lock of the directory `folder`, which is created if it does not exist.

    The operating system releases the lock when the process ends, even by a crash. A directory that was created here
    and is still empty at the end is deleted again. If the file system has no locks, `log` gets a warning.

    :yield: a function to call before each write. It raises OSError if `folder` was moved, deleted or replaced since.
        To write under its path then would start a second run in the new directory, which this lock does not cover.
    :raises ValueError: another process holds the lock (the message says which), or `folder` cannot be written.
    """
    if is_remote(folder):
        raise ValueError(f"{folder}: a run writes its logs line by line, which needs a local directory")
    existed = os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        # Kept open, because some file systems may otherwise give the file another number.
        held = open(os.path.join(folder, LOCK_NAME), "a")  # noqa: SIM115
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written ({error.strerror}); choose another directory"
        ) from error
    owner_path, lock_path = os.path.join(folder, OWNER_NAME), os.path.join(folder, LOCK_NAME)
    lock = FileLock(lock_path)
    # Asked first, because where there are no locks, some versions of filelock put another file in the place of this.
    reason = _why_no_locks(held.fileno())
    if reason:
        log(
            f"WARNING: {folder}: this file system has no locks ({reason}), so nothing prevents a second process from "
            "writing there: start only one"
        )
    else:
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError) as error:
            held.close()
            raise ValueError(
                f"{folder}: in use by {_describe_owner(owner_path)}; wait until it ends, stop it, or give another "
                "directory"
            ) from error
    locked = os.fstat(held.fileno())

    def is_still_here() -> bool:
        try:
            return os.path.samestat(os.stat(lock_path), locked)
        except OSError:
            return False

    def check() -> None:
        if not is_still_here():
            raise OSError(
                f"{folder}: was moved, deleted or replaced during the run, which stops here. Put it back, or give its "
                "new path, and the same command continues from the last checkpoint"
            )

    try:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().isoformat(timespec="seconds"),
        }
        with open_atomic(owner_path, "w") as file:
            json.dump(owner, file)
        yield check
    finally:
        ours = is_still_here()
        with contextlib.suppress(OSError):
            if ours:
                os.remove(owner_path)
        lock.release()
        held.close()
        with contextlib.suppress(OSError):
            if ours and not existed and os.listdir(folder) == [LOCK_NAME]:
                os.remove(lock_path)
                os.rmdir(folder)


def _why_no_locks(descriptor: int) -> str:
    """The error message of a file system without locks, for an open file; empty if it has locks."""
    try:
        import fcntl
    except ImportError:  # Windows, where every file system has them
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return os.strerror(error.errno) if error.errno in NO_LOCKS else ""
    return ""


def _describe_owner(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            owner = json.load(file)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
