"""Train and sample denoising diffusion models on an ordinary CPU."""

__version__ = "0.1.0"
