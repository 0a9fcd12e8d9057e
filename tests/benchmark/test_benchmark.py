"""scripts/benchmark.py: everything is measured, the plain path computes the same, and every mistake is one line."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch as th
from conftest import SCRIPTS, TINY, TINY_FLAGS, read_json

from improved_diffusion import kernels
from improved_diffusion.benchmark import ablation as benchmark_ablation
from improved_diffusion.benchmark import cost as benchmark_cost
from improved_diffusion.benchmark import training as benchmark_training
from improved_diffusion.benchmark.parts import PARTS
from improved_diffusion.benchmark.plain import (
    LAYERED,
    PLAIN,
    PlainTraining,
    PlainUNet,
    layer_by_layer,
    make_plain,
)
from improved_diffusion.benchmark.report import section
from improved_diffusion.benchmark.sampling import measure_sampling
from improved_diffusion.benchmark.settings import Settings, build, random_images
from improved_diffusion.benchmark.timing import Contender, interleave, ratios, seconds_of, spread
from improved_diffusion.benchmark.training import measure_command
from improved_diffusion.cpu.compute import Compute
from improved_diffusion.cpu.gradients import Gradients
from improved_diffusion.kernels import fused

SETTINGS = Settings(
    model=TINY, batch_size=4, microbatch=2, data_dir="builtin", compute=Compute("fp32", 2), rounds=2
)
BY_DEFAULT = ["memory", "peaks", "training", "command", "parts", "sampling", "busy"]


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [] if isinstance(value, str) or value is None else [value]


QUICKLY = """
import runpy, sys
from improved_diffusion.benchmark import busy

busy.SECONDS = busy.SETTLE = 0.1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_measures_everything(tmp_path):
    output = tmp_path / "results.json"
    flags = ["--batch_size", 4, "--microbatch", 2, "--num_workers", 1, "--precision", "bf16", "--rounds", 1]
    command = [sys.executable, "-c", QUICKLY, SCRIPTS / "benchmark.py", *TINY_FLAGS, *flags, "--json", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "profiler" not in done.stderr
    results = read_json(output)
    assert list(results)[3:] == BY_DEFAULT
    assert results["machine"]["torch"] == th.__version__ and results["flags"]["batch_size"] == 4
    assert results["machine"]["kernels"] == kernels.generation()
    for name in BY_DEFAULT:
        assert results[name]["title"] in done.stdout
        rows = results[name]["rows"]
        # What is left of a step, and so may be disturbed to below zero, is no measurement.
        measured = [row for row in rows if not str(row.get("part")).startswith("rest")]
        measured = [{key: value for key, value in row.items() if key != "busy_processes"} for row in measured]
        assert all(math.isfinite(n) and n > 0 for n in numbers(measured)), name
    assert [row["path"] for row in results["training"]["rows"]] == [
        "plain float32",
        "fast float32",
        "fast bfloat16",
    ]
    assert [row["part"] for row in results["parts"]["rows"]][: len(PARTS)] == list(PARTS)


def test_each_optimisation_is_switched_off(monkeypatch):
    def run_once(contenders, rounds):
        return {name: [seconds_of(contender.run)] for name, contender in contenders.items()}

    monkeypatch.setattr(benchmark_ablation, "interleave", run_once)
    settings = replace(SETTINGS, compute=Compute("bf16", 1))
    rows = benchmark_ablation.measure_ablation(settings)["rows"]
    assert all(n > 0 for n in numbers(rows))
    names = {
        precision: {row["optimisation"] for row in rows if row["precision"] == precision}
        for precision in ("float32", "bfloat16")
    }
    assert names["bfloat16"] - names["float32"] == {"16 bits"}
    assert names["float32"] < names["bfloat16"] and len(names["float32"]) >= 6


def test_command_is_compared_step_by_step():
    measured = measure_command(SETTINGS)
    assert math.isfinite(measured["overhead_percent"])
    bare, without_row, with_row = measured["rows"]
    assert all(n > 0 for n in numbers([bare, without_row, with_row]))
    assert "times_bare" in with_row and "times_bare" in without_row


@pytest.mark.parametrize("scale_shift", [True, False])
def test_plain_path_is_the_same_mathematics(scale_shift):
    # Attention over 16 x 16 positions is fused, over 4 x 4 it is not.
    flags = {"image_size": 16, "channel_mult": "1,1,2", "attention_resolutions": "16,4"}
    settings = replace(SETTINGS, model={**TINY, **flags, "use_scale_shift_norm": scale_shift})
    images, timesteps = random_images(settings, 4), th.tensor([0, 300, 700, 999])
    noise = th.randn(images.shape, generator=th.Generator().manual_seed(1))

    model, diffusion = build(settings)
    plain = PlainTraining(model, diffusion, microbatch=2)
    kinds = {type(module) for module in plain.model.modules()}
    assert kinds >= set(PLAIN.values()) and not kinds & set(PLAIN)
    plain.add_gradients(images, timesteps, noise)

    gradients = Gradients(build(settings)[0], "fp32")
    for number, part in enumerate((slice(0, 2), slice(2, 4))):
        with gradients.model() as fast:
            terms = diffusion.training_losses(fast, images[part], timesteps[part], noise=noise[part])
            gradients.add(terms["loss"].sum() / len(images), fast, number)

    expected = th.cat([p.grad.flatten() for p in plain.params])
    found = th.cat([value.flatten() for value in gradients.total()])
    assert th.cosine_similarity(found, expected, dim=0) > 0.9999
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=1e-3)


