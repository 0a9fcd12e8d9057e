"""The processor: what machine this is and how many of its cores may be used."""

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
