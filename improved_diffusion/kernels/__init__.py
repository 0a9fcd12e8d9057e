"""Operations that PyTorch has no fast form of on CPUs, compiled from the C files beside this one.

`pip install` compiles them where it finds GCC; everything works without them, only slower.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch as th

SWITCH = "IMPROVED_DIFFUSION_KERNELS"  # environment variable; 0: do without
GENERATIONS = {2: "avx512", 1: "avx2"}
TYPES = {th.float32: "fp32", th.bfloat16: "bf16"}


@functools.cache
def _library() -> tuple[ctypes.CDLL, str] | None:
    """The compiled library and the newest generation of its functions that this processor can run."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"compiled{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                level = library.processor_level()
            except (OSError, AttributeError):  # of another system, or damaged
                return None
            return (library, GENERATIONS[level]) if level else None
    return None


def generation() -> str | None:
    """The generation of processors whose kernels are used, "avx512" or "avx2"; None: none are."""
    library = _library()
    return library and library[1]


@functools.cache
def has(name: str, dtype: th.dtype) -> bool:
    """Whether there is a function of this name for this type of numbers."""
    return generation() is not None and hasattr(_library()[0], _full_name(name, dtype))


@functools.cache
def function(
    name: str, arguments: tuple[type, ...], dtype: th.dtype | None = None, result: type | None = None
) -> Callable:
    """The compiled function of this name, which takes `arguments`; addresses are given as numbers.

    :param dtype: the type of numbers it is for, where there are several.
    """
    found = getattr(_library()[0], _full_name(name, dtype))
    found.argtypes, found.restype = arguments, result
    return found


def _full_name(name: str, dtype: th.dtype | None) -> str:
    return "_".join([name, *([] if dtype is None else [TYPES.get(dtype, "none")]), generation()])
