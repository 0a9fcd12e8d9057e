"""Train a tiny model on an emulated processor with each generation of kernels and without, and compare the metrics.

run.sh calls this file.
"""

import csv
import sys
import tempfile
from pathlib import Path

import improved_diffusion as idf
from improved_diffusion import kernels
from improved_diffusion.cpu.machine import describe_machine, has_bf16

MODEL = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
}
STEPS = 6  # on an emulated processor, PyTorch takes half a minute for one in bfloat16
FLAGS = {
    "total_steps": STEPS,
    "batch_size": 4,
    "log_interval": 1,
    "sample_interval": 0,
    "seed": 0,
    "num_workers": "1",
}
# The output of a new model is zero, so its losses depend little on the kernels; the norms of the gradients do.
METRICS = ("loss", "grad_norm")
# By how much they may differ, relative to themselves.
CLOSE = {"fp32": 1e-4, "bf16": 0.02}


def metrics(precision: str, generation: str) -> list[float]:
    """The metrics of all steps. :param generation: of kernels, or "0" for none."""
    with tempfile.TemporaryDirectory() as folder, kernels.switched(generation):
        run = Path(folder) / "run"
        idf.train(
            "builtin",
            log_dir=run,
            **MODEL,
            **FLAGS,
            precision=precision,
        )
        with open(run / "progress.csv", encoding="utf-8", newline="") as file:
            found = [float(row[name]) for row in csv.DictReader(file) for name in METRICS]
    assert len(found) == STEPS * len(METRICS), found
    return found


def main() -> None:
    print(describe_machine(), "bf16:", has_bf16())
    usable = []
    for generation in kernels.GENERATIONS:
        with kernels.switched(generation):
            usable += [generation] if kernels.generation() == generation else []
    assert usable, "no kernels can be used here"
    assert (usable[-1] == "neonbf16") == has_bf16()
    for precision in CLOSE if has_bf16() else ["fp32"]:
        expected = metrics(precision, "0")
        for generation in usable:
            pairs = zip(metrics(precision, generation), expected)
            difference = max(abs(found / without - 1) for found, without in pairs)
            print(f"RESULT {precision} {generation}: metrics differ by up to {difference:.1e}")
            assert difference < CLOSE[precision], difference


if __name__ == "__main__":
    sys.exit(main())
