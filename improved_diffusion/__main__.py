"""All commands by name, from any folder: python -m improved_diffusion train --log_dir runs/cifar10"""

import ast
import difflib
import importlib.util
import os
import re
import sys
import textwrap

from improved_diffusion.jobs.script import MODULE, run_script
from improved_diffusion.shipped import compiled_kernels, shipped, why_not_compiled
from improved_diffusion.version import __version__

FIRST = ("train", "sample", "eval", "nll", "export")
SHORT = {"export_results": "export", "convert_checkpoint": "convert", "publish_model": "publish"}
CIFAR10 = "cifar10"


def commands() -> dict[str, str]:
    """The script of each command, by name; those that people need first come first."""
    folder = shipped("scripts")
    names = sorted(name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py"))
    found = {
        SHORT.get(name, name.removeprefix("image_")): os.path.join(folder, f"{name}.py") for name in names
    }
    found[CIFAR10] = os.path.join(shipped("datasets"), "cifar10.py")
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in FIRST, *_place(name)))}


def _place(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else 0), name


def overview() -> str:
    """What each command does, in a line."""
    lines = [f"usage: {' '.join(MODULE)} COMMAND [--FLAG VALUE ...]", ""]
    for name, path in commands().items():
        with open(path, encoding="utf-8") as file:
            text = ast.get_docstring(ast.parse(file.read()))
        first = re.split(r"(?<=\w)[.:](?:\s|$)|\n\n", text)[0]
        lines += textwrap.wrap(first, 110, initial_indent=f"  {name:<25}", subsequent_indent=" " * 27)
    lines += [
        "",
        f"{' '.join(MODULE)} COMMAND --help explains every flag of a command. Runs, images and data",
    ]
    lines += ["sets go to folders of the present one: runs/, samples/, nll/, datasets/."]
    if not compiled_kernels():
        lines += [
            "",
            f"note: without compiled kernels, training takes 1.7 to 2.8 times as long ({why_not_compiled()})",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run the command that the command line names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
        return
    if name == "--version":
        print(f"improved_diffusion {__version__}")
        return
    known = commands()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"{' '.join(MODULE)}: error: {name}: there is no such command; {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [" ".join([*MODULE, name]), *arguments]
    if name == CIFAR10 and "--out_dir" not in " ".join(arguments):
        sys.argv += ["--out_dir", os.path.join(os.getcwd(), "datasets")]
    spec = importlib.util.spec_from_file_location(f"{__package__}.{name}", known[name])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if not hasattr(script, "create_parser"):
        sys.exit(script.main())
    script.PROJECT = os.getcwd()  # where it writes, instead of beside itself
    script.EXAMPLES = [re.sub(r"^python \S+\.py", sys.argv[0], line) for line in script.EXAMPLES]
    run_script(script.main)


if __name__ == "__main__":
    main()
