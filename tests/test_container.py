"""The Dockerfile, without Docker: its rules, the files that it takes, and what its last stage does with them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from dockerfile import context, instructions, stages, words

DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
BUILD, LAST = stages(DOCKERFILE)


def all_of(stage, name):
    return [rest for instruction, rest in stage if instruction == name]


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint")
def test_the_linter_has_nothing_to_say():
    done = subprocess.run([HADOLINT, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_what_runs_is_not_root_and_has_no_compiler():
    (user,) = all_of(LAST, "USER")
    assert int(user) > 0
    order = [name for name, _ in LAST]
    assert "RUN" not in order[order.index("USER") :]
    assert any("gcc" in run for run in all_of(BUILD, "RUN"))
    assert not any("gcc" in run or "pip" in run for run in all_of(LAST, "RUN"))
    assert not all_of(BUILD + LAST, "ADD")  # which would fetch from anywhere


def test_torch_is_one_that_the_package_admits():
    (admitted,) = re.findall(r'"torch([^"]+)"', (ROOT / "setup.py").read_text("utf-8"))
    (installed,) = re.findall(r'pip install[^"]*"torch([^"]+)"', "\n".join(all_of(BUILD, "RUN")))
    assert installed == admitted


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a clone knows which files are the project's")
def test_the_build_gets_what_it_needs():
    files = context(ROOT)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"} <= set(files)
    assert all((ROOT / "improved_diffusion" / "kernels" / name).exists() for name in ("kernels.c", "norm.h"))
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert folders == {"improved_diffusion", "scripts", "datasets", "models"}
    assert all_of(BUILD, "COPY") == [". ."]
    assert all_of(LAST, "COPY") == ["--from=build /opt/venv /opt/venv"]
    assert not [name for name in files if name.startswith(("tests", "docs", ".ci"))]


@pytest.mark.skipif(os.name != "posix", reason="runs shell commands")
def test_the_last_stage_draws_without_a_network(tmp_path):
    """Its folders and its command, with the packages of this environment."""
    app = tmp_path / "app"
    app.mkdir()
    (folders,) = [run for run in all_of(LAST, "RUN") if run.startswith("mkdir")]
    subprocess.run(folders.replace("/app", str(app)), shell=True, check=True)
    (workdir,), (entry,), (command,) = (all_of(LAST, name) for name in ("WORKDIR", "ENTRYPOINT", "CMD"))
    assert workdir == "/app" and words(entry)[0] == "python"
    environment = dict(part.split("=", 1) for rest in all_of(LAST, "ENV") for part in words(rest))
    environment = {
        name: value.replace("/app", str(app)) for name, value in environment.items() if name != "PATH"
    }
    assert set(environment) >= {"IMPROVED_DIFFUSION_CACHE"}
    # Where a network namespace can be had, there is no network in it.
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    few = ["--num_samples", "2", "--sample_steps", "1", "--num_workers", "1"]
    done = subprocess.run(
        [*alone, sys.executable, *words(entry)[1:], *words(command), *few],
        cwd=app,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(app.glob("samples/*/grid.png"))) == 1


def test_every_instruction_is_known():
    known = {"FROM", "SHELL", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions(DOCKERFILE)} <= known
