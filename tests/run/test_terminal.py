"""A script's terminal may go: Ctrl-C while it starts ends it quietly, and a run outlives a closed output."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import SCRIPTS, TINY_FLAGS

from improved_diffusion.run import checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and its signals")

START = sorted(path.name for path in SCRIPTS.glob("*.py") if "improved_diffusion" in path.read_text())
# What each of them imports first of what takes long.
SLOW = ("torch", "numpy", "openpyxl", "blobfile")
# What a script needs to be told before it imports that.
FLAGS = {
    "convert_checkpoint.py": "--from_diffusers folder",
    "compare_samplers.py": "--reference folder",
    "image_eval.py": "--samples folder --reference folder",
    "image_nll.py": "--data_dir folder",
    "train_classifier.py": "--data_dir folder",
    "publish_model.py": "--model_path folder --log_dir folder",
    "super_res_sample.py": "--model_path folder --base_samples folder",
}


@pytest.mark.parametrize("script", START)
def test_ctrl_c_while_a_script_imports(tmp_path, script):
    for name in SLOW:
        (tmp_path / f"{name}.py").write_text("print('importing', flush=True); import time; time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / script, *FLAGS.get(script, "").split()],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts a program in the background with SIGINT ignored, and these tests may be that program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
def test_a_request_to_save_before_there_is_anything_to_save(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); raise ValueError('it goes on')"
    )
    done = subprocess.run(
        [sys.executable, SCRIPTS / "image_train.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "image_train.py: error: it goes on\n")


def train_in_a_shell(folder, redirection, unbuffered=""):
    """Train, with the output as `redirection` has it; returns the exit code and what standard error got."""
    flags = ["--data_dir", "builtin", "--log_dir", folder, *TINY_FLAGS, "--diffusion_steps", 4]
    flags += ["--total_steps", 40, "--batch_size", 1, "--log_interval", 1, "--sample_interval", 0]
    command = [sys.executable, SCRIPTS / "image_train.py", *flags]
    shell = ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *map(str, command)]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    done = subprocess.run(shell, **streams, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, timeout=120)
    return done.returncode, done.stderr


PIPE = "image_train.py: standard output: Broken pipe; continuing without it\n"
FULL = "image_train.py: standard output: No space left on device; continuing without it\n"


@pytest.mark.parametrize(
    "redirection, said, unbuffered",
    [
        ("| head -3", PIPE, ""),
        ("| head -3", PIPE, "1"),
        (">/dev/full", FULL, ""),
        (">/dev/full 2>/dev/full", "", "1"),
        (">&-", "", ""),
        ("<&- >&- 2>&-", "", ""),
    ],
)
def test_a_run_outlives_its_output(tmp_path, redirection, said, unbuffered):
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    run = tmp_path / "run"
    assert train_in_a_shell(run, redirection, unbuffered) == (0, said)
    assert checkpoint.find(str(run), log=pytest.fail).step == 40
    log = (run / "log.txt").read_text()
    assert "step 40/40" in log and "done: 40 steps" in log


def test_a_mistake_is_still_told(tmp_path):
    code, said = train_in_a_shell(tmp_path / "run", "--lr none >&-")
    assert code == 2 and said.startswith("image_train.py: error: ") and said.count("\n") == 1
