"""Conversion to and from diffusers: equal outputs from diffusers itself, and refusals that name their reason."""

import json
import re

import numpy as np
import pytest
import torch as th
from conftest import TINY, read_json

from improved_diffusion.convert.models import DiffusersModel, export_model, import_model
from improved_diffusion.run import checkpoint
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")

SUPER = {
    "large_size": 8,
    "small_size": 4,
    **{name: value for name, value in TINY.items() if name != "image_size"},
}
# The layout of google/ddpm-cifar10-32, smaller; attention at 16 of 32 pixels becomes attention at 8 of 16.
GOOGLE = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [32, 64, 64],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 16,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
GOOGLE_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_large",
    "clip_sample": True,
}


def build(seed=0, **changes):
    """A small model whose weights are all random, none zero, with its diffusion and flags."""
    flags = {**model_and_diffusion_defaults(), **TINY, **changes}
    model, diffusion = create_model_and_diffusion(**flags)
    randomize(model, seed)
    return model.eval(), diffusion, flags


def randomize(model, seed=0):
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in model.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator) * 0.1)


def theirs_from(source):
    """diffusers' own model and scheduler of what was exported."""
    model = diffusers.UNet2DModel.from_config(source.unet_config).eval()
    model.load_state_dict(source.weights)
    return model, diffusers.DDPMScheduler.from_config(source.scheduler_config)


def outputs(ours, theirs, size, classes=None):
    """What both models make of the same noise, at timesteps from both ends."""
    channels = theirs.config.in_channels
    x = th.randn(3, channels, size, size, generator=th.Generator().manual_seed(5))
    t = th.tensor([0, 437, 999])
    y = None if classes is None else th.arange(3) % classes
    with th.no_grad():
        return ours(x, t, y), theirs(x, t, class_labels=y).sample


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


VARIANTS = {
    "default": {},
    "one head": {"num_heads": 1},
    "added embedding": {"use_scale_shift_norm": False},
    "learned variance": {"learn_sigma": True, "noise_schedule": "cosine"},
    "classes": {"class_cond": True, "num_classes": 5},
    "withheld classes": {"class_cond": True, "num_classes": 4, "class_dropout": 0.1},
    "three levels": {
        "image_size": 16,
        "channel_mult": "1,2,2",
        "num_res_blocks": 2,
        "attention_resolutions": "8,4",
    },
    "top attention": {"channel_mult": "1,1", "attention_resolutions": "8"},
    "no attention but in the middle": {"attention_resolutions": ""},
    "details of DDPM": {"ddpm_details": True},
    "predicts the image": {"predict_xstart": True, "sigma_small": True},
    "predicts v": {"prediction": "v"},
    "two hundred steps": {"diffusion_steps": 200, "rescale_timesteps": False},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_exported_model_computes_the_same_in_diffusers(changes):
    model, diffusion, flags = build(**changes)
    theirs, scheduler = theirs_from(export_model(model, flags))
    assert_close(*outputs(model, theirs, flags["image_size"], model.num_classes))
    assert np.allclose(scheduler.alphas_cumprod, diffusion.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_is_bit_identical(changes):
    model, _, flags = build(**changes)
    back, back_flags = import_model(export_model(model, flags))
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(th.equal(state[name], value) for name, value in model.state_dict().items())
    assert back.ddpm_details == model.ddpm_details
    assert back_flags["diffusion_steps"] == flags["diffusion_steps"]
    assert back_flags["predict_xstart"] == flags["predict_xstart"]
    assert back_flags["prediction"] == flags["prediction"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": True},
        {"sigma_small": True},
        {"predict_xstart": True},
        {"prediction": "x_start"},
        {"prediction": "v"},
    ],
)
@pytest.mark.parametrize("t", [1, 500, 999])
def test_exported_scheduler_takes_the_same_step(changes, t):
    model, diffusion, flags = build(**changes)
    theirs, scheduler = theirs_from(export_model(model, flags))
    x = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(1))
    with th.no_grad():
        ours = diffusion.p_mean_variance(model, x, th.tensor([t, t]), clip_denoised=True)
        predicted = theirs(x, t).sample
    drawn = scheduler.step(predicted, t, x, generator=th.Generator().manual_seed(2)).prev_sample
    noise = th.randn(x.shape, generator=th.Generator().manual_seed(2))
    expected = ours["mean"] + (0.5 * ours["log_variance"]).exp() * noise
    assert (drawn - expected).abs().max() <= 1e-4 * expected.abs().max()


