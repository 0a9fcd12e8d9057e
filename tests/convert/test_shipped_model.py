"""The models that come with the code: they draw what they drew when they were published, and err as their cards say.

When one is published, `PYTHONPATH=tests python tests/convert/test_shipped_model.py NAME` writes what shall hold from
then on.
"""

import json
import os
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from conftest import ROOT
from openpyxl import load_workbook

from improved_diffusion import seeding
from improved_diffusion.config import ModelAndDiffusion, SampleConfig
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs.runs import load_trained, open_model
from improved_diffusion.jobs.sample import prepare_drawing
from improved_diffusion.results.export import export
from improved_diffusion.sample_util import from_uint8, sample_images
from improved_diffusion.seeding import Purpose
from improved_diffusion.storage import write_json

MODELS = ROOT / "models"
TEST_IMAGES = {"builtin": "builtin", "cifar_test": str(ROOT / "datasets" / "cifar_test")}


def load(name):
    """The drawing job of image_sample.py with four images of the model."""
    config = replace(SampleConfig(), model_path=str(MODELS / name), num_samples=4, precision="fp32")
    given = {"model_path", "num_samples", "precision"}
    return prepare_drawing(open_model(config, given, str(ROOT)), given)


@pytest.fixture(scope="module", params=["cifar10", "cifar10_recipe"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def drawing(name):
    return load(name)


@pytest.fixture(scope="module")
def guard(name):
    return json.loads((MODELS / name / "guard.json").read_text(encoding="utf-8"))


def drawn(job):
    """The mean and the standard deviation of each of the images."""
    (images,) = sample_images(
        job.model, job.diffusion, job.plan, job.subject, num_samples=job.count, batch_size=job.count
    )
    pixels = images[:, 0].astype(float)
    return pixels.mean((1, 2, 3)).tolist(), pixels.std((1, 2, 3)).tolist()


def mse(name, job, data):
    """The mean squared error of the prediction, without a class, on 128 images and timesteps, both evenly spread."""
    images = read_images(TEST_IMAGES[data], job.subject.image_size)
    count, errors = 128, []
    numbers = np.linspace(0, len(images) - 1, count).round().astype(np.int64)
    x = from_uint8(images.get(numbers))
    noise = seeding.normal(seeding.generator(0, Purpose.NOISE, 0), tuple(x.shape))
    t = th.arange(count) * job.diffusion.num_timesteps // count
    no_class = {"y": th.full((64,), job.config.num_classes)} if job.config.class_cond else {}
    model = load_trained(str(MODELS / name), ModelAndDiffusion(), set()).model  # without guidance
    model = fast_model(model, "fp32", 2)
    for start in range(0, count, 64):
        part = slice(start, start + 64)
        terms = job.diffusion.training_losses(model, x[part], t[part], no_class, noise=noise[part])
        errors.append(terms["mse"])
    return th.cat(errors).mean().item()


def test_it_draws_what_it_drew(drawing, guard):
    means, deviations = drawn(drawing)
    assert means == pytest.approx(guard["means"], abs=6)
    assert deviations == pytest.approx(guard["deviations"], abs=6)


@pytest.mark.parametrize("data", list(TEST_IMAGES))
def test_it_errs_as_its_card_says(drawing, guard, name, data):
    if data == "cifar_test" and not os.path.exists(os.path.join(TEST_IMAGES[data], ".complete")):
        pytest.skip("CIFAR-10 is not prepared: python datasets/cifar10.py")
    assert mse(name, drawing, data) == pytest.approx(guard["mse"][data], rel=0.02)
    assert f"{guard['mse'][data]:.5f}" in (MODELS / name / "README.md").read_text(encoding="utf-8")


def test_it_is_small_and_names_no_machine(name):
    sizes = [path.stat().st_size for path in (MODELS / name).rglob("*") if path.is_file()]
    assert sum(sizes) < 25_000_000
    for path in (MODELS / name).rglob("*.json"):
        assert not re.search(r"[^\w.](?:/[\w.-]+){2,}", path.read_text(encoding="utf-8")), path


def content(path):
    """By sheet, the cells, but for when it was exported, and how many charts and pictures there are."""
    found = {}
    for sheet in load_workbook(path):
        values = [cell.value for row in sheet.iter_rows() for cell in row]
        values = [re.sub("Exported .*", "", v) if isinstance(v, str) else v for v in values]
        found[sheet.title] = values, len(sheet._charts), len(sheet._images)
    return found


def test_the_workbook_is_made_from_what_comes_along(name, tmp_path):
    made = content(export(str(MODELS / name), str(tmp_path / "results.xlsx")))
    assert made == content((ROOT if name == "cifar10" else MODELS / name) / "results.xlsx")


def test_it_is_what_is_drawn_from_by_default(call_script, tmp_path):
    done = call_script("image_sample.py", "--num_samples", 1, "--sample_steps", 1, "--log_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the model that comes with the code" in done.stdout and (tmp_path / "grid.png").exists()


if __name__ == "__main__":
    (chosen,) = sys.argv[1:]
    found = load(chosen)
    means, deviations = drawn(found)
    errors = {data: mse(chosen, found, data) for data in TEST_IMAGES}
    write_json(str(MODELS / chosen / "guard.json"), {"means": means, "deviations": deviations, "mse": errors})
    print(errors)
