"""The flags of the scripts that draw: which sampler they stand for, and what contradicts what."""

import re
from dataclasses import replace

import pytest
from conftest import TINY

from improved_diffusion import samplers
from improved_diffusion.config import SAMPLERS, SPACINGS, SampleConfig, SamplerFlags
from improved_diffusion.flags import Parser, defaults
from improved_diffusion.jobs.sample import choose_labels, choose_plan
from improved_diffusion.sample_util import DEFAULT_PLAN, DETERMINISTIC_PLAN, Plan
from improved_diffusion.script_util import create_model_and_diffusion

T = 1000


def plan_of(command, steps=T):
    config, given = Parser(SampleConfig, "test").parse_flags(command.split())
    respacing = config.timestep_respacing
    diffusion = create_model_and_diffusion(**TINY, diffusion_steps=steps, timestep_respacing=respacing)[1]
    return choose_plan(config, given, diffusion)


@pytest.mark.parametrize(
    "command, plan",
    [
        ("", DEFAULT_PLAN),
        ("--interpolate True", DETERMINISTIC_PLAN),
        ("--interpolate True --sample_steps 9", replace(DETERMINISTIC_PLAN, steps=9)),
        ("--sampler heun --sample_steps 7", Plan("heun", 7)),
        ("--sample_steps 10 --timestep_spacing logsnr", replace(DEFAULT_PLAN, steps=10, spacing="logsnr")),
        ("--sampler ddim --eta 0.5", Plan("ddim", 20, eta=0.5)),
        ("--eta 0.5", replace(DEFAULT_PLAN, eta=0.5)),
        ("--eta 0", Plan("sde_dpmpp_2m", spacing="quadratic", eta=0.0)),
        ("--sampler ddim --eta 1", Plan("ddim", spacing="quadratic", eta=1.0)),
        ("--sampler ipndm", Plan("ipndm", spacing="quadratic")),
        ("--sampler sde_dpmpp_2m", Plan("sde_dpmpp_2m", eta=1.0)),
        ("--sampler sde_dpmpp_2m --eta 0.5", Plan("sde_dpmpp_2m", eta=0.5)),
        ("--clip_denoised False", replace(DEFAULT_PLAN, clip_denoised=False)),
        # What improved-diffusion's commands mean there.
        ("--timestep_respacing 10", Plan("ddpm", None)),
        ("--use_ddim True", Plan("ddim", None)),
        ("--use_ddim False", Plan("ddpm", None)),
        ("--use_ddim True --timestep_respacing ddim10", Plan("ddim", None)),
        ("--use_ddim True --eta 1", Plan("ddim", None, eta=1.0)),
        ("--sampler ddpm", Plan("ddpm", None)),
        # Both at once, where they go together.
        ("--sampler ddim --timestep_respacing ddim10", Plan("ddim", None)),
        ("--sampler ddim --use_ddim True", Plan("ddim", None)),
        ("--sampler ddpm --sample_steps 5", Plan("ddpm", 5)),
        ("--use_ddim True --sample_steps 5", Plan("ddim", 5)),
        ("--use_ddim False --sampler heun --sample_steps 5", Plan("heun", 5)),
        ("--use_ddim True --sampler ddim", Plan("ddim", None)),  # they agree
    ],
)
def test_flags_to_plan(command, plan):
    assert plan_of(command) == plan


@pytest.mark.parametrize(
    "command, spacing",
    [
        ("", "karras"),
        ("--eta 0", "logsnr"),
        ("--sampler ipndm", "logsnr"),
        ("--sampler ddim --eta 1", "logsnr"),
        ("--sampler ddpm --sample_steps 9", "logsnr"),
    ],
)
def test_the_cosine_schedule_has_no_quadratic_steps(command, spacing):
    """From T - 1, where nothing is left of the image, they would leap to where most of it is."""
    config, given = Parser(SampleConfig, "test").parse_flags(command.split())
    diffusion = create_model_and_diffusion(**TINY, diffusion_steps=1000, noise_schedule="cosine")[1]
    assert choose_plan(config, given, diffusion).spacing == spacing
    assert plan_of(command, steps=1000).spacing == "quadratic"


def test_fewer_timesteps_than_the_default_takes_steps():
    # So few timesteps begin with far more noise than 1,000 do, so their spacing is that of the cosine schedule.
    assert plan_of("", steps=6) == replace(DEFAULT_PLAN, steps=6, spacing="karras")
    assert plan_of("--sampler ddpm", steps=6) == Plan("ddpm", None, "logsnr")


@pytest.mark.parametrize(
    "command, message",
    [
        ("--sampler euler", "--sampler euler: .*ddpm, ddim, heun"),
        ("--timestep_spacing even", "--timestep_spacing even: .*uniform, quadratic, logsnr, karras"),
        ("--sample_steps 0", "--sample_steps 0"),
        ("--sample_steps 1001", "--sample_steps 1001: .* 1000 timesteps"),
        ("--sampler ddim --eta 1.5", "--eta 1.5: must be at least 0 and at most 1"),
        ("--sampler ddim --eta nan", "--eta nan"),
        ("--sampler heun --eta 0.5", "--eta 0.5: is for --sampler ddim and sde_dpmpp_2m only"),
        ("--sampler ddpm --eta 1", "--eta 1.0: is for --sampler ddim"),
        ("--use_ddim True --sampler heun", "--use_ddim True: contradicts --sampler heun"),
        ("--use_ddim False --sampler ddim", "--use_ddim False: contradicts --sampler ddim"),
        (
            "--timestep_respacing 10 --sample_steps 10",
            "--timestep_respacing 10: contradicts --sample_steps 10",
        ),
        (
            "--timestep_respacing 10 --sampler unipc",
            "--timestep_respacing 10: goes with --sampler ddpm or ddim",
        ),
        (
            "--timestep_respacing 10 --timestep_spacing logsnr",
            "--timestep_spacing logsnr: contradicts --timestep_respacing",
        ),
        ("--sampler ddpm --timestep_spacing logsnr", "--timestep_spacing logsnr: contradicts .*ddpm"),
    ],
)
def test_contradictions(command, message, capsys):
    try:
        plan_of(command)
    except ValueError as error:  # of the plan, for which the model must be known
        text = str(error)
    except SystemExit:
        text = capsys.readouterr().err.rstrip()
    assert re.search(message, text) and "\n" not in text


def test_what_the_help_says_is_what_happens():
    assert tuple(samplers.SAMPLERS) == SAMPLERS and SPACINGS == samplers.SPACINGS
    described = defaults(SamplerFlags)
    assert DEFAULT_PLAN.sampler == described["sampler"] and DEFAULT_PLAN.steps == described["sample_steps"]
    assert plan_of("").spacing == DEFAULT_PLAN.spacing and described["timestep_spacing"] == ""
    assert DEFAULT_PLAN.eta == described["eta"]


def test_labels():
    flags = {"class_cond": True, "num_classes": 3, "class_label": ""}
    assert choose_labels(SampleConfig(**flags), ["a", "b", "c"]) == [0, 1, 2]
    assert choose_labels(SampleConfig(**{**flags, "class_label": "c,0"}), ["a", "b", "c"]) == [2, 0]
    assert choose_labels(SampleConfig(**{**flags, "class_cond": False}), []) is None
    with pytest.raises(ValueError, match="--class_label c: this model was trained without classes"):
        choose_labels(SampleConfig(**{**flags, "class_cond": False, "class_label": "c"}), [])
