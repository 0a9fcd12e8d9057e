"""Flags and factories: what builds, what is refused and how, what travels with a checkpoint."""

import argparse
import os

import numpy as np
import pytest
import torch as th
from conftest import TINY

from improved_diffusion import script_util as su
from improved_diffusion.config import PREDICTIONS, SampleConfig, TrainConfig
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.jobs import runs
from improved_diffusion.levels import attention_factors, channel_multipliers
from improved_diffusion.resample import create_named_schedule_sampler


def build(**flags):
    return su.create_model_and_diffusion(**{**TINY, **flags})


def forward(model, size, **kwargs):
    return model(th.zeros(1, 3, size, size), th.tensor([5]), **kwargs)


def test_defaults_are_the_readme_model():
    model, diffusion = su.create_model_and_diffusion()
    assert sum(p.numel() for p in model.parameters()) == 9_925_059
    assert diffusion.num_timesteps == 1000
    assert su.model_and_diffusion_defaults()["noise_schedule"] == "linear"


@pytest.mark.parametrize("size", [4, 6, 8, 10, 12, 16, 20, 24, 28, 30, 32, 40, 48, 56, 64, 96, 100])
def test_any_image_size_that_can_be_halved(size):
    model = su.create_model(image_size=size, num_channels=32, num_res_blocks=1)
    with th.no_grad():
        assert forward(model, size).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    "mult, size, ok", [("1", 7, True), ("1,2", 6, True), ("1,2,2", 6, False), ("2,1", 8, True)]
)
def test_channel_mult_decides_which_sizes_divide(mult, size, ok):
    if ok:
        model = build(channel_mult=mult, image_size=size, attention_resolutions="")[0]
        with th.no_grad():
            assert forward(model, size).shape == (1, 3, size, size)
    else:
        with pytest.raises(ValueError, match="--image_size 6.*multiple of 4"):
            build(channel_mult=mult, image_size=size)


@pytest.mark.parametrize("size, mult", [(32, (1, 2, 2, 2)), (64, (1, 2, 3, 4)), (256, (1, 1, 2, 2, 4, 4))])
def test_channel_mult_of_upstream_sizes(size, mult):
    assert channel_multipliers("", size) == mult


def test_attention_where_asked():
    assert attention_factors("16,8", 32, 4) == (2, 4)
    assert attention_factors("16,8", 8, 2) == (1,)
    assert attention_factors("16,8", 28, 3) == (2, 4)  # the default, on a size without levels of 16 and 8
    assert attention_factors("", 32, 4) == ()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"num_channels": 40}, "--num_channels.*multiple of 32"),
        ({"num_channels": 0}, "--num_channels 0"),
        ({"image_size": 7, "channel_mult": ""}, "--image_size 7: an odd size"),
        ({"image_size": 0}, "--image_size 0"),
        ({"num_heads": 3}, "--num_heads 3"),
        ({"num_heads_upsample": 0}, "--num_heads_upsample 0"),
        ({"num_res_blocks": 0}, "--num_res_blocks"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"channel_mult": "1,x"}, "--channel_mult '1,x'"),
        ({"channel_mult": "1,0"}, "--channel_mult '1,0'"),
        ({"attention_resolutions": "3"}, "--attention_resolutions 3.*8, 4"),
        ({"attention_resolutions": "a"}, "--attention_resolutions 'a'"),
        ({"noise_schedule": "quadratic"}, "--noise_schedule"),
        ({"diffusion_steps": 0}, "--diffusion_steps"),
        ({"timestep_respacing": "ddim5000"}, "--timestep_respacing"),
    ],
)
def test_impossible_values_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        build(**flags)


def test_diffusion_flags():
    diffusion = build(learn_sigma=True, predict_xstart=True)[1]
    assert diffusion.model_var_type is ModelVarType.LEARNED_RANGE
    assert diffusion.model_mean_type is ModelMeanType.START_X
    assert diffusion.loss_type is LossType.RESCALED_MSE
    assert build(use_kl=True)[1].loss_type is LossType.RESCALED_KL
    assert build(sigma_small=True)[1].model_var_type is ModelVarType.FIXED_SMALL
    assert build(timestep_respacing="ddim50")[1].num_timesteps == 50
    assert build(rescale_learned_sigmas=False)[1].loss_type is LossType.MSE


def test_classes():
    model = build(class_cond=True, num_classes=7)[0]
    assert model.label_emb.num_embeddings == 7
    assert build(class_cond=True)[0].label_emb.num_embeddings == 1000  # as upstream, when nothing is known
    assert forward(model, 8, y=th.tensor([3])).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="labels y"):
        forward(model, 8)


def test_class_dropout_adds_a_label():
    assert build(class_cond=True, num_classes=7, class_dropout=0.1)[0].label_emb.num_embeddings == 8
    with pytest.raises(ValueError, match="--class_dropout 0.1: needs --class_cond"):
        build(class_dropout=0.1)
    with pytest.raises(ValueError, match="--class_dropout 1"):
        build(class_cond=True, class_dropout=1.0)


