"""What scripts do about their terminal: Ctrl-C during the start, and output that cannot be written.

Scripts call `start` before their other imports, so this module imports nothing that takes long.
"""

import contextlib
import io
import os
import signal
import sys


def start() -> None:
    """Prepare this process. Call it once, at the start of a script.

    Until `clean_up_on_ctrl_c`, Ctrl-C ends the process at once, with exit code 130 and without a message.

    SIGUSR1, by which schedulers ask a training to save, is ignored, except while a training heeds it (`Interrupts`).

    From now on, output that cannot be written is dropped, because the terminal is closed, the disk is full or the
    program behind a pipe has ended. The first time, a line on standard error says so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_quietly)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # The next file that is opened would get the number of a closed descriptor, and error messages would go into it.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def clean_up_on_ctrl_c() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit_quietly(number: int, frame) -> None:
    os._exit(130)


def _outliving(stream: io.TextIOBase | None) -> io.TextIOBase:
    """The standard stream `stream`, changed so that writing to it never fails."""
    if stream is None:
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    unbuffered = isinstance(buffer, io.FileIO)  # python -u
    file = buffer if unbuffered else getattr(buffer, "raw", None)
    if not isinstance(file, io.FileIO):  # replaced by a test or a notebook
        return stream
    outliving = _Outliving(file)
    return io.TextIOWrapper(
        outliving if unbuffered else io.BufferedWriter(outliving),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Outliving(io.RawIOBase):
    """A file for writing that drops what cannot be written, and prints a line the first time."""

    def __init__(self, file: io.FileIO):
        self._file = file
        self._has_failed = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data) -> int:
        try:
            return self._file.write(data) or len(data)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                name = {1: "standard output", 2: "standard error"}.get(self.fileno(), "the output")
                line = f"{os.path.basename(sys.argv[0])}: {name}: {error.strerror}; continuing without it\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode("utf-8", "replace"))
            return len(data)
