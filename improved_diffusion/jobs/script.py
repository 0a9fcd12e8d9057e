"""How every script begins and ends: with a usable terminal, an exit code, and users' mistakes in one line."""

import os
import sys
from collections.abc import Callable

from improved_diffusion.flags import one_line
from improved_diffusion.run import terminal


def run_script(main: Callable[[], Callable[[], int | None]]) -> None:
    """Run a script and exit: users' mistakes in one line and code 2, without a traceback.

    :param main: checks the flags, then imports what takes long, and returns the job. Until the job begins, Ctrl-C
        ends the process quietly.
    """
    terminal.start()
    try:
        job = main()
        _limit_threads()
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
            message = f"{OUT_OF_MEMORY}, or fewer images at a time (--batch_size)"
        elif not isinstance(error, ValueError | OSError | bf.Error):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)


OUT_OF_MEMORY = (
    "there is not enough memory; in training, give a smaller --microbatch or --use_checkpoint True"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch could not get the memory they asked the system for."""
    words = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
    )


def _limit_threads() -> None:
    """Let PyTorch use no more threads than a container's CPU quota allows, at which it does not look itself."""
    import torch as th

    from improved_diffusion.cpu.machine import usable_cores

    if th.get_num_threads() > usable_cores():
        th.set_num_threads(usable_cores())
