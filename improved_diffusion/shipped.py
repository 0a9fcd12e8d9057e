"""What comes with the package: the folders of models, scripts and data sets, and the compiled kernels."""

import os
import platform
from importlib.machinery import EXTENSION_SUFFIXES

PACKAGE = os.path.dirname(os.path.abspath(__file__))


def shipped(folder: str) -> str:
    """The path of ``models``, ``scripts`` or ``datasets``: in an installed package, or next to it in a checkout."""
    inside = os.path.join(PACKAGE, folder)
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(PACKAGE), folder)


def compiled_kernels() -> list[str]:
    """The paths of the compiled library of `kernels`. (An editable installation may have one more, of older code.)"""
    names = (os.path.join(PACKAGE, "kernels", f"compiled{suffix}") for suffix in EXTENSION_SUFFIXES)
    return [name for name in names if os.path.exists(name)]


def why_not_compiled() -> str:
    """Why `compiled_kernels` finds nothing, and what helps."""
    system, processor = platform.system(), platform.machine()
    if system != "Linux" or processor not in ("x86_64", "aarch64"):
        return f"there are none for {system} on {processor}"
    return "no compiler was found at the installation: install GCC and repeat it"
