"""The speed of sampling: how many images per second the model can evaluate, without gradients."""

import copy
import statistics
from functools import partial
from typing import Any

import torch as th

from improved_diffusion.benchmark.plain import make_plain
from improved_diffusion.benchmark.settings import NAMES, Settings, build, random_images
from improved_diffusion.benchmark.timing import Contender, interleave, ratios, spread
from improved_diffusion.config import DrawingFlags
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.sample_util import DEFAULT_PLAN

BATCH = DrawingFlags().batch_size


def measure_sampling(settings: Settings) -> dict[str, Any]:
    """Forward passes on a batch, on one core and on all."""
    model = build(settings)[0].eval()
    images, timesteps = random_images(settings, BATCH), th.full((BATCH,), 500.0)
    plain = th.no_grad()(make_plain(copy.deepcopy(model)))
    contenders = {
        # Freed memory is kept, as in any program that only samples: malloc adapts to that after a while.
        ("plain", "fp32", settings.compute.workers): Contender(
            partial(plain, images, timesteps), threads=settings.compute.workers
        )
    }
    for precision in settings.precisions:
        for cores in settings.cores:
            fast = fast_model(model, precision, cores)
            contenders["fast", precision, cores] = Contender(partial(fast, images, timesteps))
    seconds = interleave(contenders, settings.rounds)
    base = next(iter(seconds.values()))
    rows = []
    for (path, precision, cores), values in seconds.items():
        per_image = statistics.median(values) / BATCH
        rows.append(
            {
                "path": f"{path} {NAMES[precision]}",
                "cores": cores,
                "ms_per_batch": spread(values, 1e3),
                "evaluations_per_second": 1 / per_image,
                "times_plain": spread(ratios(base, values)),
                "seconds_per_image": DEFAULT_PLAN.steps * per_image,
            }
        )
    steps = DEFAULT_PLAN.steps
    return {
        "title": f"Sampling: forward passes on batches of {BATCH} images",
        "note": f"an evaluation is a forward pass on one image; an image takes {steps} of them, one per step",
        "rows": rows,
    }
