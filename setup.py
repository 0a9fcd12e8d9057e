"""Packaging of improved_diffusion: `pip install -e .` for work on it, `pip install .` for use."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "improved_diffusion" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

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
    install_requires=[
        # The package index offers torch 2.13.0 as a CPU build where it has one; newer releases there are
        # CUDA builds that bring gigabytes of GPU libraries no CPU run needs.
        "torch>=2.6,<2.14",
        "numpy>=1.24",
        "blobfile>=2.0.2",
        "filelock>=3.12",
        "mpi4py>=4.0",
        "tqdm>=4.60",
        "openpyxl>=3.1",
        "Pillow>=10.1",
    ],
    extras_require={
        "test": [
            "pytest>=7",
            "hypothesis>=6",
            "mpich>=4; platform_system != 'Windows'",
            "lmdb>=1.4",
            "ruff>=0.6",
            "scipy>=1.10",
            "diffusers>=0.30",
            "safetensors>=0.4",
        ],
        # mpich has no wheel for Windows.
        "mpi": ["mpich>=4; platform_system != 'Windows'", "impi-rt>=2021; platform_system == 'Windows'"],
        "diffusers": ["safetensors>=0.4"],
        "tensorboard": ["tensorboard>=2.12"],
        "lsun": ["lmdb>=1.4"],
    },
)
