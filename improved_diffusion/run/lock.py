"""One process at a time in a run directory: a lock that dies with its owner and names it meanwhile."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from improved_diffusion.storage import is_remote, open_atomic

LOCK_NAME = ".lock"
OWNER_NAME = ".lock-owner.json"


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of `folder`, which is created where needed, and goes again if nothing comes into it.

    The operating system releases the lock when its owner ends, however it ends, so a crash blocks nobody.

    Who holds the lock gets a function to call before anything is written: it raises OSError when `folder` is no
    longer the directory that was locked, because it was moved, deleted or replaced. What is written by name then
    would begin a second run there, beside whoever locks that one.

    :raises ValueError: another process holds it (the message says which), or `folder` cannot be written.
    """
    if is_remote(folder):
        raise ValueError(f"--log_dir {folder}: logs grow line by line, which needs a local directory")
    existed = os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, LOCK_NAME), "a"):
            pass
    except OSError as error:
        raise ValueError(
            f"--log_dir {folder}: cannot be written ({error.strerror}); choose another"
        ) from error
    owner_path, lock_path = os.path.join(folder, OWNER_NAME), os.path.join(folder, LOCK_NAME)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--log_dir {folder}: in use by {_describe_owner(owner_path)}; wait until it ends, stop it, or give "
            "another directory"
        ) from None
    locked = os.stat(lock_path)

    def is_still_here() -> bool:
        try:
            return os.path.samestat(os.stat(lock_path), locked)
        except OSError:
            return False

    def check() -> None:
        if not is_still_here():
            raise OSError(
                f"--log_dir {folder}: was moved, deleted or replaced during the run, which stops here. Put it back, "
                "or give the place it was moved to, and the same command goes on from the last checkpoint"
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
        with contextlib.suppress(OSError):
            if ours and not existed and os.listdir(folder) == [LOCK_NAME]:
                os.remove(lock_path)
                os.rmdir(folder)


def _describe_owner(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            owner = json.load(file)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
