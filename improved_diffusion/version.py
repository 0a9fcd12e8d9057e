"""The version of the package, in a file of its own because `setup.py` reads it without PyTorch."""

__version__ = "0.1.0"
