"""The job of image_eval.py: measure how close images are to real ones."""

import datetime
import glob
import os
import time
from typing import Any

import numpy as np

from improved_diffusion.config import EvalConfig, ImageFlags, ReferenceFlags
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.evaluation import report
from improved_diffusion.evaluation.classifier import (
    accuracy_of_each_class,
    class_accuracy,
    classify,
    load_classifier,
)
from improved_diffusion.evaluation.features import Extractor, load_extractor
from improved_diffusion.evaluation.inception import DownloadError
from improved_diffusion.evaluation.measuring import reference_statistics, statistics_of
from improved_diffusion.evaluation.metrics import InceptionScore, compare
from improved_diffusion.flags import errors_about, named
from improved_diffusion.image_datasets import describe
from improved_diffusion.results.export import export_all
from improved_diffusion.results.read import read_run
from improved_diffusion.script_util import read_flag
from improved_diffusion.storage import absolute, write_json


def run_evaluation(config: EvalConfig) -> None:
    """Measure images, print a table and write the report. :raises ValueError: a flag or the images are unusable."""
    with errors_about("output" if config.output else "samples"):
        output = report.output_path(config.output, config.samples)
    if config.run_dir:
        with errors_about("run_dir"):
            read_run(config.run_dir)  # before the measuring, so that a wrong directory is reported at once
    record = evaluate(config)
    print(report.table(record))
    write_json(output, record)
    print(f"written: {output}")
    if config.run_dir:
        report.append(config.run_dir, record)
        written, failed = export_all(config.run_dir)
        for path in written:
            print(f"written: {path}")
        for _, error in failed:
            raise error


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure the images of --samples. :return: the content of ``evaluation.json``, with the entry "metrics".

    :raises ValueError: a flag or the images are unusable.
    """
    samples = read_samples(config.samples)
    reference = read_flag("reference", config.reference, samples.image_size)
    print(f"samples: {describe(samples)}\nreference: {describe(reference)}")
    accuracy, of_classes = _class_accuracy(config.classifier, samples) if config.classifier else ({}, {})
    extractor = open_extractor(config)

    real = reference_statistics(reference, extractor, config.batch_size)
    started = time.monotonic()
    score = None if extractor.classifier is None else InceptionScore(len(samples))
    drawn = statistics_of(samples, extractor, config.batch_size, "measuring the samples", score)
    seconds = time.monotonic() - started
    print("comparing ...")
    metrics = compare(drawn, real)
    if score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = score.result()

    metrics = {extractor.metric(name): value for name, value in metrics.items()} | accuracy
    return {
        "evaluated_at": datetime.datetime.now().isoformat(timespec="seconds"),
        "features": extractor.name,
        "features_hash": extractor.fingerprint,
        "features_length": len(drawn.mean),
        "images": len(samples),
        "images_path": samples.summary["source"],
        "reference_images": len(reference),
        "reference_path": reference.summary["source"],
        "compared_images": min(len(drawn.kept), len(real.kept)),
        "image_size": samples.image_size,
        "metrics": metrics,
        "accuracy_of_each_class": of_classes,
        "warnings": report.warnings(drawn, real),
        "images_per_minute": round(60 * len(samples) / seconds, 1),
    }


def open_extractor(config: ReferenceFlags) -> Extractor:
    """The extractor of --features and --inception_weights. :raises ValueError: as `load_extractor`, with the flags."""
    try:
        return load_extractor(config.features, config.inception_weights)
    except DownloadError as error:
        raise ValueError(
            f"{error}; download it elsewhere and give --inception_weights PATH, or measure with --features pixel"
        ) from None
    except ValueError as error:
        raise named(error, {name: name for name in ("features", "inception_weights")}) from None


def _class_accuracy(path: str, samples: ImageSet) -> tuple[dict[str, float], dict[str, float]]:
    """The metric class_accuracy: the share of the samples that the classifier finds in the requested class.

    :return: the metric, and the same share of the samples of each class.
    :raises ValueError: the classifier or the classes are unusable.
    """
    with errors_about("classifier"):
        model, names = load_classifier(absolute(path))
    if samples.labels is None:
        raise ValueError(f"--classifier {path}: needs samples with classes; these have none")
    requested = samples.class_names
    # In an .npz file of image_sample.py, the classes have numbers instead of names.
    numbered = all(name.isdecimal() for name in requested)
    try:
        numbers = [int(name) if numbered else names.index(name) for name in requested]
    except ValueError:
        raise ValueError(
            f"--classifier {path}: knows the classes {', '.join(names)}, not those of --samples"
        ) from None
    if max(numbers) >= len(names):
        raise ValueError(
            f"--classifier {path}: knows {len(names)} classes; the samples have class {max(numbers)}"
        )
    found = classify(model, samples.get(np.arange(len(samples))))
    asked = np.array(numbers)[samples.labels]
    return {"class_accuracy": class_accuracy(found, asked)}, accuracy_of_each_class(found, asked, names)


def read_samples(path: str) -> ImageSet:
    """The images at `path`, in their own size.

    :raises ValueError: they are unusable, or `path` is a folder with an .npz file, which was probably meant.
    """
    inside = sorted(glob.glob(os.path.join(glob.escape(absolute(path)), "*.npz")))
    if inside:
        raise ValueError(f"--samples {path}: give the .npz file in this folder, {inside[-1]}")
    usual = ImageFlags().image_size
    images = read_flag("samples", path, usual)
    sizes = images.summary["sizes"]
    width, height = map(int, sizes["most_common"].split("x"))
    size = min(width, height)
    if size < max(width, height) and sizes["min"] == sizes["max"]:
        size = (height, width)  # of a model whose images are not square
    return images if size == usual else read_flag("samples", path, size)
