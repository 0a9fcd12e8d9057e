"""Train and sample denoising diffusion models on an ordinary CPU.

Example::

    import improved_diffusion as idf

    model = idf.load("cifar10")
    model.sample(16, steps=20, seed=0).save("grid.png")
"""

from typing import TYPE_CHECKING

from improved_diffusion.version import __version__ as __version__

if TYPE_CHECKING:
    from improved_diffusion.api import Model, evaluate, load, nll, train
    from improved_diffusion.drawn import Images

__all__ = ["Images", "Model", "evaluate", "load", "nll", "train"]


def __getattr__(name: str):
    # Importing the package takes no time; PyTorch is loaded when the first of these is used.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from improved_diffusion import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
