"""Operations that PyTorch has no fast form of on CPUs, compiled from the C files beside this one.

`pip install` compiles them where it finds GCC, on Linux and x86-64; everything works without them, only slower. The
environment variable IMPROVED_DIFFUSION_KERNELS can be 0, to do without, or avx2, for those of older processors.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import torch as th

SWITCH = "IMPROVED_DIFFUSION_KERNELS"
GENERATIONS = ("avx2", "avx512")  # processors, older to newer
MOST = 2**31  # numbers in a tensor: C is told sizes in 32 bits
TYPES = {th.float32: "fp32", th.bfloat16: "bf16"}


def generation() -> str | None:
    """The generation of processors whose kernels are used, of `GENERATIONS`; None: none are."""
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


def address(
    tensor: th.Tensor | None,
    dtype: th.dtype,
    shape: tuple[int, ...],
    memory_format: th.memory_format = th.contiguous_format,
) -> int | None:
    """Where `tensor` begins in memory, after checking that C will find there what it expects; None for None.

    :raises TypeError: it is of another type, size or layout, or not in the memory of the CPU.
    """
    if tensor is None:
        return None
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or not tensor.is_cpu
        or tensor.layout != th.strided
        or not tensor.is_contiguous(memory_format=memory_format)
    ):
        raise TypeError(
            f"a kernel needs {dtype} {list(shape)} on the CPU, {memory_format}; it was given {_described(tensor)}"
        )
    return tensor.data_ptr()


def addresses(
    tensors: Sequence[th.Tensor | None],
    dtypes: Collection[th.dtype],
    like: Sequence[th.Tensor],
    optional: bool = False,
) -> np.ndarray:
    """Where each of `tensors` begins in memory, after checking that C will find there what it expects.

    :param dtypes: the types that they may have.
    :param like: for each, a tensor whose shape and order in memory it has to have.
    :param optional: there may be None among them, whose place is 0.
    :raises TypeError: one is of another type, size or layout, or not in the memory of the CPU.
    """
    if len(tensors) != len(like):
        raise TypeError(f"a kernel needs {len(like)} tensors; it was given {len(tensors)}")
    for tensor, other in zip(tensors, like):
        if tensor is None and optional:
            continue
        if (
            tensor is None
            or tensor.dtype not in dtypes
            or not tensor.is_cpu
            or tensor.layout != th.strided
            or tensor.shape != other.shape
            or tensor.stride() != other.stride()
            or not in_one_piece(tensor)
        ):
            raise TypeError(
                f"a kernel needs one of {list(dtypes)}, {list(other.shape)} on the CPU in one piece, strides "
                f"{list(other.stride())}; it was given {tensor if tensor is None else _described(tensor)}"
            )
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.uintp)


def _described(tensor: th.Tensor) -> str:
    strides = f", strides {list(tensor.stride())}" if tensor.layout == th.strided else f", {tensor.layout}"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{strides}"


def in_one_piece(tensor: th.Tensor) -> bool:
    """Whether the numbers of `tensor` lie in memory without gaps, in one of the two usual orders."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=th.channels_last)
    )


@contextlib.contextmanager
def switched(setting: str) -> Iterator[None]:
    """Do as if the environment variable were `setting`, for a while."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = setting
    _forget()
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before
        _forget()


def _forget() -> None:
    """Look again for the library, and at the environment variable, when a kernel is next asked for."""
    for cached in (_library, has, function):
        cached.cache_clear()


def _full_name(name: str, dtype: th.dtype | None) -> str:
    return "_".join([name, *([] if dtype is None else [TYPES.get(dtype, "none")]), generation()])


@functools.cache
def _library() -> tuple[ctypes.CDLL, str] | None:
    """The compiled library and the newest generation of its functions that this processor can run."""
    wanted = os.environ.get(SWITCH, GENERATIONS[-1])
    here = Path(__file__).parent
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"compiled{suffix}").exists()]
    if wanted not in GENERATIONS or not paths:
        return None
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.sources.restype = ctypes.c_char_p
        compiled_from, level = library.sources().decode(), library.processor_level()
    except (OSError, AttributeError):  # of another system, or damaged
        return None
    sources = sorted(path for path in here.iterdir() if path.suffix in (".c", ".h"))
    present = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    if sources and present != compiled_from:  # an installed package has none
        return None
    level = min(level, 1 + GENERATIONS.index(wanted))
    return (library, GENERATIONS[level - 1]) if level else None