def test_plain_steps_learn():
    training = PlainTraining(*build(SETTINGS), microbatch=2)
    before = [p.detach().clone() for p in training.params]
    training.step(random_images(SETTINGS, 4))
    for old, p, average in zip(before, training.params, training.average):
        assert not th.equal(old, p)
        th.testing.assert_close(average, old + 1e-4 * (p - old), atol=1e-7, rtol=0)


def test_single_kinds_are_made_plain():
    kinds = list(PLAIN)
    for kind in kinds:
        found = {type(module) for module in make_plain(build(SETTINGS)[0], [kind]).modules()}
        assert PLAIN[kind] in found and kind not in found
        assert found >= set(kinds) - {kind}


def test_layer_by_layer_nothing_changes_but_the_operations(monkeypatch):
    flags = {"image_size": 16, "num_channels": 32, "channel_mult": "1,1", "attention_resolutions": "16"}
    model, _ = build(replace(SETTINGS, model={**TINY, **flags, "use_scale_shift_norm": True}))
    images, timesteps, blocks = random_images(SETTINGS, 2), th.tensor([3, 700]), []
    for name in ("residual", "attention_block"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *given, f=function: blocks.append(f) or f(*given))
    whole = model(images, timesteps)
    assert bool(blocks) == (kernels.generation() is not None)
    blocks.clear()
    assert th.equal(layer_by_layer(model)(images, timesteps), whole) and not blocks
    assert set(LAYERED.values()) <= {type(module) for module in model.modules()}


def test_contenders_take_turns():
    calls = []
    contenders = {
        name: Contender(lambda name=name: calls.append(name), prepare=lambda: calls.append("prepare"))
        for name in "ab"
    }
    seconds = interleave(contenders, rounds=2)
    assert calls == ["prepare", "a", "a", "prepare", "b", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_the_plain_path_has_all_cores_whatever_ran_before(monkeypatch):
    """A training step sets the threads of the thread that calls it to 1."""
    settings, seen = replace(SETTINGS, rounds=1), {"training": set(), "sampling": set()}
    monkeypatch.setattr(
        PlainTraining, "step", lambda *args: seen["training"].add(th.get_num_threads()) or time.sleep(1e-3)
    )
    monkeypatch.setattr(benchmark_training, "matrix_rates", lambda *args: {("fp32", 2): [1.0]})
    benchmark_training.measure_training(settings)
    assert th.get_num_threads() == 1
    forward = PlainUNet.forward
    monkeypatch.setattr(
        PlainUNet, "forward", lambda *args: seen["sampling"].add(th.get_num_threads()) or forward(*args)
    )
    measure_sampling(settings)
    assert seen == {"training": {2}, "sampling": {2}}


def test_spread_and_ratios():
    assert spread([5, *range(11)], scale=2) == {"median": 10, "p10": 2, "p90": 18}
    assert spread([3]) == {"median": 3, "p10": 3, "p90": 3}
    assert ratios([4, 9], [2, 3]) == [2, 3]


def test_table():
    rows = [
        {"name": "first", "ms": {"median": 12.34, "p10": 1, "p90": 123.4}, "cores": 2},
        {"name": "b", "cores": None},
    ]
    text = section({"title": "Title", "note": "how", "rows": rows})
    assert text.splitlines() == [
        "Title",
        "(how)",
        "name              ms    cores",
        "first  12.3 (1..123)        2",
        "b                     unknown",
    ]


def test_cost_varies_one_flag_at_a_time(monkeypatch):
    trained = []

    def train(settings, changes):
        trained.append(changes)
        return {"images_per_second": 2.0, "peak_megabytes": None}

    monkeypatch.setattr(benchmark_cost, "train", train)
    rows = benchmark_cost.measure_cost(SETTINGS)["rows"]
    assert len(trained) == 2 * len(rows) == 2 * 2 * len(benchmark_cost.variations(SETTINGS))
    assert {"flags": "--image_size 64", "cores": 2}.items() <= rows[-1].items()
    assert json.loads(json.dumps(rows)) == rows
    for changes in benchmark_cost.variations(SETTINGS):
        assert len(changes) == 1 or changes["batch_size"] == 32 >= 2 * changes["microbatch"]


def test_process_that_fails_is_reported():
    with pytest.raises(ValueError, match=r"training with .*'data_dir'.* ended with code 1: .*nowhere"):
        benchmark_cost.train(SETTINGS, {"data_dir": "nowhere"})


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "training,sleep"], "--only sleep"),
        (
            ["--json", "nowhere/results.json"],
            f"--json {os.path.abspath('nowhere/results.json')}: there is no folder",
        ),
        (["--rounds", 0], "--rounds 0"),
        (["--microbatch", 0], "--microbatch 0"),
        (["--precision", "fp8"], "--precision fp8"),
        (["--num_workers", "many"], "--num_workers many"),
        (["--num_channels", 33], "--num_channels"),
        (["--data_dir", "nowhere", "--only", "parts"], "--data_dir"),
    ],
)
def test_mistakes(call_script, flags, message):
    done = call_script("benchmark.py", *TINY_FLAGS, *flags)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
