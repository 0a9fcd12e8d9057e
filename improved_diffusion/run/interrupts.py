"""Signals as requests: what Ctrl-C, a batch system or a colleague asks of a running job, honoured in good order."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator


class Interrupts(contextlib.AbstractContextManager):
    """While entered, turns signals into attributes that a loop looks at when it can act on them.

    SIGINT, SIGTERM and SIGHUP (the terminal was closed; not under ``nohup``) set `stop` to the signal's name; a
    second SIGINT ends the process at once. SIGUSR1 sets `save`. Handlers are installed in the main thread only,
    which is where Python delivers signals; elsewhere the attributes just stay unset.

    :param echo: seconds after a signal to stop within which another one is its echo: launchers pass on what
        the terminal has sent to every process already.
    """

    def __init__(self, echo: float = 0.0):
        self._echo = echo
        self._stopped_at = -math.inf
        self._abandons = False
        self.stop: str | None = None
        self.save = False
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

    def check(self) -> None:
        """Between the steps of work that may be left out: raise `Stopped` if a signal has asked to stop."""
        if self.stop in signal.Signals.__members__:
            raise Stopped(signal.Signals[self.stop])

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """A block of Python code that may be left out: a signal to stop raises `Stopped` anywhere within it."""
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
        # The handler may have interrupted a print: Python's buffered files must not be entered again.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.stop}: finishing this step and saving; Ctrl-C now exits at once\n".encode())
        if self._abandons:
            raise Stopped(number)

    def _on_save(self, number: int, frame) -> None:
        self.save = True


class Stoppable(contextlib.AbstractContextManager):
    """A block of work that SIGINT, SIGTERM and SIGHUP end at once, and the program goes on after it.

    :ivar exit_code: 0 or, when one of them came, 130, 143 or 129: what the program shall exit with.
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
    """A signal has asked to stop; not an error, which somebody might handle as such."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _raise_stopped(number: int, frame) -> None:
    raise Stopped(number)


def terminations() -> list[int]:
    """The signals besides SIGINT that ask this process to end in good order, on this system."""
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    return numbers


def exit_code(signal_name: str) -> int:
    """What a program exits with that a signal has ended, by the convention of shells."""
    return 128 + signal.Signals[signal_name]
