"""For use from Python: load a model, draw, train, evaluate, measure likelihoods, with the functions of the commands.

Flags of the commands are keyword arguments under the same names; `docs/python.md` has an example of each.
"""

import difflib
import numbers
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch as th

from improved_diffusion import logger
from improved_diffusion.config import (
    ComputeFlags,
    EvalConfig,
    GuidanceFlags,
    NllConfig,
    SampleConfig,
    SamplerFlags,
    TrainConfig,
)
from improved_diffusion.data.decode import height_width
from improved_diffusion.drawn import Images
from improved_diffusion.evaluation.bits_per_dim import BoundTally
from improved_diffusion.flags import Flags, defaults
from improved_diffusion.jobs import evaluate as evaluation
from improved_diffusion.jobs.nll import prepare_measuring
from improved_diffusion.jobs.runs import (
    SHIPPED,
    Trained,
    choose_log_dir,
    compute_with,
    load_trained,
    with_flags,
)
from improved_diffusion.jobs.sample import prepare_drawing
from improved_diffusion.jobs.script import limit_threads
from improved_diffusion.jobs.train import run_training
from improved_diffusion.sample_util import sample_images

Path = str | os.PathLike
Config = TypeVar("Config", bound=Flags)

# Flags that other arguments stand for, or that are about the files that commands write.
FILES = ("model_path", "log_dir", "save_png", "save_trajectory", "samples", "output", "run_dir", "data_dir")
DECIDED_BY_LOAD = ("ema_length", *defaults(ComputeFlags))


class Model:
    """A trained model, ready to draw. `load` and `train` make one.

    :ivar path: the file or folder of its weights.
    :ivar step: how many steps it was trained for; 0 where that is not known.
    :ivar image_size: the side of its images in pixels, or (height, width).
    :ivar class_names: of its classes; empty for a model without classes or whose names are not known.

    Example::

        model = idf.load("runs/cifar10")
        print(model)
        model.sample(64, classes=["cat", "dog"], seed=1).save("pets.png")
    """

    def __init__(self, trained: Trained):
        self._trained = trained
        self._opened = compute_with(trained, trained.config)
        self.path: str = trained.path
        self.step: int = trained.step
        self.image_size: int | tuple[int, int] = trained.config.output_size
        self.class_names: list[str] = list(trained.class_names) if trained.config.class_cond else []

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        height, width = height_width(self.image_size)
        size = f"{width}x{height}"
        return f"<Model {self.path}: {size} pixels{classes}, {self.step:,} steps>"

    def sample(
        self,
        n: int | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        progress: bool = True,
        **flags: Any,
    ) -> Images:
        """Draw `n` images: an array uint8 [n, H, W, 3 or 1] (see `Images`).

        Image i is the one that image_sample.py draws as number i with the same flags.

        :param n: by default 16; with `init_image`, as many as are edited.
        :param classes: names or numbers of the classes to draw, in turn; all of them by default.
        :param steps: from noise to image (--sample_steps).
        :param seed: of the noise: the same seed, the same images.
        :param sampler, guidance_scale, flags: as the flags of image_sample.py, with the same defaults.
        :param progress: show it on standard error.
        :raises ValueError: the model has no such class, or a flag does not fit it; the message names the flag.
        :raises TypeError: there is no such flag, or its value is of another type.

        Example::

            images = model.sample(16, steps=10, sampler="unipc", seed=3)
        """
        _refuse(flags, FILES, "sample() writes no files; see save() of the result")
        _refuse(flags, DECIDED_BY_LOAD, "belongs to load()")
        if n is None and not flags.keys() & {"init_image", "interpolate"}:
            n = 16
        config, given = _configure(
            SampleConfig,
            num_samples=n,
            class_label=classes,
            sample_steps=steps,
            seed=seed,
            sampler=sampler,
            guidance_scale=guidance_scale,
            **flags,
        )
        drawing = prepare_drawing(with_flags(self._opened, config, given), given)
        batches = sample_images(
            drawing.model,
            drawing.diffusion,
            drawing.plan,
            drawing.subject,
            num_samples=drawing.count,
            batch_size=drawing.config.batch_size,
            progress="drawing" if progress else "",
        )
        labels = None if drawing.subject.labels is None else np.asarray(drawing.subject.labels, np.int64)
        return Images(np.concatenate([batch[:, -1] for batch in batches]), labels)


def load(path: Path = SHIPPED, **flags: Any) -> Model:
    """Load a trained model.

    :param path: a run, a published folder, a ``.pt`` file, a folder of diffusers, or the name of a model that comes
        with the code, by default "cifar10".
    :param flags: of image_sample.py: `precision`, `num_workers`, `ema_length`, and for a file that does not say what
        it is, such as OpenAI's, those that describe the model (`num_channels`, ...).
    :raises ValueError: there is no such model, or the flags contradict it.

    Example::

        model = idf.load("models/cifar10")
        images = model.sample(16, steps=20, seed=0)
        images.save("grid.png")
    """
    _refuse(
        flags,
        [*FILES, "interpolate", *defaults(SamplerFlags), *defaults(GuidanceFlags)],
        "belongs to sample()",
    )
    config, given = _configure(SampleConfig, model_path=path, **flags)
    limit_threads()
    return Model(load_trained(config.model_path, config, given))


