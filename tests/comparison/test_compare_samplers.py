"""compare_samplers.py: every cell drawn once and measured, the reports, and every mistake in one line."""

import itertools
import json
import re

import numpy as np
import pytest
from conftest import read_json, save_trained
from PIL import Image

from improved_diffusion.comparison import gallery
from improved_diffusion.comparison import job as comparison_job
from improved_diffusion.comparison.plan import BASELINE, Solver, cell_name, difference
from improved_diffusion.comparison.report import markdown
from improved_diffusion.config import ModelAndDiffusion
from improved_diffusion.jobs.runs import load_trained
from improved_diffusion.sample_util import Plan, Subject, sample_images

SAMPLERS = [
    Solver("ddim", "uniform"),
    Solver("ddim", "logsnr", 1.0),  # not quadratic: 20 timesteps begin with far more noise than 1,000
    Solver("heun", "karras"),
    Solver("unipc", "logsnr"),
    Solver("ddpm", "logsnr"),
]
STEPS, SEEDS, COUNT, T = [2, 5], [0, 3], 4, 20
COMMAND = [
    *("--samplers", "ddim:uniform,ddim::1,heun:karras,unipc,ddpm", "--steps", "5,2", "--seeds", "0,3"),
    *("--num_samples", COUNT, "--reference", "builtin", "--features", "pixel"),
    *("--precision", "fp32", "--num_workers", "1"),
]
FEW = ("--samplers", "unipc", "--steps", 2, "--baseline", False)
PLANS = [solver.plan(steps) for steps in STEPS for solver in SAMPLERS] + [BASELINE]
CELLS = {cell_name(plan, seed) for plan in PLANS for seed in SEEDS}
EXACT = Plan("unipc", T, "logsnr")


@pytest.fixture
def compare(call_script, tmp_path):
    """Run the script on a model of `save_trained`; later flags override earlier ones."""
    run, out_dir = tmp_path / "run", tmp_path / "out"
    save_trained(run)

    def call(*flags, check=0):
        done = call_script("compare_samplers.py", "--model_path", run, "--log_dir", out_dir, *COMMAND, *flags)
        assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def drawn(monkeypatch):
    """The plans that images are drawn with, and their numbers."""
    calls = []

    def draw(model, diffusion, plan, subject, numbers):
        calls.append((plan, subject.seed, numbers))
        return original(model, diffusion, plan, subject, numbers)

    original = gallery.draw
    monkeypatch.setattr(gallery, "draw", draw)
    return calls


def images_of(path):
    with np.load(path) as arrays:
        return arrays["arr_0"]


