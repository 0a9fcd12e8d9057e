"""The package from Python: what the commands do, as arrays and numbers; typed, documented, with clear mistakes."""

import ast
import inspect
import json
import os
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch as th
from conftest import ROOT, TINY, read_json, save_trained
from PIL import Image

import improved_diffusion as idf
from improved_diffusion import api
from improved_diffusion.run import checkpoint

EXPORTED = sorted(set(idf.__all__) - {"Images", "Model"})
FP32 = ["--precision", "fp32", "--num_workers", 1]


@pytest.fixture
def run(tmp_path):
    names = ("cat", "dog", "ship")
    return save_trained(
        tmp_path / "run", class_names=names, class_cond=True, num_classes=3, class_dropout=0.1
    )


def load(path, **flags):
    return idf.load(path, precision="fp32", num_workers=1, **flags)


def test_importing_the_package_loads_nothing_heavy():
    code = """
import sys
import improved_diffusion as idf
assert not {"torch", "numpy", "PIL", "blobfile"} & sys.modules.keys()
assert {"load", "train", "evaluate", "nll", "Model", "Images"} <= set(dir(idf))
try:
    idf.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
assert idf.load.__module__ == "improved_diffusion.api" and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_name_is_typed_and_has_an_example():
    tree = ast.parse((ROOT / "improved_diffusion" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(idf.__all__), "what type checkers see"
    assert (ROOT / "improved_diffusion" / "py.typed").exists()
    for function in [*(getattr(idf, name) for name in EXPORTED), idf.Model.sample]:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        assert hints.keys() >= {*parameters, "return"} - {"self"}, function
    for name in idf.__all__:
        assert "Example::" in getattr(idf, name).__doc__, name


def test_it_draws_what_the_command_draws(run, tmp_path, call_script):
    flags = ["--num_samples", 5, "--class_label", "dog,cat", "--sample_steps", 3, "--seed", 7]
    flags += ["--guidance_scale", 2, "--sampler", "unipc", "--batch_size", 3]
    call_script("image_sample.py", "--model_path", run, *flags, *FP32, "--log_dir", tmp_path / "out", check=0)
    with np.load(tmp_path / "out" / "samples_5x8x8x3.npz") as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    wanted = {"steps": 3, "seed": 7, "sampler": "unipc", "guidance_scale": 2, "batch_size": 3}
    images = load(run).sample(5, classes=["dog", "cat"], progress=False, **wanted)
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert np.array_equal(images, pixels) and images.labels.tolist() == labels.tolist() == [1, 0, 1, 0, 1]
    images.save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as ours, Image.open(tmp_path / "out" / "grid.png") as theirs:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_defaults_are_those_of_the_command(run, tmp_path, call_script):
    call_script(
        "image_sample.py",
        "--model_path",
        run,
        "--num_samples",
        4,
        *FP32,
        "--log_dir",
        tmp_path / "o",
        check=0,
    )
    with np.load(tmp_path / "o" / "samples_4x8x8x3.npz") as arrays:
        assert np.array_equal(load(run).sample(4), arrays["arr_0"])


def test_a_model_says_what_it_is(run):
    model = load(run)
    assert (model.image_size, model.step, model.class_names) == (8, 4, ["cat", "dog", "ship"])
    assert model.path.endswith("ema_0.99_000004.pt") and "8x8" in repr(model) and "3 classes" in repr(model)


def test_one_model_draws_in_many_ways(run):
    model = load(run)
    first = model.sample(2, steps=2, classes="cat")
    other = model.sample(2, steps=2, classes=1, timestep_respacing="", clip_denoised=False)
    assert other.labels.tolist() == [1, 1] and not np.array_equal(first, other)
    assert np.array_equal(first, model.sample(2, steps=2, classes=[0])), (
        "what was asked for before leaves no trace"
    )
    assert len(model.sample(3, use_ddim=True, timestep_respacing="4")) == 3


def test_it_edits_as_many_images_as_there_are(run, tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "red.png")
    model = load(run)
    edited = model.sample(init_image=tmp_path / "red.png", strength=0.2, steps=5, classes="cat")
    assert edited.shape == (1, 8, 8, 3)
    assert len(model.sample(steps=1)) == 16, "without images to edit"


def test_images_are_an_array_that_can_be_saved(tmp_path):
    pixels = np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3)
    images = idf.Images(pixels, np.array([0, 0, 1, 1]))
    assert type(images.mean()) is np.float64 and type(images + 1) is np.ndarray
    assert isinstance(images[1:], idf.Images) and images[1:].labels is None
    assert [picture.size for picture in images.pil()] == [(6, 6)] * 4
    assert np.array_equal(np.asarray(images.pil()[2]), pixels[2])
    images[0].save(tmp_path / "one.png")
    assert images._repr_png_().startswith(b"\x89PNG") and (tmp_path / "one.png").exists()
    images.save(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels) and arrays["arr_1"].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="float64.*is no picture"):
        images.astype(float).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.docx: unknown kind"):
        images.save(tmp_path / "x.docx")
    assert not (tmp_path / "x.docx").exists()


def train(data="builtin", **flags):
    short = {"total_steps": 2, "sample_interval": 0, "precision": "fp32", "num_workers": 1, "batch_size": 2}
    return idf.train(data, **{**TINY, "diffusion_steps": 10, **short, **flags})


def test_training_returns_the_model_and_the_same_call_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = th.get_num_threads()
    model = train(log_dir=tmp_path / "run", class_cond=True)
    assert model.step == 2 and "star" in model.class_names and th.get_num_threads() == threads
    assert "improved_diffusion.train('builtin', " in read_json(tmp_path / "run" / "run.json")["command"]
    assert train(log_dir="run", class_cond=True, total_steps=3).step == 3
    assert checkpoint.steps("run") == [2, 3]
    train(init_from=tmp_path / "run", **dict.fromkeys(TINY), diffusion_steps=None)
    (found,) = os.listdir("runs")
    assert read_json(tmp_path / "runs" / found / "args.json")["class_cond"] is True
    assert "python -m improved_diffusion sample" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "error"), [(130, KeyboardInterrupt), (1, RuntimeError)])
def test_a_training_that_does_not_reach_its_end_raises(tmp_path, monkeypatch, code, error):
    monkeypatch.setattr(api, "run_training", lambda *arguments: code)
    with pytest.raises(error, match="log.txt" if code == 1 else None):
        train(log_dir=tmp_path / "run")


def test_it_evaluates_as_the_command_does(tmp_path, call_script):
    rng = np.random.default_rng(0)
    images = idf.Images(rng.integers(0, 255, (20, 8, 8, 3), np.uint8))
    images.save(tmp_path / "images.npz")
    flags = ["--samples", tmp_path / "images.npz", "--reference", "builtin", "--features", "pixel"]
    call_script("image_eval.py", *flags, "--output", tmp_path / "result.json", check=0)
    record = idf.evaluate(images, "builtin", features="pixel")
    assert record["metrics"] == read_json(tmp_path / "result.json")["metrics"] and record["images"] == 20
    assert idf.evaluate(images, np.asarray(images), features="pixel")["metrics"]["precision[pixel]"] == 1


def test_it_measures_likelihood_as_the_command_does(run, tmp_path, call_script):
    names = ("cat", "dog", "ship")
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(
            tmp_path / "data" / f"{names[number % 3]}_{number}.png"
        )
    flags = [
        "--data_dir",
        tmp_path / "data",
        "--num_samples",
        3,
        "--num_workers",
        1,
        "--log_dir",
        tmp_path / "nll",
    ]
    call_script("image_nll.py", "--model_path", run, *flags, check=0)
    expected = read_json(tmp_path / "nll" / "nll.json")
    for model in (load(run), run):
        found = idf.nll(model, tmp_path / "data", n=3, num_workers=1)
        assert found["bits_per_dim"] == expected["bits_per_dim"] and found["images"] == 3
        assert found["per_image"].shape == (3,) and found["steps"] == 20


def test_mistakes_name_what_is_wrong(run, tmp_path):
    model = load(run)
    (tmp_path / "empty").mkdir()
    for call, error, message in (
        (lambda: model.sample(2, classes="cow"), ValueError, "'cow'.*cat, dog, ship"),
        (lambda: model.sample(2, classes=5), ValueError, "'5'"),
        (lambda: model.sample(0), ValueError, "--num_samples 0"),
        (lambda: model.sample(2, steps=21), ValueError, "--sample_steps 21: this model has 20"),
        (lambda: model.sample(2, sampler="dimm"), ValueError, "did you mean ddim"),
        (lambda: model.sample(2, image_size=16), ValueError, "--image_size 16: contradicts"),
        (lambda: model.sample("two"), TypeError, "num_samples='two'"),
        (lambda: model.sample(2, etta=0.5), TypeError, "etta: there is no such argument; did you mean eta"),
        (lambda: model.sample(2, log_dir="x"), TypeError, "log_dir: .*save"),
        (lambda: model.sample(2, precision="fp32"), TypeError, "precision: .*load"),
        (lambda: idf.load(run, eta=0.5), TypeError, "eta: .*sample"),
        (lambda: idf.load(tmp_path / "absent"), ValueError, "absent: there is no such"),
        (lambda: idf.load(tmp_path / "empty"), ValueError, "holds no complete checkpoint"),
        (lambda: idf.load(run, num_channels=64), ValueError, "--num_channels 64: contradicts"),
        (lambda: train(tmp_path / "empty", log_dir=tmp_path / "x"), ValueError, "--data_dir .*empty"),
        (lambda: train(log_dir=tmp_path / "x", processes=2), ValueError, "--processes 2: .* command line"),
        (lambda: train(log_dir=tmp_path / "x", lr="fast"), TypeError, "lr='fast'"),
        (lambda: train(log_dir=tmp_path / "x", hours=1), ValueError, "--total_steps .*contradicts --hours"),
        (lambda: idf.evaluate(tmp_path / "absent", "builtin"), ValueError, "--samples .*absent"),
        (lambda: idf.evaluate(np.zeros((4, 8, 8)), "builtin"), ValueError, "float64.*no picture"),
        (lambda: idf.nll(model, tmp_path / "empty"), ValueError, "--data_dir .*empty"),
        (lambda: idf.nll(model, "builtin", n=2), ValueError, "circle"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "x").exists()


def test_the_notebook_runs(tmp_path):
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    (tmp_path / "cells.py").write_text("\n\n".join(cells), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "cells.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "(8, 32, 32, 3) uint8" in done.stdout
    assert (tmp_path / "grid.png").exists() and (tmp_path / "runs" / "shapes" / "results.xlsx").exists()


def test_the_examples_of_the_page_use_what_exists():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "idf":
                assert node.attr in idf.__all__
