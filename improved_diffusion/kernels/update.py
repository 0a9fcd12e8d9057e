"""The norm of a gradient, and AdamW and Muon with moving averages and copies of the weights, by compiled functions."""

import math
from collections.abc import Callable, Sequence
from ctypes import Structure, addressof, c_float, c_int, c_void_p
from functools import partial

import numpy as np
import torch as th

from improved_diffusion import kernels

# Arguments of the compiled functions: the range of tensors to work on (and their number), then addresses of arrays.
SQUARES = (c_int, c_int, *[c_void_p] * 5)
ADAMW = (c_int, c_int, c_int, *[c_void_p] * 8, c_int, *[c_void_p] * 4)
MUON = (c_int, c_int, *[c_void_p] * 3, c_int, *[c_void_p] * 2, c_int, *[c_void_p] * 4)
SHARE = 2**20  # numbers in a part of the work
Run = Callable[[Sequence[Callable[[], object]]], object]
NUMBERS = ("lr", "beta1", "beta2", "rest1", "rest2", "epsilon", "weight_decay", "factor")


class AdamWSettings(Structure):
    """The C structure adamw: settings of AdamW, and the factor by which the gradient is multiplied."""

    _fields_ = [(name, c_float) for name in NUMBERS]

    def __init__(
        self, lr: float, betas: tuple[float, float], epsilon: float, weight_decay: float, factor: float
    ):
        # 1 - beta is computed here, in float64: in float32, 1 - 0.999 is wrong in the fifth digit.
        super().__init__(lr, *betas, *(1 - beta for beta in betas), epsilon, weight_decay, factor)


class MuonSettings(Structure):
    """The C structure muon: settings of Muon, and the factor by which the gradient is multiplied.

    keep: what the weights are multiplied by. rate: what their step is, a matrix with singular values near 1. a, b, c:
    of the polynomial that is applied `iterations` times.
    """

    _fields_ = [
        *((name, c_float) for name in ("momentum", "factor", "keep", "rate", "a", "b", "c")),
        ("iterations", c_int),
    ]


def suits(tensors: Sequence[th.Tensor]) -> bool:
    """Whether `norm`, `adamw` and `muon` can be used on these tensors of a gradient."""
    return kernels.generation() is not None and all(
        t.dtype in kernels.TYPES and t.is_cpu and t.layout == th.strided for t in tensors
    )


def in_turn(tasks: Sequence[Callable[[], object]]) -> None:
    """Run `tasks` one after the other."""
    for task in tasks:
        task()


def norm(values: Sequence[th.Tensor], more: Sequence[th.Tensor] = (), run: Run = in_turn) -> float:
    """The Euclidean norm of all numbers in the tensors `values`, or of the sums of `values` and `more`.

    :param more: tensors of the same shapes, or none.
    :param run: a function that runs the parts of the work, one after the other or at the same time.
    """
    values = [t if kernels.in_one_piece(t) else t.contiguous() for t in values]
    more = in_order(more, values)
    squares = np.empty(len(values))
    arrays = (_sizes(values), *_gradient(values, more, values), squares)
    _run_shares(
        run, kernels.function("squares", SQUARES), arrays[0], *(array.ctypes.data for array in arrays)
    )
    return math.sqrt(squares.sum())


def adamw(
    params: Sequence[th.Tensor],
    gradient: Sequence[th.Tensor],
    moments: tuple[Sequence[th.Tensor], Sequence[th.Tensor]],
    steps: th.Tensor,
    settings: AdamWSettings,
    averages: Sequence[tuple[Sequence[th.Tensor], float]],
    copies: Sequence[th.Tensor | None],
    more: Sequence[th.Tensor] = (),
    run: Run = in_turn,
) -> bool:
    """Update `params` by AdamW in place, then the moving averages and the bfloat16 `copies` (Loshchilov & Hutter 2019).

    All sequences of tensors are in the order of the parameters. All tensors but `gradient`, `more` and `copies` are
    float32 and have the strides of the parameters.

    :param gradient: bfloat16 or float32.
    :param moments: the first and second moments.
    :param steps: for each parameter, the number of this update, from 1 on: [number of parameters].
    :param averages: the tensors and the decay of each moving average.
    :param more: a second part of the gradient, which is added to the first; may be empty.
    :param run: a function that runs the parts of the work, one after the other or at the same time.
    :return: False, with nothing changed, if there are no kernels for these tensors; True after an update.
    """
    if not suits([*gradient, *more]):
        return False
    single = (th.float32,)
    try:
        of_params = kernels.addresses(params, single, params)
        gradient, more = in_order(gradient, params), in_order(more, params)
        arrays = [
            *(_sizes(params), of_params, *_gradient(gradient, more, params)),
            *(kernels.addresses(tensors, single, params) for tensors in moments),
            kernels.addresses(copies, (th.bfloat16,), params, optional=True),
        ]
        averaged = [kernels.addresses(tensors, single, params) for tensors, _ in averages]
    except TypeError:
        return False
    # The bias corrections 1 - beta^step of both moments, [2, number of parameters]; of the second, its square root.
    corrections = (
        1 - (1 - np.array([[settings.rest1], [settings.rest2]], np.float64)) ** steps.double().numpy()
    )
    corrections[1] **= 0.5
    shares = np.array([1 - decay for _, decay in averages], np.float32)
    kernel = kernels.function("adamw", ADAMW)
    others = [
        np.concatenate(averaged) if averaged else np.empty(0, np.uintp),
        shares,
        corrections.T.astype(np.float32, order="C"),
        np.frombuffer(settings, np.float32),
    ]
    _run_shares(
        run,
        *(kernel, arrays[0], len(params), *(array.ctypes.data for array in arrays)),
        *(len(averages), *(array.ctypes.data for array in others)),
    )
    return True


