"""Axes with round numbers as limits and labels, for charts in Excel, in a browser and in pictures."""

import math
from typing import NamedTuple

import numpy as np

# The scale of a y axis: AUTO is logarithmic if the values span a factor of ten, and else from zero.
AUTO, FROM_ZERO, FITTED = "auto", "from zero", "fitted"
LABELS = 6  # approximate number on an axis
LARGEST, SMALLEST = 1e100, 1e-100  # values beyond these have no axis


class Axis(NamedTuple):
    """An axis: its limits, the distance `unit` of its labels (a factor if logarithmic), and their decimals."""

    low: float
    high: float
    unit: float
    decimals: int
    logarithmic: bool = False

    def labels(self) -> list[tuple[float, str]]:
        """The values with a label, in ascending order, and the texts of the labels."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            # From text, because a product with a power of 10.0 is not always the nearest number.
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
        """The positions of `values` on the axis: 0 at `low`, 1 at `high`; NaN for values <= 0 if it is logarithmic."""
        values = np.asarray(values, np.float64)
        if not self.logarithmic:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(values > 0, np.log10(values), np.nan)
        return (logs - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))


def fit_values(values: np.ndarray, scale: str) -> Axis | None:
    """A y axis for finite `values`; None if they are too large or all equal.

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
    """An x axis, for example of steps or hours. It ends exactly at the largest of `values`.

    :param from_zero: whether it begins at 0, or at a round number up to the smallest of `values`.
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
    """The smallest number >= `value` of the form 1, 2 or 5 times a power of ten. :param value: above 0."""
    return min(number for number in _round_numbers(value) if number >= value * (1 - 1e-9))


def round_down(value: float) -> float:
    """The largest number <= `value` of this form. :param value: above 0."""
    return max(number for number in _round_numbers(value) if number <= value * (1 + 1e-9))


def _round_numbers(value: float) -> list[float]:
    exponent = math.floor(math.log10(value))
    # From text, because 3 * 0.1 is not 0.3.
    return [float(f"{unit}e{exponent + more}") for more in (-1, 0, 1) for unit in (1, 2, 5)]


def _decimals(unit: float) -> int:
    return max(0, -math.floor(math.log10(unit) + 1e-9))
