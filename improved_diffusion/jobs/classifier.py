"""The job of train_classifier.py: train the classifier that finds the class of drawn images."""

import numpy as np
import torch as th

from improved_diffusion.config import ClassifierConfig
from improved_diffusion.cpu.compute import choose
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.evaluation.classifier import (
    class_accuracy,
    classify,
    save_classifier,
    train_classifier,
)
from improved_diffusion.flags import errors_about
from improved_diffusion.image_datasets import describe
from improved_diffusion.script_util import read_flag
from improved_diffusion.storage import output_file


def run_classifier_training(config: ClassifierConfig) -> None:
    """Train, test and save a classifier. :raises ValueError: a flag or the images are unusable."""
    with errors_about("output"):
        output = output_file(config.output)  # before the training, which takes long
    images = _read("data_dir", config.data_dir, config)
    test = _read("test_dir", config.test_dir, config) if config.test_dir else None
    if test is not None and test.class_names != images.class_names:
        raise ValueError(f"--test_dir {config.test_dir}: its classes differ from those of --data_dir")
    compute = choose(config.precision, config.num_workers)
    print(f"{describe(images)}\ncomputing in {compute}")
    th.set_num_threads(compute.workers)
    model = train_classifier(
        images.get(np.arange(len(images))),
        images.labels,
        classes=images.num_classes,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        precision=compute.precision,
    )
    if test is not None:
        found = classify(model, test.get(np.arange(len(test))))
        print(
            f"{class_accuracy(found, test.labels):.2%} of {len(test):,} test images are classified correctly"
        )
    save_classifier(model, output, images.class_names)
    print(f"written: {output}")


def _read(flag_name: str, path: str, config: ClassifierConfig) -> ImageSet:
    images = read_flag(flag_name, path, config.image_size)
    if images.labels is None or images.num_classes < 2:
        raise ValueError(f"--{flag_name} {path}: needs images of at least two classes")
    return images
