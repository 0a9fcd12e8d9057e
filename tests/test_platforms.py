"""What other systems lack is asked for before it is used, so that a plain install works on macOS and Windows too."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_FLAGS
from PIL import Image

CODE = [
    path
    for folder in ("improved_diffusion", "scripts", "datasets")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# What Python's documentation marks as "Availability: Unix", or as not on Windows or macOS, and programs like this use.
MODULES = {
    *("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "curses", "readline"),
    *("msvcrt", "winreg"),
}
ATTRIBUTES = {
    "os": {
        *(
            "fork",
            "forkpty",
            "wait",
            "waitpid",
            "WNOHANG",
            "kill",
            "killpg",
            "setsid",
            "setpgid",
            "getpgid",
            "nice",
        ),
        *(
            "getuid",
            "geteuid",
            "getgid",
            "getegid",
            "uname",
            "sysconf",
            "statvfs",
            "getloadavg",
            "mkfifo",
            "mknod",
        ),
        *("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "sync", "fdatasync"),
        *("chown", "fchown", "fchmod", "chroot", "getpriority", "setpriority", "memfd_create", "sendfile"),
        *(
            "O_DIRECTORY",
            "O_NOFOLLOW",
            "O_CLOEXEC",
            "O_NONBLOCK",
            "O_SYNC",
            "O_DSYNC",
            "O_DIRECT",
            "O_TMPFILE",
        ),
    },
    "signal": {
        *(
            "SIGHUP",
            "SIGKILL",
            "SIGQUIT",
            "SIGUSR1",
            "SIGUSR2",
            "SIGALRM",
            "SIGCHLD",
            "SIGCONT",
            "SIGSTOP",
            "SIGPIPE",
        ),
        *("alarm", "setitimer", "pause", "pthread_kill", "pthread_sigmask", "sigwait", "siginterrupt"),
    },
    "time": {"tzset", "clock_gettime", "CLOCK_MONOTONIC"},
}


def unguarded(source: str) -> list[str]:
    """What `source` uses of `MODULES` and `ATTRIBUTES` without asking whether it exists.

    An import is guarded by `try` and `except ImportError`; an attribute by `hasattr` in the same function, or by `try`
    and `except AttributeError`.
    """
    found = []

    def caught(body: ast.Try) -> set[str]:
        return {
            n.id
            for handler in body.handlers
            if handler.type
            for n in ast.walk(handler.type)
            if isinstance(n, ast.Name)
        }

    def visit(node: ast.AST, errors: set[str], asked: set[tuple[str, str]]) -> None:
        if isinstance(node, ast.Try):
            for child in node.body:
                visit(child, errors | caught(node), asked)
            for child in (*node.handlers, *node.orelse, *node.finalbody):
                visit(child, errors, asked)
            return
        if isinstance(node, (ast.Module, ast.FunctionDef)):
            calls = [
                n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "hasattr"
            ]
            asked = {
                (ast.unparse(n.args[0]), ast.literal_eval(n.args[1]))
                for n in calls
                if isinstance(n.args[1], ast.Constant)
            }
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if not errors & {"ImportError", "ModuleNotFoundError"}:
                found.extend(name for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom):
                lacking = ATTRIBUTES.get(node.module or "", set())
                found.extend(f"{node.module}.{a.name}" for a in node.names if a.name in lacking)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if (
                name in ATTRIBUTES.get(module, ())
                and (module, name) not in asked
                and "AttributeError" not in errors
            ):
                found.append(f"{module}.{name}")
        for child in ast.iter_child_nodes(node):
            visit(child, errors, asked)

    visit(ast.parse(source), set(), set())
    return found


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import fcntl", ["fcntl"]),
        ("import os, resource as r", ["resource"]),
        ("from signal import SIGHUP, SIGTERM", ["signal.SIGHUP"]),
        ("try:\n import fcntl\nexcept ImportError:\n pass", []),
        ("try:\n import fcntl\nexcept OSError:\n pass", ["fcntl"]),
        ("try:\n pass\nexcept ImportError:\n import fcntl", ["fcntl"]),
        ("os.getloadavg()", ["os.getloadavg"]),
        ("if hasattr(os, 'getloadavg'): os.getloadavg()", []),
        ("def f():\n return os.fork()\ndef g():\n return hasattr(os, 'fork')", ["os.fork"]),
        ("try:\n os.sysconf('x')\nexcept (ValueError, AttributeError):\n pass", []),
        ("signal.signal(signal.SIGHUP, f)", ["signal.SIGHUP"]),
        ("os.replace(a, b); signal.SIGTERM; os.path.join(a)", []),
    ],
)
def test_the_check_finds_what_is_not_asked_for(source, expected):
    assert unguarded(source) == expected


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_used_that_other_systems_lack(path):
    assert unguarded(path.read_text(encoding="utf-8")) == []


# Python and PyTorch themselves need these on this system.
KEPT = {
    *(("os", name) for name in ("fork", "waitpid", "WNOHANG", "kill", "sendfile", "O_CLOEXEC")),
    *(("signal", name) for name in ("SIGCHLD", "pthread_sigmask")),
}
# A script in a process that lacks what Windows lacks. Paths and files stay those of this system.
POOR_SYSTEM = """
import ctypes, multiprocessing, os, platform, runpy, signal, sys, time
import blobfile, filelock, openpyxl, platformdirs, torch  # which know what this system has

class Lock:  # filelock's needs fcntl on this system, and msvcrt on Windows
    def __init__(self, path): pass
    def acquire(self, timeout): pass
    def release(self): pass

if __name__ == "__main__":
    for module, name in {absent!r}:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
    sys.modules.update(dict.fromkeys({modules!r}))  # importing them fails
    filelock.FileLock = Lock
    load = ctypes.CDLL.__init__

    def refuse_none(self, name, *arguments, **options):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        load(self, name, *arguments, **options)

    ctypes.CDLL.__init__ = refuse_none
    platform.system, platform.machine, platform.processor = (lambda: "Windows"), (lambda: "ARM64"), (lambda: "?")
    multiprocessing.set_start_method("spawn")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_process_without_what_windows_lacks_trains_and_draws(tmp_path):
    absent = [
        (module, name) for module, names in ATTRIBUTES.items() for name in names if (module, name) not in KEPT
    ]
    program = tmp_path / "poor.py"
    program.write_text(POOR_SYSTEM.format(absent=absent, modules=sorted(MODULES - {"posix"})))
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")

    def call(script, *flags):
        command = [sys.executable, program, ROOT / "scripts" / script, *flags, "--precision", "fp32"]
        environment = {**os.environ, "IMPROVED_DIFFUSION_KERNELS": "0"}
        done = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run = tmp_path / "run"
    data = ["--data_dir", tmp_path / "images", "--cache_limit_gb", 0, "--data_workers", 1, "--batch_size", 2]
    for steps in (1, 2):  # the second one continues the first one's run
        said = call("image_train.py", *data, *TINY_FLAGS, "--log_dir", run, "--total_steps", steps)
        assert "without compiled kernels" in said
    machine = json.loads((run / "run.json").read_text())["machine"]
    assert machine["memory_gb"] is None and machine["processor"] == "?"
    call("image_sample.py", "--model_path", run, "--num_samples", 2, "--log_dir", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "grid.png").exists()
