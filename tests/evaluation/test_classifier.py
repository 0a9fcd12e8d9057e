"""The classifier that tells whether a drawn image is of the class asked for."""

import re

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from conftest import read_json

from improved_diffusion.data.builtin_images import CLASS_NAMES, draw_builtin
from improved_diffusion.evaluation.classifier import (
    Classifier,
    accuracy_of_each_class,
    class_accuracy,
    classify,
    load_classifier,
    save_classifier,
    train_classifier,
)

WIDTHS = (16, 32, 32)


@pytest.fixture(scope="module")
def shapes():
    return draw_builtin(1200, 16)


@pytest.fixture(scope="module")
def trained(shapes):
    images, labels = shapes
    return train_classifier(
        images[:1000],
        labels[:1000],
        classes=len(CLASS_NAMES),
        epochs=10,
        batch_size=50,
        widths=WIDTHS,
        log=lambda line: None,
    )


def test_it_learns_the_shapes(trained, shapes):
    images, labels = shapes
    assert class_accuracy(classify(trained, images[1000:]), labels[1000:]) > 0.8
    untrained = Classifier(len(CLASS_NAMES), WIDTHS).eval()
    assert class_accuracy(classify(untrained, images[1000:]), labels[1000:]) < 0.5


def test_it_is_stored_with_its_classes(trained, shapes, tmp_path):
    images, _ = shapes
    save_classifier(trained, str(tmp_path / "classifier.pt"), CLASS_NAMES)
    stored, names = load_classifier(str(tmp_path / "classifier.pt"))
    assert names == list(CLASS_NAMES)
    np.testing.assert_array_equal(classify(stored, images[:50]), classify(trained, images[:50]))


@pytest.mark.parametrize(
    "content", [{}, {"class_names": ["a"], "weights": {}}, {"class_names": 3, "weights": 4}]
)
def test_another_file_is_no_classifier(content, tmp_path):
    th.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: holds no classifier; make one with"):
        load_classifier(str(tmp_path / "model.pt"))


def test_the_first_layer_whitens_patches(shapes):
    pixels = th.from_numpy(shapes[0]).permute(0, 3, 1, 2)
    model = Classifier(4)
    model.whiten(pixels)
    x = (pixels.float() / 255 - model.mean) / model.deviation
    found = model.whitening(x)[:, :12].transpose(0, 1).flatten(1)
    patches = F.unfold(x, 2).transpose(1, 2).reshape(-1, 12)
    values = th.linalg.eigvalsh(patches.T @ patches / len(patches))
    # An epsilon keeps what is almost constant from being blown up.
    expected = th.diag(values / (values + 5e-4))
    th.testing.assert_close(found @ found.T / found.shape[1], expected, atol=1e-3, rtol=0)


def test_no_images():
    assert classify(Classifier(3), np.zeros((0, 32, 32, 3), np.uint8)).shape == (0,)


def test_the_share_of_images_that_are_of_the_class():
    found, asked = np.array([1, 2, 0, 0, 1]), np.array([1, 2, 3, 0, 0])
    assert class_accuracy(found, asked) == 0.6
    # Class 4 was not asked for.
    expected = {"a": 0.5, "b": 1, "c": 1, "d": 0}
    assert accuracy_of_each_class(found, asked, ["a", "b", "c", "d", "e"]) == expected


@pytest.fixture(scope="module")
def files(shapes, tmp_path_factory):
    """Images with classes as image_sample.py writes them: for training, and others to measure."""
    folder = tmp_path_factory.mktemp("shapes")
    images, labels = shapes
    np.savez(folder / "train.npz", images[:300], labels[:300])
    np.savez(folder / "drawn.npz", images[600:700], labels[600:700])
    np.savez(folder / "wrong.npz", images[600:700], (labels[600:700] + 1) % 10)
    np.savez(folder / "plain.npz", images[600:700])
    return folder


def test_the_scripts_train_it_and_measure_with_it(files, call_script):
    path = files / "classifier.pt"
    flags = ["--data_dir", files / "train.npz", "--test_dir", files / "drawn.npz", "--output", path]
    flags += ["--image_size", 16, "--epochs", 8, "--batch_size", 25, "--precision", "fp32"]
    done = call_script("train_classifier.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "of 100 test images are classified correctly" in done.stdout

    for output, message in ((files, "is a folder"), (files / "no" / "a.pt", "there is no folder")):
        done = call_script("train_classifier.py", *flags, "--output", output, check=2)
        assert f"--output {output}: {message}" in done.stderr and done.stdout == ""

    measured = {}
    for name in ("drawn", "wrong"):
        flags = [
            "--samples",
            files / f"{name}.npz",
            "--reference",
            files / "train.npz",
            "--features",
            "pixel",
        ]
        done = call_script("image_eval.py", *flags, "--classifier", path, "--output", files / "result.json")
        assert done.returncode == 0, done.stderr
        record = read_json(files / "result.json")
        measured[name] = record["metrics"]["class_accuracy"]
        of_classes = record["accuracy_of_each_class"]
        assert list(of_classes) == list(map(str, range(10)))
        # There are as many images of each class.
        assert sum(of_classes.values()) / 10 == pytest.approx(measured[name])
        assert f"of each class: 0 {of_classes['0']:.2f}, 1 {of_classes['1']:.2f}" in done.stdout
    assert measured["drawn"] > 0.6 and measured["wrong"] < 0.3


@pytest.mark.parametrize(
    "samples, classifier, message",
    [
        ("plain", "classifier.pt", "--classifier .*classifier.pt: needs samples with classes"),
        ("drawn", "absent.pt", "--classifier .*absent.pt: there is no such file"),
        ("drawn", "train.npz", "--classifier .*train.npz"),
        ("drawn", "small.pt", "--classifier .*small.pt: knows 2 classes; the samples have class 9"),
    ],
)
def test_mistakes_with_a_classifier(files, call_script, samples, classifier, message):
    save_classifier(Classifier(10, WIDTHS), str(files / "classifier.pt"), CLASS_NAMES)
    save_classifier(Classifier(2, WIDTHS), str(files / "small.pt"), ["a", "b"])
    flags = ["--samples", files / f"{samples}.npz", "--reference", files / "train.npz", "--features", "pixel"]
    done = call_script("image_eval.py", *flags, "--classifier", files / classifier)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def test_images_without_classes_train_none(files, call_script):
    done = call_script("train_classifier.py", "--data_dir", files / "plain.npz", "--image_size", 16)
    assert done.returncode == 2 and "needs images of at least two classes" in done.stderr
