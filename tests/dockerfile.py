"""The Dockerfile for tests: its instructions, and the files that a build is given."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile and what follows it, continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, which begins with FROM."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions(path):
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def words(rest: str) -> list[str]:
    """The words of an instruction in exec form, or separated by spaces."""
    return json.loads(rest) if rest.startswith("[") else rest.split()


def context(root: Path) -> list[str]:
    """The tracked files that a build is given, as .dockerignore says; that ignores all but what it excepts."""
    patterns = [
        line for line in (root / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"
    ]
    assert patterns[0] == "*"
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    kept = []
    for name in listed.stdout.splitlines():
        included = False
        for pattern in patterns:
            wanted = pattern.startswith("!")
            pattern = pattern.lstrip("!").removeprefix("**/")
            parts = name.split("/")
            starts = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
            if any(fnmatch(start, pattern) and start.count("/") == pattern.count("/") for start in starts):
                included = wanted
        if included:
            kept.append(name)
    return kept