def test_every_cell_is_drawn_measured_and_reported(compare, call_script, tmp_path):
    done = compare()
    out_dir = tmp_path / "out"
    record = read_json(out_dir / "comparison.json")
    assert set(record["cells"]) == CELLS
    assert {path.stem for path in (out_dir / "cells").iterdir()} == CELLS | {
        cell_name(EXACT, seed) for seed in SEEDS
    }

    trained = load_trained(str(tmp_path / "run"), ModelAndDiffusion(), set())
    model, diffusion = trained.model, trained.diffusion
    for plan, seed in itertools.product(PLANS, SEEDS):
        batches = sample_images(model, diffusion, plan, Subject(8, seed), num_samples=COUNT, batch_size=COUNT)
        stored = images_of(out_dir / "cells" / f"{cell_name(plan, seed)}.npz")
        assert difference(stored, np.concatenate(list(batches))[:, 0]) < 1

    evaluations = {"heun": (3, 9)}
    for plan, seed in itertools.product(PLANS, SEEDS):
        cell = record["cells"][cell_name(plan, seed)]
        expected = dict(zip(STEPS, evaluations.get(plan.sampler, STEPS))).get(plan.steps, T)
        assert cell["evaluations"] == expected
        assert cell["seconds"] > 0
        assert (cell["difference"] is None) == (plan.sampler == "ddpm" or plan.eta > 0)
    unipc = [images_of(out_dir / "cells" / f"{cell_name(p, 3)}.npz") for p in (Plan("unipc", 5), EXACT)]
    cells = record["cells"]
    assert cells["unipc-logsnr-5-seed3"]["difference"] == difference(*unipc) > 0
    assert cells["unipc-logsnr-5-seed3"]["difference"] < cells["unipc-logsnr-2-seed3"]["difference"]

    # The metrics are those of image_eval.py.
    sample = out_dir / "cells" / "heun-karras-2-seed3.npz"
    call_script("image_eval.py", "--samples", sample, "--reference", "builtin", "--features", "pixel")
    metrics = read_json(sample.with_suffix(".evaluation.json"))["metrics"]
    measured = cells["heun-karras-2-seed3"]
    assert measured["distance"] == metrics["frechet_distance[pixel]"]
    for key in ("kernel_distance", "precision", "recall"):
        assert measured[key] == metrics[f"{key}[pixel]"]

    tables = (out_dir / "comparison.md").read_text(encoding="utf-8")
    assert tables == markdown(record)
    assert tables in done.stdout
    for solver in SAMPLERS:
        rows = re.findall(rf"^\| {solver} \| {solver.spacing} \|(.*)\|(.*)\|$", tables, re.MULTILINE)
        distances, kernel_distances, recalls, _, seconds = rows
        for row in (distances, kernel_distances, recalls, seconds):
            assert all(re.search(r"\d", value) for value in row)
    assert f"ddpm at all {T} timesteps: " in tables

    with Image.open(out_dir / "comparison.png") as picture:
        assert picture.width > 2 * 4 * 64
        assert picture.height > (len(SAMPLERS) + 1) * 64


def test_given_again_it_draws_and_measures_nothing(compare, drawn, tmp_path, monkeypatch):
    compare()
    assert drawn
    drawn.clear()
    reports = [tmp_path / "out" / f"comparison.{kind}" for kind in ("json", "md", "png")]
    before = [path.read_bytes() for path in reports]
    monkeypatch.setattr(comparison_job, "difference", None)
    compare()
    assert not drawn
    assert [path.read_bytes() for path in reports] == before


def test_a_damaged_cell_is_drawn_anew(compare, drawn, tmp_path):
    compare(*FEW)
    path = tmp_path / "out" / "cells" / "unipc-logsnr-2-seed3.npz"
    before = images_of(path)
    for damage in (path.read_bytes()[:200], b"", b"not an archive"):
        path.write_bytes(damage)
        drawn.clear()
        assert "unipc-logsnr-2-seed3.npz: damaged" in compare(*FEW).stdout
        assert drawn == [(Plan("unipc", 2), 3, range(4))]
        assert np.array_equal(images_of(path), before)


def test_damaged_results_are_measured_anew(compare, drawn, tmp_path):
    compare(*FEW)
    path = tmp_path / "out" / "comparison.json"
    before = read_json(path)
    for damage in ("", "[", "[1]", '{"setting": 1}'):
        path.write_text(damage, encoding="utf-8")
        drawn.clear()
        compare(*FEW)
        assert not drawn
        assert read_json(path) == before


def test_interrupted_it_goes_on_where_it_was(compare, drawn, tmp_path, monkeypatch):
    flags = ("--samplers", "unipc", "--steps", 2)
    compare(*flags)
    path = tmp_path / "out" / "cells" / "ddpm-all-seed0.npz"
    whole = images_of(path)
    path.unlink()

    counted, batches = gallery.draw, itertools.count()

    def interrupted(*args):
        if next(batches):
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "SAVE_SECONDS", -1)
        patch.setattr(gallery, "draw", interrupted)
        compare(*flags, "--batch_size", 3, check=130)
    assert difference(images_of(path), whole[:3]) < 1
    drawn.clear()
    compare(*flags)
    assert drawn == [(BASELINE, 0, range(3, 4))]
    assert difference(images_of(path), whole) < 1


