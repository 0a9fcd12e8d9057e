"""How many steps a training of a number of hours takes, by the speed of its first minute."""

import time
from collections.abc import Callable

MEASURED_SECONDS = 60.0  # of training, at least
MEASURED_STEPS = 5  # at least; as many before them do not count, because caches and memory fill in them


class Pace:
    """Measures the seconds per step in the first steps of a session.

    :param clock: tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._steps, self._skipped, self._started = 0, 0, 0.0
        self.seconds_per_step = 0.0

    def is_known(self, steps: int = 1) -> bool:
        """Count `steps`, and say whether enough were measured. Call it after every step or round of steps."""
        self._steps += steps
        if not self._skipped and self._steps >= MEASURED_STEPS:
            self._skipped, self._started = self._steps, self._clock()
        counted = self._steps - self._skipped if self._skipped else 0
        seconds = self._clock() - self._started
        if counted < MEASURED_STEPS or seconds < MEASURED_SECONDS:
            return False
        self.seconds_per_step = seconds / counted
        return True


def steps_within(
    seconds: float,
    seconds_per_step: float,
    *,
    seconds_per_save: float = 0.0,
    save_interval: int = 1,
    seconds_per_preview: float = 0.0,
    sample_interval: int = 0,
) -> int:
    """How many whole steps fit into `seconds`; at least one.

    :param seconds_per_save: the duration of saving a checkpoint, every `save_interval` steps and twice at the end.
    :param seconds_per_preview: the duration of drawing pictures, every `sample_interval` steps; 0: never.
    """
    each = seconds_per_step + seconds_per_save / save_interval
    if sample_interval:
        each += seconds_per_preview / sample_interval
    return max(1, int((seconds - 2 * seconds_per_save) / each))
