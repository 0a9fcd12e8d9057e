"""Axes whose limits and labels are round numbers, whatever draws them: Excel, a page in a browser, or a picture."""

import math
from typing import NamedTuple

import numpy as np

# How a y axis is scaled: "log" where the values span a factor of ten, or else from zero; from zero; to the values.
AUTO, FROM_ZERO, FITTED = "auto", "from zero", "fitted"
LABELS = 6  # about so many on an axis
LARGEST, SMALLEST = 1e100, 1e-100  # what is beyond has no axis


class Axis(NamedTuple):
    """Limits and the distance of labels, of which `decimals` are shown; a factor of 10 on a logarithmic axis."""

    low: float
    high: float
    unit: float
    decimals: int
    logarithmic: bool = False

    def labels(self) -> list[tuple[float, str]]:
        """The values to be labelled, in rising order, and what stands there."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            # Text becomes the number nearest to it, which a power of 10.0 is not.
            values = [float(f"{digit}e{n}") for n in range(first, last + 1) for digit in (1, 2, 5)]
            values = [
                value
                for value in values
                if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)
            ]
            powers = [value for value in values if f"{value:e}".startswith("1.0")]
            return [(value, f"{value:g}") for value in (powers if len(powers) > 2 else values)]
        count = math.floor((self.high - self.low) / self.unit + 1e-9)
        values = [self.low + number * self.unit for number in range(count + 1)]
        if self.decimals > 8 or max(abs(self.low), abs(self.high)) >= 1e7:
            return [(value, f"{value:.4g}") for value in values]
        return [(value, f"{value:,.{self.decimals}f}") for value in values]

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where `values` lie on the axis: 0 at `low`, 1 at `high`. NaN for those that a logarithmic axis has not."""
        values = np.asarray(values, np.float64)
        if not self.logarithmic:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(values > 0, np.log10(values), np.nan)
        return (logs - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))


def fit_values(values: np.ndarray, scale: str) -> Axis | None:
    """A y axis for finite `values`; None where they are too large, or all alike.

    :param scale: `AUTO`, `FROM_ZERO` or `FITTED`.
    """
    low, high = float(values.min()), float(values.max())
    if max(abs(low), abs(high)) > LARGEST:
        return None
    if scale == AUTO and low > SMALLEST and high / low >= 10:
        return Axis(round_down(low), round_up(high), 10, 0, True)
    if scale != FITTED:
        low = min(low, 0.0)
    if high - low < SMALLEST:
        return None
    unit = round_up((high - low) / LABELS)
    decimals = _decimals(unit)
    low, high = (
        round(number * unit, decimals) for number in (math.floor(low / unit), math.ceil(high / unit))
    )
    return Axis(low, high, unit, decimals)


def fit_way(values: np.ndarray, from_zero: bool = True, whole: bool = True) -> Axis:
    """An x axis that ends at the last of `values` exactly, such as steps or hours.

    :param from_zero: whether it begins at 0, or at a round number before the first of `values`.
    :param whole: whether its labels are whole numbers.
    """
    last = float(values.max())
    if whole:
        last = max(last, 1.0)
    elif last <= 0:
        last = 1.0
    first = 0.0 if from_zero else float(values.min())
    unit = round_up(max(last - first, 1.0 if whole else last * 1e-3) / LABELS)
    if whole:
        unit = max(unit, 1.0)
    return Axis(math.floor(first / unit) * unit, last, unit, _decimals(unit))


def round_up(value: float) -> float:
    """The smallest number of the form 1, 2 or 5 times a power of ten that is not below `value` > 0."""
    return min(number for number in _round_numbers(value) if number >= value * (1 - 1e-9))


def round_down(value: float) -> float:
    """The largest number of that form that is not above `value` > 0."""
    return max(number for number in _round_numbers(value) if number <= value * (1 + 1e-9))


def _round_numbers(value: float) -> list[float]:
    exponent = math.floor(math.log10(value))
    # From text, because 3 * 0.1 is not 0.3.
    return [float(f"{unit}e{exponent + more}") for more in (-1, 0, 1) for unit in (1, 2, 5)]


def _decimals(unit: float) -> int:
    return max(0, -math.floor(math.log10(unit) + 1e-9))
