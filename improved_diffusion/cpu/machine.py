"""The processor and its memory: what machine this is, how many of its cores may be used, how memory is kept."""

import ctypes
import os
import platform
import subprocess

import torch as th


def usable_cores() -> int:
    """The cores this process may run on (an affinity mask counts where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def keep_memory(trim_threshold: int = KEEP[0], mmap_threshold: int = KEEP[1]) -> bool:
    """Let this process keep the memory that it frees, for its next tensors, instead of handing it back.

    A training step frees and asks for hundreds of megabytes again; a tenth of its time would go into that. The
    peak stays the same. Both sizes are in bytes.

    :return: whether that was possible: it is with the GNU C library.
    """
    libc = _c_library()
    if not hasattr(libc, "mallopt"):
        return False
    # One heap for all threads, so that one uses what another has freed.
    libc.mallopt(M_ARENA_MAX, 1)
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
