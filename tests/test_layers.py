"""The structure of the package: imports go downwards only, and nothing imports MPI or the GPU on the side."""

import ast
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "improved_diffusion"

# From the bottom up. A module may import from layers below its own and from its own layer, without cycles.
LAYERS = [
    {"kernels", "kernels.norm", "kernels.attention", "kernels.update"},
    {"storage", "losses", "seeding", "nn", "cpu", "tensor_file", "evaluation", "progress", "timing"},
    {"gaussian_diffusion", "respace", "resample", "samplers", "unet"},
    {"workers", "compute", "gradients", "inference", "optimizer", "plain"},
    {"builtin_images", "image_reading", "image_cache", "image_folder", "image_set", "batch_stream"},
    {"image_datasets", "low_res"},
    {"logger", "checkpoint", "interrupts", "run_lock", "remote_run", "heartbeat", "dist_util"},
    {"results_style", "results_columns", "results_run", "results_charts", "results_overview", "results"},
    {
        "train_util",
        "sample_util",
        "pictures",
        "class_labels",
        "bits_per_dim",
        "inception",
        "features",
        "reference_cache",
        "measuring",
        "evaluation_report",
        "previews",
    },
    {"flags"},
    {"script_util", "diffusers_config"},
    {
        "runs",
        "sample_job",
        "comparison",
        "gallery",
        "comparison_picture",
        "comparison_report",
        "comparison_job",
    },
    {"train_job", "convert", "publish"},
    {
        "benchmark",
        "benchmark_peaks",
        "benchmark_training",
        "benchmark_parts",
        "benchmark_sampling",
        "benchmark_ablation",
        "benchmark_cost",
        "benchmark_report",
    },
]
MATHEMATICS = {"losses", "gaussian_diffusion", "respace", "resample", "samplers"}
WITHOUT_TORCH = {
    "storage",
    "logger",
    "results",
    "run_lock",
    "interrupts",
    "heartbeat",
    "evaluation",
    "evaluation_report",
    *next(layer for layer in LAYERS if "results" in layer),
}


def _name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(path): path for path in PACKAGE.rglob("*.py") if _name(path)}


def imports(module):
    """The modules that a module imports at its top: (those of ours, others)."""
    ours, others = set(), set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [node.module]
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == "improved_diffusion" or inner[0].partition(".")[2] in MODULES:
                names = inner
        else:
            continue
        for name in names:
            if name.startswith("improved_diffusion."):
                ours.add(name.partition(".")[2])
            elif node.col_offset == 0:
                others.add(name.split(".")[0])
    return ours, others


def test_every_module_has_a_place():
    assert set().union(*LAYERS) == set(MODULES)


def test_imports_go_downwards():
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for module in MODULES:
        for imported in imports(module)[0]:
            assert level[imported] <= level[module], f"{module} imports {imported} from a layer above"


def test_no_cycles():
    graph = {module: imports(module)[0] for module in MODULES}
    done = set()
    while ready := {module for module in graph if module not in done and graph[module] <= done}:
        done |= ready
    assert done == set(MODULES), f"cycle among {set(MODULES) - done}"


def test_mathematics_knows_nothing_else():
    for module in MATHEMATICS:
        assert imports(module)[0] <= MATHEMATICS


def test_services_that_do_without_torch():
    for module in WITHOUT_TORCH:
        assert "torch" not in imports(module)[1], module


def test_every_module_says_what_it_is_for():
    for module in MODULES:
        docstring = ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        assert docstring and len(docstring.splitlines()[0]) > 20, module


def test_importing_everything_touches_no_mpi():
    code = "import sys\n" + "\n".join(f"import improved_diffusion.{module}" for module in sorted(MODULES))
    code += "\nassert not [name for name in sys.modules if name.startswith('mpi4py')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
