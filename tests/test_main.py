"""`python -m improved_diffusion`: every script is a command, from any folder; an installed package has all it needs."""

import os
import platform
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, TINY_FLAGS, environment_without_choice_of_kernels, read_json

from improved_diffusion import __main__ as commands
from improved_diffusion.jobs.script import command


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install .` puts into site-packages where there is no compiler."""
    folder, rest = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("build")
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", folder, "--build-base", rest]
    environment = {**os.environ, "CC": "no-such-compiler"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    return folder


def run(*arguments, cwd, package=ROOT, timeout=300):
    environment = environment_without_choice_of_kernels()
    environment["PYTHONPATH"] = str(package)
    line = [sys.executable, "-m", "improved_diffusion", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def test_every_script_is_a_command():
    found = commands.commands()
    assert list(found)[:4] == ["train", "sample", "eval", "nll"]
    assert {os.path.basename(path) for path in found.values()} == {
        *(path.name for path in SCRIPTS.glob("*.py")),
        "cifar10.py",
    }
    assert found["export"].endswith("export_results.py") and found["convert"].endswith(
        "convert_checkpoint.py"
    )


def test_the_overview_is_short(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
        commands.main()
        lines = capsys.readouterr().out.splitlines()
        assert "python -m improved_diffusion COMMAND" in lines[0] and len(lines) < 30
        assert max(map(len, lines)) <= 110
        assert any(line.startswith("  train ") and "Train a diffusion model" in line for line in lines)


def test_mistakes_are_one_line(tmp_path):
    for arguments, message in (
        (["tran"], "tran: there is no such command; did you mean train?"),
        (["xyz"], "xyz: there is no such command; there are train, sample"),
        (
            ["train", "--lr", "fast"],
            "python -m improved_diffusion train: error: --lr fast: expected a number",
        ),
        (["sample", "--model_path", "nothing"], "--model_path nothing: there is no such file"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_an_installed_package_brings_the_model_and_writes_where_one_is(installed, tmp_path):
    options = ["--num_samples", 1, "--sample_steps", 1, "--precision", "fp32"]
    done = run("sample", *options, cwd=tmp_path, package=installed)
    assert done.returncode == 0, done.stderr
    assert str(installed / "improved_diffusion" / "models" / "cifar10") in done.stdout
    (drawn,) = (tmp_path / "samples").iterdir()
    assert (drawn / "grid.png").exists()
    _assert_kernels_are_missed(done.stdout)


def test_the_overview_says_that_there_was_no_compiler(installed, tmp_path):
    _assert_kernels_are_missed(run(cwd=tmp_path, package=installed).stdout)


def _assert_kernels_are_missed(text):
    """A single line says what is lost without compiled kernels, and what helps."""
    (line,) = (line for line in text.splitlines() if "without compiled kernels" in line)
    assert "training takes 1.7 to 2.8 times as long" in line
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64"):
        assert "no compiler was found at the installation: install GCC and repeat it" in line
    else:
        assert "there are none for" in line


def test_an_installed_package_trains_where_one_is(installed, tmp_path):
    flags = [*TINY_FLAGS, "--data_dir", "builtin", "--total_steps", 1, "--sample_interval", 0]
    done = run("train", *flags, "--precision", "fp32", cwd=tmp_path, package=installed)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"To draw images: python -m improved_diffusion sample --model_path {run_dir}" in done.stdout
    _assert_kernels_are_missed(done.stdout)
    recorded = shlex.split(read_json(run_dir / "run.json")["command"])
    assert recorded[:4] == ["python", "-m", "improved_diffusion", "train"] and "--total_steps" in recorded
    exported = run("export", run_dir, "--output", tmp_path / "book.xlsx", cwd=tmp_path, package=installed)
    assert exported.returncode == 0 and (tmp_path / "book.xlsx").exists(), exported.stderr


def test_data_sets_go_to_the_present_folder(installed, tmp_path):
    done = run("cifar10", "--archive", tmp_path / "absent.tar.gz", cwd=tmp_path, package=installed)
    assert done.returncode == 2 and "absent.tar.gz" in done.stderr
    assert (tmp_path / "datasets").is_dir() and not (
        installed / "improved_diffusion" / "cifar_train"
    ).exists()


def test_commands_are_told_in_the_way_that_works():
    assert command("image_sample", str(ROOT)) == ["python", str(SCRIPTS / "image_sample.py")]
    assert command("image_sample", "/nowhere") == ["python", "-m", "improved_diffusion", "sample"]
    assert command("super_res_sample", "/nowhere")[-1] == "super_res_sample"


def test_all_that_an_installed_package_needs_is_in_a_source_archive():
    text = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for part in ("kernels *.c *.h", "recursive-include models *", "scripts/*.py", "datasets/*.py"):
        assert part in text
