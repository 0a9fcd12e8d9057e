"""Signals that ask a running job to stop or to save, and how the job finishes its work first."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator


class Interrupts(contextlib.AbstractContextManager):
    """A context in which signals set attributes, which a loop checks between two steps.

    SIGINT, SIGTERM and SIGHUP (the terminal was closed; ignored under ``nohup``) set `stop` to the name of the signal.
    A second SIGINT ends the process at once. SIGUSR1 asks to save (`take_save`). Python delivers signals to the main
    thread, so in other threads nothing is ever set.

    :param echo: seconds after a signal to stop in which further ones are ignored. The terminal sends Ctrl-C to every
        process of a job, and the launcher passes it on once more.
    :ivar stop: the name of the signal that asked to stop, or None.
    """

    def __init__(self, echo: float = 0.0):
        self._echo = echo
        self._stopped_at = -math.inf
        self._abandons = False
        self.stop: str | None = None
        # Two counts, each written in one place: a flag that is read and then cleared loses a signal in between.
        self._saves_asked = 0
        self._saves_taken = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        handlers = dict.fromkeys((signal.SIGINT, *terminations()), self._on_stop)
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._on_save
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def take_save(self) -> bool:
        """Whether SIGUSR1 has asked to save since the last call."""
        asked = self._saves_asked
        is_new = asked > self._saves_taken
        self._saves_taken = asked
        return is_new

    def check(self) -> None:
        """Raise `Stopped` if a signal has asked to stop. For work that may be left out then."""
        if self.stop is not None:
            raise Stopped(signal.Signals[self.stop])

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """A block that may be left out: within it, a signal to stop raises `Stopped` at once."""
        self._abandons = True
        try:
            yield
        finally:
            self._abandons = False

    def _on_stop(self, number: int, frame) -> None:
        now = time.monotonic()
        if now - self._stopped_at < self._echo:
            return
        if number == signal.SIGINT and self.stop is not None:
            os._exit(130)
        self._stopped_at = now
        self.stop = signal.Signals(number).name
        # Not `print`: the signal may have interrupted a print, and Python's buffered files are not reentrant.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.stop}: finishing this step and saving; Ctrl-C now exits at once\n".encode())
        if self._abandons:
            self._abandons = False  # not only in the block, whose `finally` the signal may just miss
            raise Stopped(number)

    def _on_save(self, number: int, frame) -> None:
        self._saves_asked += 1


class Stoppable(contextlib.AbstractContextManager):
    """A block that SIGINT, SIGTERM and SIGHUP end at once. The program continues after the block.

    :ivar exit_code: the exit code for the program: 0, or 130, 143 or 129 after one of these signals.
    """

    def __init__(self):
        self.exit_code = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Stoppable":
        for number in terminations():
            with contextlib.suppress(ValueError):  # not in the main thread
                self._previous[number] = signal.signal(number, _raise_stopped)
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, Stopped) else signal.SIGINT
            self.exit_code = exit_code(signal.Signals(number).name)
        return self.exit_code != 0


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop. Not an `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _raise_stopped(number: int, frame) -> None:
    raise Stopped(number)


def terminations() -> list[int]:
    """The signals besides SIGINT that ask a process on this system to finish its work and end."""
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    return numbers


def exit_code(signal_name: str) -> int:
    """The exit code of a program that a signal has ended, by the convention of shells."""
    return 128 + signal.Signals[signal_name]
