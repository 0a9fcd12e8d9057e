"""Diffusions for tests."""

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.respace import SpacedDiffusion, space_timesteps


def build(
    steps=1000,
    *,
    schedule="linear",
    betas=None,
    mean=ModelMeanType.EPSILON,
    var=ModelVarType.FIXED_SMALL,
    loss=LossType.MSE,
    respacing=None,
    rescale_timesteps=False,
    sigma_data=0.5,
    loss_weighting=None,
):
    arguments = {
        "betas": get_named_beta_schedule(schedule, steps) if betas is None else betas,
        "model_mean_type": mean,
        "model_var_type": var,
        "loss_type": loss,
        "rescale_timesteps": rescale_timesteps,
        "sigma_data": sigma_data,
        "loss_weighting": loss_weighting,
    }
    if respacing:
        return SpacedDiffusion(space_timesteps(steps, respacing), **arguments)
    return GaussianDiffusion(**arguments)