def test_more_images_more_seeds(compare, drawn, tmp_path):
    compare(*FEW, "--seeds", 0)
    drawn.clear()
    compare(*FEW, "--num_samples", 6)
    asked = {(plan.steps, seed, numbers.start, numbers.stop) for plan, seed, numbers in drawn}
    assert asked == {(2, 0, 4, 6), (T, 0, 4, 6), (2, 3, 0, 6), (T, 3, 0, 6)}
    record = read_json(tmp_path / "out" / "comparison.json")
    assert set(record["cells"]) == {"unipc-logsnr-2-seed0", "unipc-logsnr-2-seed3"}
    # Fewer are the first of them.
    drawn.clear()
    compare(*FEW, "--num_samples", 3)
    assert not drawn


@pytest.mark.parametrize("arguments", [{"predict_xstart": True}, {"image_size": 16}])
def test_images_of_another_model_are_neither_used_nor_lost(compare, tmp_path, arguments):
    compare(*FEW)
    other = save_trained(tmp_path / "other", step=5, **arguments)
    before = images_of(tmp_path / "out" / "cells" / "unipc-logsnr-2-seed0.npz")
    done = compare(*FEW, "--model_path", other, check=2)
    assert re.search(r"error: --log_dir \S*out: .*other \w+; give another folder\n$", done.stderr)
    assert np.array_equal(images_of(tmp_path / "out" / "cells" / "unipc-logsnr-2-seed0.npz"), before)


def test_classes_in_turn(compare, tmp_path, monkeypatch):
    told = []

    def draw(model, diffusion, plan, subject, numbers):
        told.append(list(subject.labels))
        return original(model, diffusion, plan, subject, numbers)

    original = gallery.draw
    monkeypatch.setattr(gallery, "draw", draw)
    save_trained(tmp_path / "run", step=5, class_cond=True, num_classes=3, class_names=["a", "b", "c"])
    compare(*FEW, "--seeds", 0)
    compare(*FEW, "--seeds", 0, "--class_label", "c,a", "--log_dir", tmp_path / "two")
    assert told == [[0, 1, 2, 0]] * 2 + [[2, 0, 2, 0]] * 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samplers", "ddim,euler"], "--samplers 'euler': .*ddpm, ddim, heun"),
        (["--samplers", ""], "--samplers ''"),
        (["--samplers", "unipc:even"], "--samplers 'even': .*uniform, quadratic, logsnr"),
        (["--timestep_spacing", "even"], "--timestep_spacing even"),
        (["--steps", "5,50"], "--steps 50: use 1 to 20"),
        (["--steps", "0"], "--steps 0: use 1 to 20"),
        (["--steps", "five"], "--steps 'five': expected whole numbers"),
        (["--seeds", "0,"], "--seeds '0,': expected whole numbers"),
        (["--seeds", str(2**63)], "--seeds 9223372036854775808"),
        (["--num_samples", "1"], "--num_samples 1: .*at least 2"),
        (["--num_samples", "10000001"], "--num_samples 10000001"),
        (["--reference", ""], "--reference is missing"),
        (["--reference", "absent"], "--reference"),
        (["--features", "absent.pt"], "--features .*absent.pt: there is no such file"),
        (["--class_label", "cat"], "--class_label cat: .*without classes"),
        (["--model_path", "absent"], "--model_path absent: there is no such"),
    ],
)
def test_mistakes_in_one_line(compare, tmp_path, flags, message):
    done = compare(*flags, check=2)
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "cells").exists()