def train(data: Path, *, log_dir: Path = "", hours: float | None = None, **flags: Any) -> Model:
    """Train a model on images, or continue a run, and return the model.

    The same call continues a run that was interrupted. Ctrl-C, or the stop button of a notebook, saves first.

    :param data: a folder of images, an ``.npz`` file, or "builtin" (drawn shapes).
    :param log_dir: directory of the run; by default a new dated one in ``runs/``.
    :param hours: train for this long; by default for `total_steps`.
    :param flags: of image_train.py, such as `total_steps`, `init_from` and `recipe`.
    :raises ValueError: a flag or the data are unusable; nothing was trained.
    :raises KeyboardInterrupt: it was interrupted, and saved.
    :raises RuntimeError: it ended with an error, which is in the run's ``log.txt``.

    Example::

        model = idf.train("photos", init_from="cifar10", hours=1, log_dir="runs/photos")
        model.sample(16).save("photos.png")
    """
    config, given = _configure(TrainConfig, data_dir=data, log_dir=log_dir or None, hours=hours, **flags)
    log_dir = choose_log_dir(config, os.path.join(os.getcwd(), "runs"))
    config, given = replace(config, log_dir=log_dir), given | {"log_dir"}
    values = {"hours": hours, **flags, "log_dir": log_dir}
    texts = [f"{name}={value!r}" for name, value in values.items() if value is not None]
    limit_threads()
    threads = th.get_num_threads()
    try:
        call = f"improved_diffusion.train({', '.join([repr(os.fspath(data)), *texts])})"
        code = run_training(config, given, os.getcwd(), call)
    finally:
        logger.close()
        th.set_num_threads(threads)  # which training has changed
    if code > 128:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{log_dir}: training ended with an error; see log.txt there")
    return load(log_dir, precision=config.precision, num_workers=config.num_workers)


def evaluate(samples: Path | np.ndarray, reference: Path | np.ndarray, **flags: Any) -> dict[str, Any]:
    """Measure how close images are to real ones: Fréchet and kernel distance, precision, recall.

    :param samples, reference: images: a folder, an ``.npz`` file, or an array uint8 [N, H, W, 3 or 1]; the
        reference may be "builtin". Those drawn by classes bring their classes along.
    :param flags: of image_eval.py: `features` ("inception", "pixel" or a file), `classifier`, `batch_size`, ...
    :return: what image_eval.py writes into ``evaluation.json``; "metrics" has the numbers by name.
    :raises ValueError: the images are unusable.

    Example::

        idf.evaluate(model.sample(256), "datasets/cifar_test", features="pixel")["metrics"]
    """
    _refuse(flags, FILES, "evaluate() returns what it has measured, and writes no files")
    with tempfile.TemporaryDirectory() as folder:
        places = [
            _place(images, os.path.join(folder, f"{name}.npz"))
            for name, images in (("samples", samples), ("reference", reference))
        ]
        config, _ = _configure(EvalConfig, samples=places[0], reference=places[1], **flags)
        return evaluation.evaluate(config)


def nll(model: Model | Path, data: Path | np.ndarray, n: int = 1000, **flags: Any) -> dict[str, Any]:
    """Measure how many bits per dimension the model needs, at most, for images (Ho et al. 2020, eq. 5).

    :param data: as `samples` of `evaluate`.
    :param n: measure at most this many of them.
    :param flags: of image_nll.py: `timestep_respacing`, `precision` ("fp32" by default), `batch_size`, ...
    :return: what image_nll.py writes into ``nll.json``: "bits_per_dim", "standard_error", "images", ...; and
        "per_image", the bound of each image, float64 [images].
    :raises ValueError: the data do not fit the model.

    Example::

        idf.nll(model, "datasets/cifar_test", n=16, timestep_respacing="100")["bits_per_dim"]
    """
    _refuse(flags, FILES, "nll() returns what it has measured, and writes no files")
    with tempfile.TemporaryDirectory() as folder:
        place = _place(data, os.path.join(folder, "images.npz"))
        config, given = _configure(NllConfig, data_dir=place, num_samples=n, **flags)
        trained = model._trained if isinstance(model, Model) else load(model)._trained
        opened = compute_with(with_flags(trained, config, given), config)
        _, measured = prepare_measuring(opened)
        tally = BoundTally()
        for bounds in measured:
            tally.add(bounds)
    return {**tally.summary(), "steps": opened.diffusion.num_timesteps, "per_image": tally.total_bpd}


def _refuse(flags: dict[str, Any], names: Sequence[str], reason: str) -> None:
    for name in flags.keys() & set(names):
        raise TypeError(f"{name}: is no argument here: {reason}")


def _configure(kind: type[Config], **values: Any) -> tuple[Config, set[str]]:
    """Flags from keyword arguments, as `Parser.parse_flags` makes them from a command line; None stands for not given.

    :raises TypeError, ValueError: there is no such flag, or its value is impossible; the message names it.
    """
    known = defaults(kind)
    given = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"{name}: there is no such argument" + (f"; did you mean {near[0]}?" if near else "")
            )
        if value is not None:
            given[name] = _plain(name, value, type(known[name]))
    config = kind(**given).completed(set(given))
    config.check(set(given))
    return config, set(given)


def _plain(name: str, value: Any, kind: type) -> bool | int | float | str:
    """`value` in the type of its flag; a list becomes a text with commas."""
    if kind is str and not isinstance(value, bool):
        if isinstance(value, list | tuple | np.ndarray):
            return ",".join(map(str, value))
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    is_truth = isinstance(value, bool | np.bool_)
    wanted = (
        {bool: np.bool_ | bool, int: numbers.Integral, float: numbers.Real}[kind] if kind is not str else ()
    )
    if kind is not str and isinstance(value, wanted) and is_truth == (kind is bool):
        return kind(value)
    raise TypeError(
        f"{name}={value!r}: expected {'a text' if kind is str else f'a value of type {kind.__name__}'}"
    )


def _place(images: Path | np.ndarray, path: str) -> str:
    """Where `images` are; those of an array are written to `path`."""
    if not isinstance(images, np.ndarray):
        return os.fspath(images)
    Images(images, getattr(images, "labels", None)).save(path)
    return path
