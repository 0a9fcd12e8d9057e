"""The mathematics reproduces openai/improved-diffusion's numbers; golden/README.md defines the inputs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.respace import SpacedDiffusion, space_timesteps

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = json.loads((GOLDEN / "reference.json").read_text())
ARRAYS = np.load(GOLDEN / "reference.npz", allow_pickle=False)


def normal(seed, shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def build(case):
    arguments = {
        "betas": get_named_beta_schedule(case["schedule"], case["T"]),
        "model_mean_type": ModelMeanType[case["mean"]],
        "model_var_type": ModelVarType[case["var"]],
        "loss_type": LossType[case["loss"]],
        "rescale_timesteps": case["rescale_timesteps"],
    }
    if case["respacing"]:
        return SpacedDiffusion(space_timesteps(case["T"], case["respacing"]), **arguments)
    return GaussianDiffusion(**arguments)


def toy_model(case):
    def toy(x, t):
        s = th.sin(0.01 * t.float()).view(-1, 1, 1, 1)
        eps = 0.3 * x + 0.1 * s
        return th.cat([eps, th.tanh(0.5 * x) - 0.2 * s], dim=1) if "LEARNED" in case["var"] else eps

    return toy


def computed(case):
    """Everything that the reference holds for a diffusion, by name."""
    seed_x0, seed_noise = (int(re.search(r"seed (\d+)", case[key]).group(1)) for key in ("x0", "noise"))
    x0 = th.from_numpy(np.tanh(normal(seed_x0, (4, 3, 8, 8))))
    noise = th.from_numpy(normal(seed_noise, (4, 3, 8, 8)))
    t = th.tensor(case["t"])
    diffusion, model = build(case), toy_model(case)
    assert diffusion.num_timesteps == case["num_timesteps"]

    x_t = diffusion.q_sample(x0, t, noise)
    values = {"q_sample": x_t}
    values["q_mean"], values["q_variance"], values["q_log_variance"] = diffusion.q_mean_variance(x0, t)
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    values |= {"posterior_mean": mean, "posterior_logvar": log_variance}
    for clip in (0, 1):
        step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=bool(clip))
        values |= {f"p_clip{clip}_{key}": step[key] for key in ("mean", "log_variance", "pred_xstart")}
    values["ddim_eta0"] = diffusion.ddim_sample(model, x_t, t, eta=0.0)["sample"]
    losses = diffusion.training_losses(model, x0, t, noise=noise)
    values |= {f"loss_{key}": loss for key, loss in losses.items()}
    values["vb_bpd"] = diffusion._vb_terms_bpd(model, x0, x_t, t)["output"]
    values["prior_bpd"] = diffusion._prior_bpd(x0)
    return values


@pytest.mark.parametrize("name", REFERENCE["diffusion"])
def test_diffusion(name):
    values = {key: value.numpy() for key, value in computed(REFERENCE["diffusion"][name]).items()}
    prefix = f"diffusion/{name}/"
    expected = {key.removeprefix(prefix): ARRAYS[key] for key in ARRAYS.files if key.startswith(prefix)}
    assert values.keys() == expected.keys()
    for key, array in expected.items():
        value = values[key]
        if array.ndim < value.ndim:  # the reference keeps one number per image where all pixels agree
            value = value[:, 0, 0, 0]
        np.testing.assert_allclose(value, array, rtol=0, atol=2e-5 * np.abs(array).max(), err_msg=key)


@pytest.mark.parametrize(("name", "num_timesteps"), REFERENCE["schedules"])
def test_schedule(name, num_timesteps):
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule(name, num_timesteps),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    prefix = f"schedule/{name}_{num_timesteps}/"
    index = ARRAYS[prefix + "index"]
    names = [
        key.removeprefix(prefix) for key in ARRAYS.files if key.startswith(prefix) and "index" not in key
    ]
    assert len(names) == 6
    for key in names:
        value = getattr(diffusion, key)[index]
        np.testing.assert_allclose(value, ARRAYS[prefix + key], rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("case", REFERENCE["space_timesteps"])
def test_space_timesteps(case):
    num_timesteps, counts = case.split("|")
    counts = json.loads(counts) if counts.startswith("[") else counts
    assert sorted(space_timesteps(int(num_timesteps), counts)) == REFERENCE["space_timesteps"][case]
