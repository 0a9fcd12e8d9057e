"""The machine: its processor and memory, the cores that this process may use, and how freed memory is kept."""

import contextlib
import ctypes
import math
import os
import platform
import subprocess
from collections.abc import Iterator

import torch as th


def usable_cores() -> int:
    """The number of cores that this process may use: those of its affinity mask, or its CPU quota if that is smaller.

    A quota is rounded down, but to at least 1. When a thread has used up its time, the others wait for it, so fewer
    threads are faster.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, cpu_quota())))


def cpu_quota(proc: str = "/proc/self") -> float:
    """The number of CPUs that this process may use at a time by its Linux control groups (version 1 or 2).

    It is the smallest limit of its group and all groups above; infinite if there is none.

    :param proc: the folder with the files ``cgroup`` and ``mountinfo`` of this process.
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
    """The folders of the control groups that may limit this process's CPU time, each with the top of its hierarchy."""
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
                # In a container, the mounted top may be the group itself, while `path` is its path on the host.
                inside = os.path.relpath(path, root) if os.path.commonpath([path, root]) == root else "."
                yield os.path.normpath(os.path.join(top, inside)), top


def _quota_of(folder: str) -> float:
    """The number of CPUs that a control group may use at a time; infinite if it has no limit."""

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


def processor_name(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The name of the processor's model, or of its architecture if the system does not give the model.

    :param cpuinfo: the file in which Linux describes the processor.
    """
    name = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Linux":
            with open(cpuinfo, encoding="utf-8") as file:
                name = _value_of("model name", file.read())
            # On ARM64, that file has numbers instead of names. lscpu knows the names.
            name = name or _value_of("Model name", _output_of("lscpu")).strip("-")
        if platform.system() == "Darwin":
            name = _output_of("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return name or platform.processor() or platform.machine()


def _value_of(key: str, text: str) -> str:
    """The value in the first line "key : value" of `text`, or an empty string."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return next((value.strip() for name, value in pairs if name.strip() == key), "")


def _output_of(*command: str) -> str:
    untranslated = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=untranslated).stdout


# getauxval(3) of Linux on ARM64.
AT_HWCAP2, HWCAP2_BF16 = 26, 1 << 14


def has_bf16() -> bool:
    """Whether this processor may have instructions for bfloat16, as far as PyTorch or Linux tell."""
    if platform.machine() not in ("aarch64", "arm64"):
        return th.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    libc = _c_library()
    if not hasattr(libc, "getauxval"):  # another system
        return False
    libc.getauxval.argtypes, libc.getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(libc.getauxval(AT_HWCAP2) & HWCAP2_BF16)


def memory_gb() -> float | None:
    """Physical memory in GB (2^30 bytes), or None if the system does not give it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


# Parameters of mallopt(3). M_TRIM_THRESHOLD: up to how many bytes of freed memory at the end of the heap are kept.
# M_MMAP_THRESHOLD: larger blocks come straight from the system, which clears them page by page.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
KEEP = (2**31 - 1, 2**30)
HEAPS = 8


def keep_memory(trim_threshold: int = KEEP[0], mmap_threshold: int = KEEP[1]) -> bool:
    """Keep freed memory for the next tensors instead of returning it to the system.

    A training step frees and allocates hundreds of megabytes. Without this, that takes a tenth of its time. The peak
    of the memory stays the same.

    :param trim_threshold, mmap_threshold: in bytes; see mallopt(3).
    :return: whether it was possible. It needs the GNU C library.
    """
    libc = _c_library()
    if not hasattr(libc, "mallopt"):
        return False
    # A heap for each computing thread. From a common heap, a thread gets memory that is in the caches of another core,
    # and steps take 10% longer. More heaps would only use more memory.
    libc.mallopt(M_ARENA_MAX, HEAPS)
    return bool(
        libc.mallopt(M_TRIM_THRESHOLD, trim_threshold) and libc.mallopt(M_MMAP_THRESHOLD, mmap_threshold)
    )


def release_memory() -> None:
    """Return the free memory that `keep_memory` has kept to the system."""
    libc = _c_library()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError on Windows, which has no such handle
        return None


def describe_machine() -> dict[str, str | int | float | None]:
    """The facts about this machine that a run records: processor, cores, memory, operating system, versions."""
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