def test_tables_show_mean_spread_and_the_best():
    values = {("unipc", 5): [10.0, 14.0], ("unipc", 20): [3.0, 3.0], ("ddim", 5): [8.0, 10.0]}
    cells = {
        cell_name(Plan(sampler, steps, "logsnr"), seed): {
            "evaluations": steps,
            "seconds": steps / 10,
            "distance": found[seed],
            "difference": found[seed] / 10,
            "kernel_distance": -found[seed] / 100,
            "precision": None if steps == 20 else 0.5 + found[seed] / 100,
            "recall": None if steps == 20 else found[seed] / 100,
        }
        for (sampler, steps), found in values.items()
        for seed in (0, 1)
    }
    record = {
        "model": "/somewhere/ema.pt",
        "computing": "float32, on 1 core",
        "timesteps": 100,
        "metric": "frechet_distance[small.pt]",
        "kernel_metric": "kernel_distance[small.pt]",
        "features_length": 12,
        "reference": "/somewhere/images",
        "reference_images": 1000,
        "images": 100,
        "exact_images": 64,
        "seeds": [0, 1],
        "samplers": [Solver("ddim", "logsnr"), Solver("unipc", "logsnr")],
        "steps": [5, 20],
        "cells": cells,
    }
    tables = markdown(record)
    assert "| sampler | spacing | 5 steps | 20 steps |\n|---|---|--:|--:|\n" in tables
    assert "| ddim | logsnr | **9 +- 1.4** | - |\n| unipc | logsnr | 12 +- 2.8 | **3 +- 0** |\n" in tables
    assert "| ddim | logsnr | **0.9 +- 0.14** | - |" in tables
    assert "**kernel_distance[small.pt]** to the same images" in tables
    assert "| unipc | logsnr | **-0.12 +- 0.028** | **-0.03 +- 0** |" in tables
    # The highest recall is the best.
    assert (
        "| ddim | logsnr | 0.09 +- 0.014 (0.59) | - |\n| unipc | logsnr | **0.12 +- 0.028** (0.62) | - |"
        in tables
    )
    assert "| unipc | logsnr | 0.5 (5) | 2 (20) |" in tables
    assert "**frechet_distance[small.pt]** to the 1,000 images of `images`" in tables
    assert "at all 100 timesteps" not in tables
    assert "are few" not in tables
    assert "100 images are few for 100 features" in markdown({**record, "features_length": 100})


def test_difference_is_in_grey_levels():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert difference(images, images + 255) == 255
    images[0] = 2
    assert difference(images, np.zeros_like(images)) == pytest.approx(2**0.5)


def test_a_record_without_the_newer_metrics_is_completed(compare, drawn, tmp_path):
    compare(*FEW)
    path = tmp_path / "out" / "comparison.json"
    before = read_json(path)
    older = read_json(path)
    for cell in older["cells"].values():
        del cell["recall"], cell["kernel_distance"], cell["precision"]
    path.write_text(json.dumps(older), encoding="utf-8")
    drawn.clear()
    compare(*FEW)
    assert not drawn and read_json(path) == before


def test_three_images_have_no_recall(compare, tmp_path):
    compare(*FEW, "--num_samples", 3)
    (first, *_) = read_json(tmp_path / "out" / "comparison.json")["cells"].values()
    assert first["recall"] is None and first["precision"] is None and first["kernel_distance"] is not None
    assert "| unipc | logsnr | - |" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_guided_images_are_other_images(compare, tmp_path):
    save_trained(tmp_path / "run", class_cond=True, num_classes=3, class_dropout=0.1)
    out_dir, other = tmp_path / "out", tmp_path / "guided"
    compare(*FEW)
    done = compare(*FEW, "--guidance_scale", 3, check=2)
    assert "other" in done.stderr and str(out_dir) in done.stderr
    compare(*FEW, "--guidance_scale", 3, "--log_dir", other)
    record = read_json(other / "comparison.json")
    assert record["guidance"] == {"guidance_scale": 3.0} and ", --guidance_scale 3.0." in markdown(record)
    plain, guided = (images_of(next((d / "cells").glob("unipc-*-2-*"))) for d in (out_dir, other))
    assert not np.array_equal(plain, guided)


def test_guidance_needs_a_model_trained_for_it(compare):
    assert "--guidance_scale 3.0" in compare(*FEW, "--guidance_scale", 3, check=2).stderr
