"""The model that comes with the code: it draws what it drew when it was published, and errs as its card says.

When another is published, `PYTHONPATH=tests python tests/convert/test_shipped_model.py` writes what shall hold from
then on.
"""

import json
import os
import re

import numpy as np
import pytest
import torch as th
from conftest import ROOT
from openpyxl import load_workbook

from improved_diffusion import seeding
from improved_diffusion.config import ModelAndDiffusion
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs.runs import load_trained
from improved_diffusion.results.export import export
from improved_diffusion.sample_util import DEFAULT_PLAN, Subject, from_uint8, sample_images
from improved_diffusion.seeding import Purpose
from improved_diffusion.storage import write_json

MODEL = ROOT / "models" / "cifar10"
GUARD = MODEL / "guard.json"
TEST_IMAGES = {"builtin": "builtin", "cifar_test": str(ROOT / "datasets" / "cifar_test")}


def load():
    trained = load_trained(str(MODEL), ModelAndDiffusion(), set())
    return fast_model(trained.model, "fp32", 2), trained.diffusion, Subject(trained.config.image_size)


@pytest.fixture(scope="module")
def shipped():
    return load()


@pytest.fixture(scope="module")
def guard():
    return json.loads(GUARD.read_text(encoding="utf-8"))


def drawn(model, diffusion, subject):
    """The mean and the standard deviation of each of 16 images."""
    (images,) = sample_images(model, diffusion, DEFAULT_PLAN, subject, num_samples=16, batch_size=16)
    pixels = images[:, 0].astype(float)
    return pixels.mean((1, 2, 3)).tolist(), pixels.std((1, 2, 3)).tolist()


def mse(model, diffusion, subject, data):
    """The mean squared error of the predicted noise on 512 images and timesteps, both evenly spread."""
    images = read_images(TEST_IMAGES[data], subject.image_size)
    count, errors = 512, []
    numbers = np.linspace(0, len(images) - 1, count).round().astype(np.int64)
    x = from_uint8(images.get(numbers))
    noise = seeding.normal(seeding.generator(0, Purpose.NOISE, 0), tuple(x.shape))
    t = th.arange(count) * diffusion.num_timesteps // count
    for start in range(0, count, 64):
        part = slice(start, start + 64)
        terms = diffusion.training_losses(model, x[part], t[part], noise=noise[part])
        errors.append(terms["mse"])
    return th.cat(errors).mean().item()


def test_it_draws_what_it_drew(shipped, guard):
    means, deviations = drawn(*shipped)
    assert means == pytest.approx(guard["means"], abs=6)
    assert deviations == pytest.approx(guard["deviations"], abs=6)


@pytest.mark.parametrize("data", list(TEST_IMAGES))
def test_it_errs_as_its_card_says(shipped, guard, data):
    if data == "cifar_test" and not os.path.exists(os.path.join(TEST_IMAGES[data], ".complete")):
        pytest.skip("CIFAR-10 is not prepared: python datasets/cifar10.py")
    assert mse(*shipped, data) == pytest.approx(guard["mse"][data], rel=0.02)
    assert f"{guard['mse'][data]:.5f}" in (MODEL / "README.md").read_text(encoding="utf-8")


def test_it_is_small_and_names_no_machine():
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) < 25_000_000
    for path in MODEL.rglob("*.json"):
        assert not re.search(r"[^\w.](?:/[\w.-]+){2,}", path.read_text(encoding="utf-8")), path


def content(path):
    """By sheet, the cells, but for when it was exported, and how many charts and pictures there are."""
    found = {}
    for sheet in load_workbook(path):
        values = [cell.value for row in sheet.iter_rows() for cell in row]
        values = [re.sub("Exported .*", "", v) if isinstance(v, str) else v for v in values]
        found[sheet.title] = values, len(sheet._charts), len(sheet._images)
    return found


def test_the_workbook_is_made_from_what_comes_along(tmp_path):
    made = content(export(str(MODEL), str(tmp_path / "results.xlsx")))
    assert made == content(ROOT / "results.xlsx")


def test_it_is_what_is_drawn_from_by_default(call_script, tmp_path):
    done = call_script("image_sample.py", "--num_samples", 1, "--sample_steps", 1, "--log_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the model that comes with the code" in done.stdout and (tmp_path / "grid.png").exists()


if __name__ == "__main__":
    found = load()
    means, deviations = drawn(*found)
    errors = {data: mse(*found, data) for data in TEST_IMAGES}
    write_json(str(GUARD), {"means": means, "deviations": deviations, "mse": errors})
    print(errors)
