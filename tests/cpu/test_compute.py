"""What to compute in, and on how many cores: what the processor is good at, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest
import torch as th
from conftest import TINY_FLAGS

from improved_diffusion.cpu import compute
from improved_diffusion.cpu.compute import Compute, choose
from improved_diffusion.cpu.machine import keep_memory, release_memory, usable_cores
from improved_diffusion.run import checkpoint


@pytest.mark.parametrize("speedup, precision", [(2.0, "bf16"), (1.0, "fp32"), (0.03, "fp32")])
def test_auto_takes_the_faster_precision(monkeypatch, speedup, precision):
    monkeypatch.setattr(compute, "bf16_speedup", lambda: speedup)
    assert choose().precision == precision
    assert choose("fp32").precision == "fp32"
    assert choose("bf16").precision == "bf16"


def test_auto_takes_the_cores_that_torch_would():
    assert choose("fp32").workers == min(th.get_num_threads(), usable_cores())


def test_no_more_cores_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(compute, "usable_cores", lambda: 3)
    assert choose("fp32", "3") == Compute("fp32", 3)
    assert capsys.readouterr().out == ""
    assert choose("fp32", "999") == Compute("fp32", 3)
    said = "WARNING: num_workers 999: this process may use only 3 cores, and uses these\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "many", "", "99999"])
def test_numbers_of_workers_that_are_none(number):
    with pytest.raises(ValueError, match=f"num_workers {number}: use auto, or a number of cores"):
        choose("fp32", number)


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision fp16: use one of auto, fp32, bf16"):
        choose("fp16")


def test_the_measurement_is_made_once(monkeypatch):
    calls = []
    monkeypatch.setattr(compute, "_time_both", lambda: calls.append(1) or 2.0)
    monkeypatch.setattr(compute, "has_bf16", lambda: True)
    compute.bf16_speedup.cache_clear()
    try:
        assert compute.bf16_speedup() == compute.bf16_speedup() == 2.0
        assert len(calls) == 1
    finally:
        compute.bf16_speedup.cache_clear()


def test_the_measurement_touches_no_random_state():
    before = th.get_rng_state()
    assert compute._time_both() > 0
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize(
    "fp32, bf16, rounds", [(0.001, 0.4, 1), (0.1, 0.4, 5), (0.001, 0.04, 5), (0.002, 0.001, 5)]
)
def test_far_too_slow_is_measured_once(monkeypatch, fp32, bf16, rounds):
    """On ARM64, PyTorch may compute in bfloat16 without instructions for it, a thousand times as slowly."""
    now, counts = [0.0], {th.float32: 0, th.bfloat16: 0}

    def layers(dtype):
        def slow():
            now[0] += {th.float32: fp32, th.bfloat16: bf16}[dtype]
            counts[dtype] += 1

        return slow

    monkeypatch.setattr(compute, "_layers", layers)
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(compute.time, clock, lambda: now[0])
    assert compute._time_both() == pytest.approx(fp32 / bf16)
    assert set(counts.values()) == {rounds}


OLDER_PROCESSORS = {
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "AVX2 in torch only": {"ATEN_CPU_CAPABILITY": "avx2"},
    "none": {"ATEN_CPU_CAPABILITY": "default"},
}


@pytest.mark.parametrize("environment", OLDER_PROCESSORS.values(), ids=OLDER_PROCESSORS.keys())
def test_older_processors_get_32_bits(environment):
    code = "from improved_diffusion.cpu.compute import choose; print(choose())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("float32, on ")


def test_a_run_records_its_precision_and_keeps_it(tmp_path, call_script, monkeypatch):
    run = tmp_path / "run"
    flags = ["--data_dir", "builtin", *TINY_FLAGS, "--log_dir", run, "--sample_interval", "0"]

    def train(steps, *more):
        done = call_script("image_train.py", *flags, "--total_steps", steps, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def precision():
        return checkpoint.find(str(run)).state["precision"]

    monkeypatch.setattr(compute, "bf16_speedup", lambda: 0.5)
    assert "computing in float32, on 1 core" in train(1) and precision() == "fp32"
    monkeypatch.setattr(compute, "bf16_speedup", lambda: 2.0)
    assert "computing in float32" in train(2) and precision() == "fp32"
    said = train(3, "--precision", "bf16", "--num_workers", "2")
    assert "WARNING: this run was trained in fp32; it continues in bf16" in said
    assert "computing in bfloat16, weights in float32, on 2 cores" in said and precision() == "bf16"
    monkeypatch.setattr(compute, "bf16_speedup", lambda: 0.5)
    assert "note: this processor is faster in float32: give --precision fp32" in train(4)


def test_a_resumed_run_keeps_16_bits_whatever_is_measured(tmp_path, call_script, monkeypatch):
    flags = ["--data_dir", "builtin", *TINY_FLAGS, "--log_dir", tmp_path, "--sample_interval", "0"]
    for steps, speedup in (("1", 2.0), ("2", 0.5)):
        monkeypatch.setattr(compute, "bf16_speedup", lambda speedup=speedup: speedup)
        assert call_script("image_train.py", *flags, "--total_steps", steps).returncode == 0
        assert checkpoint.find(str(tmp_path)).state["precision"] == "bf16"


def test_memory_can_be_kept_and_handed_back():
    assert keep_memory() in (True, False)
    release_memory()
    # The thresholds that the C library begins with, for the tests that follow in this process.
    keep_memory(128 * 1024, 128 * 1024)
