"""The processor and its memory: what machine this is, how many of its cores may be used, how memory is kept."""

import contextlib
import ctypes
import math
import os
import platform
import subprocess
from collections.abc import Iterator

import torch as th


def usable_cores() -> int:
    """The cores this process may use: those of its affinity mask, or fewer when its container has a CPU quota.

    A quota is rounded down, to at least 1: threads that wait for one that has used up its time are slower than
    fewer threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(proc: str = "/proc/self") -> float:
    """The CPUs that Linux's control groups (versions 1 and 2) let this process use at a time; infinite without.

    The group itself and every group above it may have a limit.

    :param proc: the folder with this process's ``cgroup`` and ``mountinfo``.
    """
    quota = math.inf
    with contextlib.suppress(OSError, ValueError):
        for folder, top in _cpu_groups(proc):
            while True:
                quota = min(quota, _quota_of(folder))
                if folder == top or not folder.startswith(top):
                    break
                folder = os.path.dirname(folder)
    return quota


def _cpu_groups(proc: str) -> Iterator[tuple[str, str]]:
    """The folders of this process's groups that may limit its CPU time, each with the top of its hierarchy."""
    with open(os.path.join(proc, "cgroup"), encoding="utf-8") as file:
        # "number:controllers:path"; version 2 has one line without controllers
        groups = [line.rstrip("\n").split(":", 2) for line in file]
    with open(os.path.join(proc, "mountinfo"), encoding="utf-8") as file:
        mounts = [line.split() for line in file]
    for mount in mounts:
        # "... root mount-point options [tags] - type source options", see proc(5)
        kind, _, options = mount[mount.index("-") + 1 :][:3]
        root, top = mount[3:5]
        for _, controllers, path in groups:
            second = kind == "cgroup2" and not controllers
            first = kind == "cgroup" and "cpu" in options.split(",") and "cpu" in controllers.split(",")
            if first or second:
                # In a container, the top may be its own group, and the path that which the host knows it by.
                inside = os.path.relpath(path, root) if os.path.commonpath([path, root]) == root else "."
                yield os.path.normpath(os.path.join(top, inside)), top


def _quota_of(folder: str) -> float:
    """The CPUs that a control group may use at a time."""

    def read(name: str) -> list[str]:
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                return file.read().split()
        except OSError:
            return []

    limit = read("cpu.max") or [*read("cpu.cfs_quota_us"), *read("cpu.cfs_period_us")]
    if len(limit) != 2 or limit[0] in ("max", "-1"):
        return math.inf
    return float(limit[0]) / float(limit[1])


def processor_name() -> str:
    """The processor's model, as its maker calls it where the system tells."""
    try:
        if platform.system() == "Linux":
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.split(":", 1)[1].strip()
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def memory_gb() -> float | None:
    """Physical memory in GB (2^30 bytes), or None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


# Of mallopt(3): up to which size freed memory at the end of the heap is kept, and from which size on blocks are
# asked of the system one by one. The system clears what it gives, page by page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEEP = (2**31 - 1, 2**30)
HEAPS = 8


def keep_memory(trim_threshold: int = KEEP[0], mmap_threshold: int = KEEP[1]) -> bool:
    """Let this process keep the memory that it frees, for its next tensors, instead of handing it back.

    A training step frees and asks for hundreds of megabytes again; a tenth of its time would go into that. The
    peak stays the same. Both sizes are in bytes.

    :return: whether that was possible: it is with the GNU C library.
    """
    libc = _c_library()
    if not hasattr(libc, "mallopt"):
        return False
    # A heap for each thread that computes: with a common one, a thread is given memory that lies in the caches of
    # another core, and steps take a tenth longer. More heaps than that would only hold more.
    libc.mallopt(M_ARENA_MAX, HEAPS)
    return bool(
        libc.mallopt(M_TRIM_THRESHOLD, trim_threshold) and libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold)
    )


def release_memory() -> None:
    """Hand back to the system what `keep_memory` has kept and is free, for other uses to take."""
    libc = _c_library()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows, where there is no such handle
        return None


def describe_machine() -> dict[str, str | int | float | None]:
    """What a reader of the results needs to know about this machine."""
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": th.get_num_threads(),
        "capability": th.backends.cpu.get_cpu_capability(),
        "memory_gb": memory_gb(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": th.__version__,
    }
