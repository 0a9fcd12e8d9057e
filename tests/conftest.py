"""Shared by all tests: small models, and every cache and run kept out of the user's folders."""

import gc
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

# Tests compare bits and share cores; one thread makes both easy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
}
TINY_FLAGS = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]


def pytest_collection_finish():
    """Leave what was imported out of garbage collection, which saves a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)


@pytest.fixture(autouse=True)
def _own_threads():
    """A training loop sets the number of PyTorch's threads; the next test shall not notice."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def run_script():
    """Run a script of the project as a user would; returns the finished process with its output as text."""

    def run(name, *args, cwd=None, check=None, timeout=300):
        command = [sys.executable, str(SCRIPTS / name), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def call_script(monkeypatch, capsys):
    """Run a script within this process, which saves the seconds of its start."""

    def call(name, *args, check=None):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        output = capsys.readouterr()
        if check is not None:
            assert exit.value.code == check, f"exit {exit.value.code}\n{output.out}\n{output.err}"
        return subprocess.CompletedProcess(sys.argv, exit.value.code, output.out, output.err)

    return call


@pytest.fixture
def train(call_script):
    """Run image_train.py on a tiny model and the built-in shapes; later flags override earlier ones."""

    def run(*args, check=0):
        return call_script("image_train.py", "--data_dir", "builtin", *TINY_FLAGS, *args, check=check)

    return run


def environment_without_choice_of_kernels():
    """The variables for a process that is to use the newest kernels, whatever these tests are run with."""
    return {key: value for key, value in os.environ.items() if key != "IMPROVED_DIFFUSION_KERNELS"}


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_trained(folder, step=4, class_names=(), **arguments):
    """A run directory with one checkpoint of a model whose weights are random, not trained; returns `folder`.

    :param arguments: flags that differ from `TINY`; with `large_size`, it is a super-resolution model.
    """
    import torch as th

    from improved_diffusion import script_util
    from improved_diffusion.run import checkpoint

    defaults = script_util.model_and_diffusion_defaults()
    if "large_size" in arguments:
        defaults = script_util.sr_model_and_diffusion_defaults()
    tiny = {name: value for name, value in TINY.items() if name in defaults}
    arguments = {**defaults, **tiny, "diffusion_steps": 20, **arguments}
    th.manual_seed(0)
    weights = script_util.create_from_flags(script_util.describe_model(arguments))[0].state_dict()
    weights = {name: 0.9 * value + 0.02 * th.randn_like(value) for name, value in weights.items()}
    state = {"samples": 8 * step, "arguments": arguments, "data": {"class_names": list(class_names)}}
    tensors = {"model": weights, "0.99": weights, "opt": {"state": {}, "param_groups": []}}
    Path(folder).mkdir(exist_ok=True)
    checkpoint.save(str(folder), step, tensors, state)
    return folder