def muon(
    param: th.Tensor,
    gradient: th.Tensor,
    momentum: th.Tensor,
    settings: MuonSettings,
    averages: Sequence[tuple[th.Tensor, float]],
    copy: th.Tensor | None,
    more: th.Tensor | None = None,
) -> bool:
    """Update `param` by Muon in place, then its moving averages and its bfloat16 `copy` (see `cpu.muon`).

    The arguments are those of `adamw`, for one parameter.
    """
    parts = [gradient] if more is None else [gradient, more]
    if not suits(parts):
        return False
    like = [param]
    single = (th.float32,)
    try:
        parts = in_order(parts, like * len(parts))
        weights, moment = kernels.addresses([param, momentum], single, like * 2).tolist()
        of_parts = [*kernels.addresses(parts, kernels.TYPES, like * len(parts)).tolist(), None]
        averaged = kernels.addresses([t for t, _ in averages], single, like * len(averages))
        (copied,) = kernels.addresses([copy], (th.bfloat16,), like, optional=True).tolist()
    except TypeError:
        return False
    kinds = sum(kind << i for i, kind in enumerate(_in_16_bits(parts).tolist()))
    shares = np.array([1 - decay for _, decay in averages], np.float32)
    rows, columns = len(param), param[0].numel()
    room = kernels.room(kernels.size_of_room("muon", None, rows, columns))
    kernels.function("muon", MUON)(
        *(rows, columns, weights, *of_parts[:2], kinds, moment, copied),
        *(len(averages), averaged.ctypes.data, shares.ctypes.data, addressof(settings), room),
    )
    return True


def in_order(gradient: Sequence[th.Tensor], params: Sequence[th.Tensor]) -> list[th.Tensor]:
    """`gradient` with the strides of `params`. (Autograd may return tensors with other strides.)"""
    return [
        th.empty_like(p, dtype=g.dtype).copy_(g) if g.shape == p.shape and g.stride() != p.stride() else g
        for g, p in zip(gradient, params)
    ]


def _gradient(
    values: Sequence[th.Tensor], more: Sequence[th.Tensor], like: Sequence[th.Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The addresses of both parts of a gradient, and which of them are bfloat16 (`kinds` in update.h)."""
    kinds = _in_16_bits(values)
    if not more:
        return kernels.addresses(values, kernels.TYPES, like), np.zeros(len(values), np.uintp), kinds
    others = kernels.addresses(more, kernels.TYPES, like)
    return kernels.addresses(values, kernels.TYPES, like), others, kinds + 2 * _in_16_bits(more)


def _run_shares(run: Run, kernel: Callable, sizes: np.ndarray, *arguments) -> None:
    """Split the tensors of these `sizes` into ranges of about `SHARE` numbers, and call `kernel` for each range."""
    ends = np.cumsum(sizes)
    marks = np.arange(SHARE, ends[-1], SHARE) if len(ends) else []
    cuts = [0, *np.searchsorted(ends, marks), len(sizes)]
    run([partial(kernel, int(a), int(b), *arguments) for a, b in zip(cuts, cuts[1:]) if a < b])


def _sizes(tensors: Sequence[th.Tensor]) -> np.ndarray:
    return np.array([t.numel() for t in tensors], np.int64)


def _in_16_bits(tensors: Sequence[th.Tensor]) -> np.ndarray:
    return np.array([t.dtype == th.bfloat16 for t in tensors], np.uint8)
