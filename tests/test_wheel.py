"""The wheel that `pip wheel .` and `python -m build` make: nobody who installs it needs a compiler."""

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import ROOT, environment_without_choice_of_kernels

from improved_diffusion import kernels
from improved_diffusion.shipped import compiled_kernels

PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("improved_diffusion", "scripts", "datasets", "models")

COMPUTE = """
import sys
import torch as th
import torch.nn.functional as F
from torch import nn
from improved_diffusion import kernels
from improved_diffusion.kernels.norm import norm_act, suits

assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
x = th.randn(2, 64, 8, 8).contiguous(memory_format=th.channels_last)
norm = nn.GroupNorm(32, 64)
expected = F.silu(F.group_norm(x.double(), 32))
usable = []
for generation in kernels.GENERATIONS:
    with kernels.switched(generation):
        if kernels.generation() == generation:
            usable.append(generation)
            assert suits(x, norm)
            found, _ = norm_act(norm, x, activate=True)
            assert (found - expected).norm() < 1e-6 * expected.norm()
print(*usable)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The path of a wheel that was built without a network, from a copy, because builds write into their folder."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or shutil.which("gcc") is None:
        pytest.skip("needs GCC, on Linux and x86-64")
    if None in map(importlib.util.find_spec, ("pip", "setuptools")):
        pytest.skip("needs pip and setuptools")
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS:
        shutil.copy(ROOT / name, folder)
    own = shutil.ignore_patterns("compiled*", "__pycache__", "cifar_*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=own)
    if kernels.generation() is not None:
        # `pip install -e .` has compiled these sources, and a build does not repeat what is there.
        built = folder / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (built / "improved_diffusion" / "kernels").mkdir(parents=True)
        for path in compiled_kernels():
            shutil.copy(path, built / "improved_diffusion" / "kernels")
    command = [sys.executable, "-m", "pip", "wheel", str(folder), "--wheel-dir", str(folder / "made")]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, *offline], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (folder / "made").iterdir()
    return made


def test_it_is_for_every_version_of_python(wheel):
    _, _, *tags = wheel.stem.split("-")
    assert tags == ["cp310", "abi3", "linux_x86_64"]


def test_it_has_the_kernels_of_all_generations_and_all_that_comes_with_the_code(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (library,) = (name for name in names if name.startswith("improved_diffusion/kernels/compiled"))
        content = file.read(library)
    for generation in kernels.GENERATIONS:
        assert f"_{generation}\0".encode() in content, generation  # the end of a function's name
    for folder in ("models", "scripts"):
        shipped = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        shipped = {path for path in shipped if "__pycache__" not in path.parts}
        assert {f"improved_diffusion/{path.as_posix()}" for path in shipped} <= names
    assert not [name for name in names if name.endswith((".c", ".h")) or name.startswith("tests/")]


def test_its_kernels_are_chosen_at_run_time(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    environment = environment_without_choice_of_kernels()
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    here = [name for name in kernels.GENERATIONS if _can_run(name)]
    assert done.stdout.split() == here


def _can_run(generation):
    with kernels.switched(generation):
        return kernels.generation() == generation