def test_super_resolution():
    flags = {**{k: v for k, v in TINY.items() if k != "image_size"}, "large_size": 8, "small_size": 4}
    model, _ = su.sr_create_model_and_diffusion(**flags, sigma_small=True)
    assert forward(model, 8, low_res=th.zeros(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    features = model.get_feature_vectors(th.zeros(1, 3, 8, 8), th.tensor([1]), low_res=th.zeros(1, 3, 4, 4))
    assert len(features["down"]) == len(features["up"]) == 4
    with pytest.raises(ValueError, match="--small_size 8"):
        su.sr_create_model_and_diffusion(**{**flags, "small_size": 8})


def test_average_pooling_and_one_dimension():
    from improved_diffusion.unet import UNetModel

    model = UNetModel(3, 32, 3, 1, (2,), channel_mult=(1, 2), conv_resample=False, dims=1)
    assert model(th.zeros(2, 3, 16), th.tensor([1, 2])).shape == (2, 3, 16)


def test_names_of_improved_diffusion_for_flags():
    parser = argparse.ArgumentParser()
    su.add_dict_to_argparser(parser, su.model_and_diffusion_defaults())
    args = parser.parse_args(["--dropout", "0.3", "--learn_sigma", "yes"])
    chosen = su.args_to_dict(args, ["dropout", "learn_sigma", "noise_schedule"])
    assert chosen == {"dropout": 0.3, "learn_sigma": True, "noise_schedule": "linear"}


def test_str2bool():
    assert su.str2bool("True") and su.str2bool("1") and not su.str2bool("no")
    with pytest.raises(argparse.ArgumentTypeError):
        su.str2bool("2")


def test_stored_flags_win_over_defaults_but_not_over_given_ones():
    stored = {"num_channels": 32, "dropout": 0.1, "sigma_small": True, "seed": 9}
    config = SampleConfig(seed=1)
    merged = runs.merge_stored_flags(config, {"sigma_small"}, stored)
    assert merged == SampleConfig(num_channels=32, dropout=0.1, sigma_small=False, seed=1)
    with pytest.raises(ValueError, match="--num_channels 64: contradicts the checkpoint"):
        runs.merge_stored_flags(config, {"num_channels"}, stored)


def test_log_dir(tmp_path, monkeypatch):
    config = TrainConfig()
    first = runs.choose_log_dir(config, str(tmp_path))
    assert first.startswith(str(tmp_path))
    (tmp_path / first).mkdir()
    assert runs.choose_log_dir(config, str(tmp_path)) != first
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    assert runs.choose_log_dir(config, str(tmp_path)) == str(tmp_path / "env")
    assert runs.choose_log_dir(TrainConfig(log_dir=str(tmp_path / "x")), "") == str(tmp_path / "x")


def test_find_data(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "shipped", lambda folder: str(tmp_path))
    assert runs.find_data("builtin", str(tmp_path)) == "builtin"
    assert runs.find_data("given", str(tmp_path)) == os.path.abspath("given")
    lines = []
    assert runs.find_data("", str(tmp_path), log=lines.append) == "builtin"
    assert "BUILT-IN SHAPES" in "".join(lines)
    (tmp_path / "cifar10.py").write_text("import sys; sys.exit(2)")
    assert runs.find_data("", str(tmp_path), log=lines.append) == "builtin"
    script = "import os, sys; assert sys.argv[1] == '--out_dir'; os.makedirs(sys.argv[2])"
    (tmp_path / "cifar10.py").write_text(script)
    assert runs.find_data("", str(tmp_path / "data")) == str(tmp_path / "data" / "cifar_train")
    assert (tmp_path / "data").is_dir()
    (tmp_path / "cifar_train").mkdir()
    (tmp_path / "cifar_train" / ".complete").write_text("50000")
    assert runs.find_data("", str(tmp_path)) == str(tmp_path / "cifar_train")


def test_what_the_model_predicts():
    for prediction, mean in (
        ("epsilon", ModelMeanType.EPSILON),
        ("x_start", ModelMeanType.START_X),
        ("v", ModelMeanType.VELOCITY),
        ("edm", ModelMeanType.EDM),
    ):
        assert su.create_gaussian_diffusion(prediction=prediction).model_mean_type is mean
    assert tuple(su.MEAN_TYPES) == PREDICTIONS
    for prediction in ("epsilon", "x_start"):
        diffusion = su.create_gaussian_diffusion(prediction=prediction, predict_xstart=True)
        assert diffusion.model_mean_type is ModelMeanType.START_X
    with pytest.raises(ValueError, match="--predict_xstart True: contradicts --prediction v"):
        su.create_gaussian_diffusion(prediction="v", predict_xstart=True)
    with pytest.raises(ValueError, match="--prediction 'velocity' is unknown.*x_start, v, edm"):
        su.create_gaussian_diffusion(prediction="velocity")


def test_loss_weightings():
    assert su.create_gaussian_diffusion().loss_weighting is None
    sigma = su.create_gaussian_diffusion().sqrt_recipm1_alphas_cumprod
    min_snr = su.create_gaussian_diffusion(loss_weighting="min_snr")
    assert min_snr.loss_weighting(sigma).max() == 5
    options = {"sigma_mean": -0.5, "sigma_std": 1.0, "uniform_share": 0.3}
    edm = su.create_gaussian_diffusion(prediction="edm", loss_weighting="edm", **options)
    shares = create_named_schedule_sampler("log-normal", edm, **options).weights()
    np.testing.assert_allclose(edm.loss_weighting(sigma), (4 + sigma**-2) * 1000 * shares)
    with pytest.raises(ValueError, match="--loss_weighting 'snr' is unknown; use one of none, min_snr, edm"):
        su.create_gaussian_diffusion(loss_weighting="snr")
    with pytest.raises(ValueError, match="loss_weighting: .*use_kl"):
        su.create_gaussian_diffusion(loss_weighting="min_snr", use_kl=True)
