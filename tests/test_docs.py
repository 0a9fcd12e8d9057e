"""The documentation: links lead somewhere, commands are accepted, what is named exists, the README stays short."""

import argparse
import os
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT

from improved_diffusion.__main__ import commands as scripts

PAGES = sorted(
    path
    for part in ("*.md", "docs/*.md", "datasets/*.md", "models/*/*.md", "tests/**/*.md")
    for path in ROOT.glob(part)
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
SCRIPT = re.compile(r"(?:python|mpiexec|torchrun) (?:.* )?((?:scripts/|datasets/)?\w+\.py)(?: (.*))?")
MODULE = re.compile(r"python -m improved_diffusion (\w+)(?: (.*))?")
FOLDERS = ("", "scripts", "datasets", "improved_diffusion", "tests")
FILES_OF_OTHERS = {"download.py", "utils.py"}  # LSUN's, and one that shall not be
FLAGS_OF_OTHERS = {"--nproc_per_node", "--node_rank", "--nnodes", "--master_addr", "--master_port"}


class Parsed(BaseException):
    """Ends a script once it has parsed its command line."""


def find(name: str):
    """The file or folder that documentation calls `name`, or None."""
    return next((path for folder in FOLDERS if (path := ROOT / folder / name).exists()), None)


def commands(text: str) -> list[tuple[str, str]]:
    """Script and arguments of each command in the shell blocks of a page, and in its inline code."""
    shell = "\n".join(body for language, body in BLOCK.findall(text) if language == "sh")
    lines = re.sub(r"\\\n\s*", "", shell).replace("&&", "\n").splitlines()
    lines += [code for code in CODE.findall(BLOCK.sub("", text)) if not re.search(r"\.\.\.|[A-Z]{3}", code)]
    found = [
        match.groups(default="")
        for line in lines
        if (match := SCRIPT.match(line.strip())) and match[1] not in FILES_OF_OTHERS
    ]
    modules = [match.groups(default="") for line in lines if (match := MODULE.match(line.strip()))]
    return found + [(os.path.relpath(scripts()[name], ROOT), flags) for name, flags in modules]


def parse(monkeypatch, script: str, arguments: list[str]) -> argparse.Namespace:
    """What the script's own parser makes of `arguments`. Fails the test when it refuses them."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        namespace, unknown = original(self, args, namespace)
        raise Parsed(namespace, unknown)

    path = find(script)
    assert path, f"{script} does not exist"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Parsed as parsed:
        namespace, unknown = parsed.args
        assert not unknown, f"{script} has no {' '.join(unknown)}"
        return namespace
    except SystemExit:
        pass
    pytest.fail(f"{script} refuses {' '.join(arguments)}")


def flags_of(monkeypatch, capsys, script: str) -> set[str]:
    """The flags that stand in the script's --help."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    lines = re.findall(r"^ {1,4}-.*$", capsys.readouterr().out, re.MULTILINE)
    return {flag for line in lines for flag in re.findall(r"--[\w-]+", line)}


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12 * 1024


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_accepted(name, monkeypatch):
    for script, arguments in commands((ROOT / name).read_text(encoding="utf-8")):
        parse(monkeypatch, script, shlex.split(arguments, comments=True))


def test_commands_are_found():
    readme = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    scripts = {script for script, _ in readme}
    assert {"scripts/image_train.py", "scripts/image_sample.py", "scripts/benchmark.py"} <= scripts
    assert any("--microbatch 4" in flags for _, flags in readme)  # which is on a continued line


def test_flags_exist(monkeypatch, capsys):
    scripts = [
        *ROOT.glob("scripts/*.py"),
        *ROOT.glob("datasets/*.py"),
    ]
    known = FLAGS_OF_OTHERS.union(*(flags_of(monkeypatch, capsys, str(script)) for script in scripts))
    for page in PAGES:
        for code in CODE.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known
            assert not unknown, f"{page.name}: `{code}`"


@pytest.mark.parametrize("name", NAMES)
def test_blocks_can_be_pasted(name):
    for language, body in BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if language == "sh":
            # A shell reads <date> as redirection; an argument "..." would have to be guessed.
            assert not re.search(r"(?<!<)<[\w ]+>|\s\.\.\.", body), body


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    for code in CODE.findall(BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))):
        for file in re.findall(r"(?<![\w/.])[\w/]+\.(?:py|c|h)\b", code):
            assert file in FILES_OF_OTHERS or find(file), file


def test_the_map_of_the_code_is_complete():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (drawing,) = [body for _, body in BLOCK.findall(text) if body.startswith("improved_diffusion/")]
    package = ROOT / "improved_diffusion"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"\b(\w+)/", drawing)) == folders | {
        "improved_diffusion",
        "scripts",
        "datasets",
        "tests",
    }
    parts = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout")[1].split("\n## ")[0]
    for row in re.findall(r"^\| \w[^|]*\|([^|]*)\|", parts, re.MULTILINE):
        for part in CODE.findall(row):
            assert find(part) or find(f"{part}.py"), part


def test_ci_runs_what_the_readme_says():
    (command,) = [
        body.strip() for _, body in BLOCK.findall((ROOT / "README.md").read_text("utf-8")) if "pytest" in body
    ]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_cpu_build_of_torch_is_one_that_the_package_admits():
    (admitted,) = re.findall(r'"torch([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    (offered,) = re.findall(r'pip install "torch([^"]+)"', (ROOT / "README.md").read_text(encoding="utf-8"))
    assert offered == admitted
    assert f"`{admitted}`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