THEIRS = {
    "google": GOOGLE,
    "defaults of diffusers": {
        "sample_size": 16,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "several heads": {**GOOGLE, "attention_head_dim": 16},
    "classes and variance": {**GOOGLE, "num_class_embeds": 7, "out_channels": 6},
    "grey": {**GOOGLE, "in_channels": 1, "out_channels": 1},
    "scale and shift": {**GOOGLE, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
}


@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
def test_imported_model_computes_the_same(config):
    theirs = diffusers.UNet2DModel(**config).eval()
    randomize(theirs)
    scheduler = dict(GOOGLE_SCHEDULER)
    if config.get("out_channels") == 6:
        scheduler["variance_type"] = "learned_range"
    ours, flags = import_model(DiffusersModel(dict(theirs.config), scheduler, theirs.state_dict()))
    assert_close(*outputs(ours.eval(), theirs, 16, config.get("num_class_embeds")))
    assert (flags["diffusion_steps"], flags["noise_schedule"]) == (1000, "linear")


EXPORT_REFUSALS = {
    "--channel_mult 2,4": {"channel_mult": "2,4"},
    "--num_heads 2: .* 16 and 32 channels": {"num_heads": 2, "attention_resolutions": "8,4"},
    "--num_heads_upsample 2": {"num_heads_upsample": 2},
    "--rescale_timesteps True": {"diffusion_steps": 500},
    "--prediction edm: diffusers has no equivalent": {"prediction": "edm"},
    "--diffusion_steps 10": {"diffusion_steps": 10, "rescale_timesteps": False},
}


@pytest.mark.parametrize("message", EXPORT_REFUSALS)
def test_export_refuses_by_name(message):
    model, _, flags = build(**EXPORT_REFUSALS[message])
    with pytest.raises(ValueError, match=message):
        export_model(model, flags)


UNET_REFUSALS = {
    "freq_shift 1, norm_eps 1e-05, downsample_padding 0": {"norm_eps": 1e-5},
    "act_fn 'gelu'": {"act_fn": "gelu"},
    "attention_head_dim 32: .*32, 64": {
        "attention_head_dim": 32,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
    },
    "attn_norm_num_groups None": {"resnet_time_scale_shift": "scale_shift"},
    "block_out_channels .*32, 48, 64": {"block_out_channels": [32, 48, 64]},
    "block_out_channels .*not as many": {"block_out_channels": [32, 64]},
    "block_out_channels 'many'": {"block_out_channels": "many"},
    "class_embed_type 'timestep'": {"class_embed_type": "timestep"},
    "down_block_types.*'SkipDownBlock2D'": {"down_block_types": ["SkipDownBlock2D"] * 3},
    "down_block_types.*7": {"down_block_types": [[7], None, {}]},
    "downsample_type 'resnet'": {"downsample_type": "resnet"},
    "dropout 'a lot'": {"dropout": "a lot"},
    "in_channels 2": {"in_channels": 2},
    "out_channels 3: .*as in_channels": {"in_channels": 1},
    "layers_per_block -1": {"layers_per_block": -1},
    "mid_block_type None": {"mid_block_type": None},
    "num_res_blocks": {"layers_per_block": 10**9},
    "sample_size .*16, 32, 48": {"sample_size": [16, 32, 48]},
    "time_embedding_dim 64": {"time_embedding_dim": 64},
    "time_embedding_type 'fourier'": {"time_embedding_type": "fourier"},
    "up_block_types": {"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]},
    "variance_type 'fixed_large'": {"out_channels": 6},
}
SCHEDULER_REFUSALS = {
    "_class_name 'EDMEulerScheduler'": {"_class_name": "EDMEulerScheduler"},
    "beta_schedule 'scaled_linear'": {"beta_schedule": "scaled_linear"},
    "beta_start 0.0001, beta_end 0.012": {"beta_end": 0.012},
    "beta_start wrong": {"beta_start": "wrong"},
    "num_train_timesteps 0": {"num_train_timesteps": 0},
    "prediction_type 'flow'": {"prediction_type": "flow"},
    "rescale_betas_zero_snr True": {"rescale_betas_zero_snr": True},
    "trained_betas": {"trained_betas": [0.1, 0.2]},
    "variance_type 'learned'": {"variance_type": "learned"},
}


@pytest.mark.parametrize("message", [*UNET_REFUSALS, *SCHEDULER_REFUSALS])
def test_import_refuses_by_name(message):
    unet = {**GOOGLE, **UNET_REFUSALS.get(message, {})}
    scheduler = {**GOOGLE_SCHEDULER, **SCHEDULER_REFUSALS.get(message, {})}
    with pytest.raises(ValueError, match=message):
        import_model(DiffusersModel(unet, scheduler, {}))


def test_weights_that_do_not_fit_are_named():
    model, _, flags = build()
    exported = export_model(model, flags)
    for name, change, message in [
        ("conv_in.bias", None, r"conv_in.bias is no tensor in the file; .* \[32\]"),
        ("mid_block.attentions.0.to_q.weight", th.zeros(64, 32), r"to_q.weight has the shape \[64, 32\]"),
        ("extra.weight", th.zeros(1), "extra.weight is in the file"),
    ]:
        weights = {**exported.weights, name: change}
        if change is None:
            del weights[name]
        with pytest.raises(ValueError, match=message):
            import_model(DiffusersModel(exported.unet_config, exported.scheduler_config, weights))


def save_run(folder, **changes):
    """A run with a checkpoint of step 3, as training leaves it."""
    model, _, flags = build(**changes)
    state = {"samples": 24, "arguments": flags, "data": {"class_names": []}}
    tensors = {"model": model.state_dict(), "0.9999": {k: v / 2 for k, v in model.state_dict().items()}}
    checkpoint.save(str(folder), 3, tensors, state)
    return model


def test_script_exports_what_diffusers_loads_and_imports_it_again(tmp_path, call_script):
    (tmp_path / "run").mkdir()
    model = save_run(tmp_path / "run")
    done = call_script(
        "convert_checkpoint.py",
        "--model_path",
        tmp_path / "run" / "model000003.pt",
        "--to_diffusers",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert_close(*outputs(model, pipeline.unet.eval(), 8))
    assert pipeline.scheduler.config.variance_type == "fixed_large"

    # What diffusers itself saves is read as well as what we have written.
    pipeline.save_pretrained(tmp_path / "saved")
    done = call_script(
        "convert_checkpoint.py", "--from_diffusers", tmp_path / "saved", "--log_dir", tmp_path / "imported"
    )
    assert done.returncode == 0, done.stderr
    imported = checkpoint.find(str(tmp_path / "imported"))
    assert imported.step == 0
    weights = imported.load("model")
    assert all(th.equal(weights[name], value) for name, value in model.state_dict().items())


def test_run_directory_exports_its_moving_average(tmp_path, call_script):
    (tmp_path / "run").mkdir()
    model = save_run(tmp_path / "run")
    done = call_script(
        "convert_checkpoint.py", "--model_path", tmp_path / "run", "--to_diffusers", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    weights = safetensors.load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert th.equal(weights["conv_in.weight"], model.input_blocks[0][0].weight / 2)


def test_layout_of_google_imports_and_goes_on_training(tmp_path, call_script):
    """Without sub-folders, with pickled weights, and with the old names of the attention's layers."""
    theirs = diffusers.UNet2DModel(**GOOGLE).eval()
    randomize(theirs)
    old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    weights = {
        ".".join(old.get(part, part) for part in name.replace("to_out.0", "proj_attn").split(".")): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert "mid_block.attentions.0.proj_attn.weight" in weights
    folder, run = tmp_path / "ddpm", tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **GOOGLE}))
    (folder / "scheduler_config.json").write_text(json.dumps(GOOGLE_SCHEDULER))
    th.save(weights, folder / "diffusion_pytorch_model.bin")
    done = call_script("convert_checkpoint.py", "--from_diffusers", folder, "--log_dir", run)
    assert done.returncode == 0, done.stderr
    flags = checkpoint.find(str(run)).state["arguments"]
    assert (flags["attention_resolutions"], flags["num_heads"], flags["ddpm_details"]) == ("8", 1, True)
    ours, _ = create_model_and_diffusion(**flags)
    ours.load_state_dict(checkpoint.find(str(run)).load("model"))
    assert_close(*outputs(ours.eval(), theirs, 16))

    done = call_script(
        *("image_train.py", "--data_dir", "builtin", "--log_dir", run),
        *("--total_steps", 1, "--batch_size", 2),
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.find(str(run)).step == 1
    assert read_json(run / "args.json")["ddpm_details"] is True


SCRIPT_MISTAKES = {
    "give either --to_diffusers or --from_diffusers": [],
    "--model_path is missing": ["--to_diffusers", "new"],
    "there is no such folder": ["--from_diffusers", "absent", "--log_dir", "new"],
    "config.json: there is no such file": ["--from_diffusers", "run", "--log_dir", "new"],
    "--to_diffusers .*run: exists and is not empty": ["--model_path", "run", "--to_diffusers", "run"],
    "--log_dir .*run: exists and is not empty": ["--from_diffusers", "good", "--log_dir", "run"],
    "--num_channels: is read from the model": ["--from_diffusers", "good", "--num_channels", "64"],
    "config.json: damaged": ["--from_diffusers", "bad config", "--log_dir", "new"],
    "diffusion_pytorch_model.safetensors: damaged": ["--from_diffusers", "bad weights", "--log_dir", "new"],
    "--num_heads_upsample 2: diffusers": ["--model_path", "upsample", "--to_diffusers", "new"],
}


@pytest.mark.parametrize("message", SCRIPT_MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, call_script, message):
    monkeypatch.chdir(tmp_path)
    for name, changes in (("run", {}), ("upsample", {"num_heads_upsample": 2})):
        (tmp_path / name).mkdir()
        save_run(tmp_path / name, **changes)
    model, _, flags = build()
    exported = export_model(model, flags)
    for name in ("good", "bad config", "bad weights"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "scheduler").mkdir()
        config, weights = json.dumps(exported.unet_config), safetensors.save(exported.weights)
        (tmp_path / name / "unet" / "config.json").write_text(config if name != "bad config" else config[:50])
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
            weights if name != "bad weights" else weights[:-50]
        )
        (tmp_path / name / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(exported.scheduler_config)
        )
    done = call_script("convert_checkpoint.py", *SCRIPT_MISTAKES[message])
    assert done.returncode == 2
    assert re.search(message, done.stderr) and done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_super_resolution_is_refused(tmp_path, call_script):
    (tmp_path / "run").mkdir()
    model, _ = sr_create_model_and_diffusion(**SUPER)
    state = {"arguments": {**sr_model_and_diffusion_defaults(), **SUPER}}
    checkpoint.save(str(tmp_path / "run"), 3, {"model": model.state_dict()}, state)
    done = call_script(
        "convert_checkpoint.py", "--model_path", tmp_path / "run", "--to_diffusers", tmp_path / "new"
    )
    assert done.returncode == 2
    assert "is a super-resolution model" in done.stderr
    assert not (tmp_path / "new").exists()
