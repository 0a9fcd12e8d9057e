"""Fast forms of operations that are slow in PyTorch on CPUs, compiled from the C files in this folder.

`pip install` compiles them on Linux on x86-64 and ARM64 if it finds GCC, for several generations of processors.
Without them, PyTorch's operations do the same, only slower. The environment variable IMPROVED_DIFFUSION_KERNELS can be
0 (do not use them) or the name of a generation (use none that is newer).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch as th

from improved_diffusion.shipped import compiled_kernels, why_not_compiled

SWITCH = "IMPROVED_DIFFUSION_KERNELS"
# Of processors, by their instructions, the older first.
OF_ARM64 = ("neon", "neonbf16")
OF_X86_64 = ("avx2", "avx512", "avx512bf16", "avx512fp16", "amx_emulated", "amx")
GENERATIONS = OF_ARM64 if platform.machine() == "aarch64" else OF_X86_64
# amx without its matrix unit: slow, for tests, and used only if the environment asks for it.
EMULATED = "amx_emulated"
IN_FLOAT16 = "avx512fp16"  # products of bfloat16 numbers in float16 (see halves.h)
WITH_TILES = (EMULATED, "amx")  # convolutions and attention in bfloat16 by products of tiles (see tiles.h)
MOST = 2**31  # numbers in a tensor; the C functions take sizes as 32-bit integers
TYPES = {th.float32: "fp32", th.bfloat16: "bf16"}

_own = threading.local()


def generation() -> str | None:
    """The generation of processors whose kernels are used, one of `GENERATIONS`; None: no kernels are used."""
    library, found = _library()
    return found[-1] if library else None


def why_none() -> str:
    """Why no kernels are used, and what helps."""
    assert generation() is None
    return _library()[1]


@functools.cache
def has(name: str, dtype: th.dtype) -> bool:
    """Whether there is a compiled function of this name for numbers of type `dtype`."""
    return _full_name(name, dtype) is not None


@functools.cache
def multiplies(dtype: th.dtype) -> bool:
    """Whether the compiled products of matrices of type `dtype` are faster here than PyTorch's.

    They are computed in float32, or for bfloat16 numbers in float16 or by tiles where the processor has instructions
    for that.
    """
    return has("pointwise_forward", dtype) and not (dtype == th.bfloat16 and generation() == "neonbf16")


def has_tiles(dtype: th.dtype) -> bool:
    """Whether convolutions of type `dtype` are computed by products of tiles, as they are defined."""
    return dtype == th.bfloat16 and generation() in WITH_TILES


def avoids_bfloat16(dtype: th.dtype) -> bool:
    """Whether PyTorch computes faster in float32 than in `dtype`, bfloat16: on processors that are fast in float16."""
    return dtype == th.bfloat16 and generation() == IN_FLOAT16


@functools.cache
def function(
    name: str, arguments: tuple[type, ...], dtype: th.dtype | None = None, result: type | None = None
) -> Callable:
    """The compiled function of this name. It takes addresses as integers.

    :param arguments, result: the ctypes of its arguments and result.
    :param dtype: the type of its numbers, for a function that exists for several.
    """
    full_name = _full_name(name, dtype)
    assert full_name is not None
    found = getattr(_library()[0], full_name)
    found.argtypes, found.restype = arguments, result
    return found


def address(
    tensor: th.Tensor | None,
    dtype: th.dtype,
    shape: tuple[int, ...],
    memory_format: th.memory_format = th.contiguous_format,
) -> int | None:
    """The address of `tensor`, after checking that it has the given type, shape and layout; None for None.

    :raises TypeError: the type, shape or layout is another, or the tensor is not on the CPU.
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
    """The addresses of `tensors`, after checking their types, shapes and layouts.

    :param dtypes: the types that they may have.
    :param like: for each of them, a tensor with the shape and the strides that it must have.
    :param optional: whether there may be None among them, whose address is 0.
    :return: uintp, [number of tensors].
    :raises TypeError: the type, shape or layout of one is another, or it is not on the CPU.
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


@functools.cache
def size_of_room(name: str, dtype: th.dtype | None, *sizes: int) -> int:
    """How much working memory the functions of this name take: the result of the compiled function `name`_room.

    It is remembered, because other threads could take the interpreter during the call.
    """
    return function(f"{name}_room", (ctypes.c_size_t,) * len(sizes), dtype, ctypes.c_size_t)(*sizes)


def room(size: int) -> int:
    """The address of `size` float32 numbers of working memory for this thread, until its next call.

    It is kept, because fresh memory would cost as much time as a small convolution.
    """
    kept = getattr(_own, "room", None)
    if kept is None or kept.numel() < size:
        kept = _own.room = th.empty(size, dtype=th.float32, device="cpu")
    return kept.data_ptr()


def suits_layout(x: th.Tensor) -> bool:
    """Whether `x` lies in memory as the kernels for images need it: [N, C, H, W] in channels_last on the CPU."""
    return x.dim() == 4 and x.is_cpu and x.is_contiguous(memory_format=th.channels_last)


def in_one_piece(tensor: th.Tensor) -> bool:
    """Whether `tensor` fills a range of memory without gaps, contiguous or in channels_last layout."""
    return tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=th.channels_last)
    )


@contextlib.contextmanager
def switched(setting: str) -> Iterator[None]:
    """Within the `with` block, set the environment variable IMPROVED_DIFFUSION_KERNELS to `setting`, and follow it."""
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
    """Forget the library, so that the next use of a kernel loads it again and reads the environment variable."""
    for cached in (_library, has, multiplies, function, size_of_room):
        cached.cache_clear()


def _full_name(name: str, dtype: th.dtype | None) -> str | None:
    """The name of the function in the library, or None. A generation takes what it has not from the older ones."""
    library, usable = _library()
    for generation in reversed(usable if library else ()):
        full_name = "_".join([name, *([] if dtype is None else [TYPES.get(dtype, "none")]), generation])
        if hasattr(library, full_name):
            return full_name
    return None


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, tuple[str, ...] | str]:
    """The compiled library and the generations of its functions that this processor can run, the older first.

    If it cannot be used: None, and the reason.
    """
    wanted = os.environ.get(SWITCH, GENERATIONS[-1])
    allowed = GENERATIONS[: 1 + GENERATIONS.index(wanted)] if wanted in GENERATIONS else ()
    if not allowed:
        return None, f"{SWITCH} is {wanted or 'empty'}"
    paths = compiled_kernels()
    if not paths:
        return None, why_not_compiled()
    here = Path(__file__).parent
    sources = sorted(path for path in here.iterdir() if path.suffix in (".c", ".h"))
    present = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    for path in paths:
        try:
            library = ctypes.CDLL(path)
            library.sources.restype = ctypes.c_char_p
            compiled_from = library.sources().decode()
            usable = tuple(
                g for g in allowed if (g != EMULATED or g == allowed[-1]) and library.usable(g.encode())
            )
        except (OSError, AttributeError):  # compiled for another system, or damaged
            continue
        if sources and present != compiled_from:  # an installed package has no sources
            continue
        return (library, usable) if usable else (None, "this processor is too old for them")
    return None, "they belong to other code or another system: repeat the installation"
