"""The folders that come with the package: models, scripts, data sets."""

import os

PACKAGE = os.path.dirname(os.path.abspath(__file__))


def shipped(folder: str) -> str:
    """The path of ``models``, ``scripts`` or ``datasets``: in an installed package, or next to it in a checkout."""
    inside = os.path.join(PACKAGE, folder)
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(PACKAGE), folder)
