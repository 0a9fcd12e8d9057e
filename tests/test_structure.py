"""The structure of the package: imports go downwards only, and nothing imports MPI or the GPU on the side."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "improved_diffusion"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem != "__init__"
}
# A room is a file or folder right below the package. Each floor may import from itself and the floors before it.
FLOORS = [
    {"kernels", "losses", "weighting", "nn", "storage", "seeding", "progress"}
    | {"flags", "config", "levels", "learning_rate", "recipes", "shipped", "version"},
    {"gaussian_diffusion", "respace", "resample", "samplers", "editing", "unet", "cpu"},
    {"logger", "run", "dist_util", "data", "image_datasets", "low_res", "results"},
    {"train_util", "sample_util", "pictures", "evaluation", "script_util", "convert", "drawn"},
    {"jobs", "comparison"},
    {"benchmark", "__main__", "api"},
]
MATHEMATICS = {"losses", "weighting", "gaussian_diffusion", "respace", "resample", "samplers", "editing"}
WITHOUT_TORCH = {
    "storage",
    "logger",
    "results",
    "flags",
    "config",
    "learning_rate",
    "levels",
    "recipes",
    "shipped",
    "version",
}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path, at_start: bool = False) -> list[str]:
    """The modules that a file imports, in full; `at_start`: only what it imports when it is imported itself."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += inner if node.module == "improved_diffusion" else [node.module]
    return found


ROOMS: dict[str, set[str]] = {}
OTHERS: dict[str, set[str]] = {}
for module, path in FILES.items():
    ours = {room(name) for name in imports(path) if name.startswith("improved_diffusion.")}
    ROOMS.setdefault(room(module), set()).update(ours - {room(module)})
    OTHERS.setdefault(room(module), set()).update(name.split(".")[0] for name in imports(path, at_start=True))


def test_imports_go_downwards():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for name, imported in ROOMS.items():
        assert all(floor[other] <= floor[name] for other in imported), f"{name} imports {imported}"


def test_no_cycles():
    done: set[str] = set()
    while ready := {name for name, imported in ROOMS.items() if name not in done and imported <= done}:
        done |= ready
    assert done == set(ROOMS), f"cycle among {set(ROOMS) - done}"


def test_mathematics_knows_nothing_else():
    assert set().union(*(ROOMS[name] for name in MATHEMATICS)) <= MATHEMATICS


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_rooms_that_do_without_torch(name):
    assert "torch" not in OTHERS[name] and ROOMS[name] <= WITHOUT_TORCH


def test_every_file_says_what_it_is_for():
    for module, path in FILES.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring and len(docstring.splitlines()[0]) > 20, module


def test_importing_everything_touches_no_mpi():
    modules = sorted(name.removesuffix(".__init__") for name in FILES)
    code = "import sys\n" + "\n".join(f"import {name}" for name in modules)
    code += "\nassert not [name for name in sys.modules if name.startswith('mpi4py')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
