"""The norm of a gradient, and AdamW together with all that follows it, reading every number from memory once."""

import math
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_void_p

import numpy as np
import torch as th

from improved_diffusion import kernels

SQUARES = (c_int, *[c_void_p] * 4, c_int)
ADAMW = (c_int, *[c_void_p] * 7, c_int, *[c_void_p] * 4, c_int)
NUMBERS = ("lr", "beta1", "beta2", "rest1", "rest2", "epsilon", "weight_decay", "factor")


class AdamWSettings(Structure):
    """The C structure adamw; `factor` is what the gradient is multiplied by."""

    _fields_ = [(name, c_float) for name in NUMBERS]

    def __init__(
        self, lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float, factor: float
    ):
        # In 32 bits, 1 - 0.999 would be off in the fifth digit.
        super().__init__(lr, *betas, *(1 - beta for beta in betas), epsilon, weight_decay, factor)


def suits(tensors: Sequence[th.Tensor]) -> bool:
    """Whether `norm` can be used on these tensors."""
    return kernels.generation() is not None and all(
        t.dtype in kernels.TYPES and t.is_cpu and t.layout == th.strided for t in tensors
    )


def norm(values: Sequence[th.Tensor]) -> float:
    """The Euclidean norm of all numbers in `values`."""
    values = [t if kernels.in_one_piece(t) else t.contiguous() for t in values]
    squares = np.empty(len(values))
    kernel = kernels.function("squares", SQUARES)
    found = kernels.addresses(values, kernels.TYPES, values)
    arrays = (_sizes(values), found, _in_16_bits(values), squares)
    kernel(len(values), *(array.ctypes.data for array in arrays), th.get_num_threads())
    return math.sqrt(squares.sum())


def adamw(
    params: Sequence[th.Tensor],
    gradient: Sequence[th.Tensor],
    moments: tuple[Sequence[th.Tensor], Sequence[th.Tensor]],
    steps: th.Tensor,
    settings: AdamWSettings,
    averages: Sequence[tuple[Sequence[th.Tensor], float]],
    copies: Sequence[th.Tensor | None],
) -> bool:
    """One update of `params`, in place; then of the moving averages, and of the `copies` in bfloat16.

    :param gradient: in 16 or 32 bits; all other tensors are in 32, and lie in memory as the parameters do.
    :param steps: of each parameter, the number of this update, from 1 on: [number of parameters].
    :param averages: the tensors of each, and its decay.
    :return: whether it was done: nothing is where there are no kernels, or none for tensors like these.
    """
    if not suits(gradient):
        return False
    single = (th.float32,)
    try:
        of_params = kernels.addresses(params, single, params)
        # What autograd returns may lie in memory in another order.
        gradient = [
            th.empty_like(p, dtype=g.dtype).copy_(g) if g.shape == p.shape and g.stride() != p.stride() else g
            for g, p in zip(gradient, params)
        ]
        arrays = [
            *(_sizes(params), of_params),
            *(kernels.addresses(gradient, kernels.TYPES, params), _in_16_bits(gradient)),
            *(kernels.addresses(tensors, single, params) for tensors in moments),
            kernels.addresses(copies, (th.bfloat16,), params, optional=True),
        ]
        averaged = [kernels.addresses(tensors, single, params) for tensors, _ in averages]
    except TypeError:
        return False
    corrections = (
        1 - (1 - np.array([[settings.rest1], [settings.rest2]], np.float64)) ** steps.double().numpy()
    )
    corrections[1] **= 0.5
    shares = np.array([1 - decay for _, decay in averages], np.float32)
    kernel = kernels.function("adamw", ADAMW)
    more = [
        np.concatenate(averaged) if averaged else np.empty(0, np.uintp),
        shares,
        corrections.T.astype(np.float32, order="C"),
        np.frombuffer(settings, np.float32),
    ]
    kernel(
        *(len(params), *(array.ctypes.data for array in arrays)),
        *(len(averages), *(array.ctypes.data for array in more)),
        th.get_num_threads(),
    )
    return True


def _sizes(tensors: Sequence[th.Tensor]) -> np.ndarray:
    return np.array([t.numel() for t in tensors], np.int64)


def _in_16_bits(tensors: Sequence[th.Tensor]) -> np.ndarray:
    return np.array([t.dtype == th.bfloat16 for t in tensors], np.uint8)
