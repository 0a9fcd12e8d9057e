"""The frame of every script: exit codes, errors in one line, and Ctrl-C."""

import os
import sys
import time
from collections.abc import Callable

from improved_diffusion.flags import one_line
from improved_diffusion.run import terminal

MODULE = ("python", "-m", "improved_diffusion")


def started_as() -> list[str]:
    """The words that started this program, without its flags."""
    return sys.argv[0].split() if sys.argv[0].startswith(" ".join(MODULE)) else ["python", sys.argv[0]]


def command(name: str, project: str) -> list[str]:
    """The words that start another command.

    :param name: the name of its script, without ".py".
    :param project: the folder with ``scripts``. If it has no such script, the command is one of the package.
    """
    script = os.path.join(project, "scripts", f"{name}.py")
    return ["python", script] if os.path.exists(script) else [*MODULE, name.removeprefix("image_")]


def run_script(main: Callable[[], Callable[[], int | None]]) -> None:
    """Run a script and exit. A user's mistake is reported in one line, without a traceback, and with exit code 2.

    :param main: checks the flags, does the slow imports, and returns the job, whose result is the exit code. Until the
        job begins, Ctrl-C ends the process without a message.
    """
    terminal.start()
    try:
        _check_clock()
        job = main()
        limit_threads()
        terminal.clean_up_on_ctrl_c()
        code = job() or 0
        from improved_diffusion import dist_util

        dist_util.finish()
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        import blobfile as bf

        message = one_line(str(error))
        if is_out_of_memory(error):
            message = f"{OUT_OF_MEMORY}, or a smaller --batch_size"
        elif not isinstance(error, ValueError | OSError | bf.Error):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _check_clock() -> None:
    """:raises ValueError: the clock was never set, as on a small computer without a battery.

    Workbooks, weights and `.npz` files are zip archives, which have no dates before 1980. Without this check, writing
    them would fail after hours of work.
    """
    if time.localtime().tm_year < 1980:
        raise ValueError(f"the clock of this machine says {time.strftime('%Y-%m-%d')}; set it first")


OUT_OF_MEMORY = (
    "there is not enough memory; in training, give a smaller --microbatch or --use_checkpoint True"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch raised `error` because the memory is full."""
    words = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
    )


def limit_threads() -> None:
    """Limit PyTorch's threads to the CPU quota of a container, which PyTorch does not know."""
    import torch as th

    from improved_diffusion.cpu.machine import usable_cores

    if th.get_num_threads() > usable_cores():
        th.set_num_threads(usable_cores())
