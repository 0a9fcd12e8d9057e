"""The commands in the README of openai/improved-diffusion: the same words build the same models here."""

import importlib.util

import pytest
import torch as th
from conftest import SCRIPTS, TINY_FLAGS

from improved_diffusion.config import ModelAndDiffusion, SuperResModelAndDiffusion
from improved_diffusion.flags import declared
from improved_diffusion.gaussian_diffusion import LossType, ModelVarType
from improved_diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from improved_diffusion.run import checkpoint
from improved_diffusion.script_util import create_from_flags, is_super_resolution

IMAGENET_64 = "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True"
CIFAR_10 = "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3"
BEDROOMS = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16"
)
UNSCALED = "--rescale_learned_sigmas False --rescale_timesteps False"
VLB = "--schedule_sampler loss-second-moment"

# Model, diffusion and training flags of each command.
COMMANDS = {
    "baseline": (
        "--image_size 64 --num_channels 128 --num_res_blocks 3",
        "--diffusion_steps 4000 --noise_schedule linear",
        "--lr 1e-4 --batch_size 128",
    ),
    "imagenet64_hybrid": (
        IMAGENET_64,
        "--diffusion_steps 4000 --noise_schedule cosine",
        "--lr 1e-4 --batch_size 128",
    ),
    "cifar10_hybrid": (
        CIFAR_10,
        "--diffusion_steps 4000 --noise_schedule cosine",
        "--lr 1e-4 --batch_size 128",
    ),
    "imagenet64_classes": (
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True",
        f"--diffusion_steps 4000 --noise_schedule cosine {UNSCALED}",
        "--lr 3e-4 --batch_size 2048",
    ),
    "upsampler": (
        "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True",
        f"--diffusion_steps 4000 --noise_schedule linear {UNSCALED}",
        "--lr 3e-4 --batch_size 256",
    ),
    "bedrooms": (
        BEDROOMS,
        f"--diffusion_steps 1000 --noise_schedule linear {UNSCALED}",
        "--lr 1e-4 --batch_size 128",
    ),
    "bedrooms_slowly": (
        BEDROOMS,
        f"--diffusion_steps 1000 --noise_schedule linear {UNSCALED} --use_scale_shift_norm False",
        "--lr 2e-5 --batch_size 128",
    ),
    "imagenet64_vlb": (
        IMAGENET_64,
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        f"--lr 1e-4 --batch_size 128 {VLB}",
    ),
    "cifar10_vlb": (
        CIFAR_10,
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        f"--lr 1e-4 --batch_size 128 {VLB}",
    ),
}
# Millions of parameters, as the README or the name of the published checkpoint rounds them.
PUBLISHED = {
    "imagenet64_hybrid": 100,
    "cifar10_hybrid": 50,
    "imagenet64_classes": 270,
    "upsampler": 280,
    "bedrooms": 100,
    "imagenet64_vlb": 100,
    "cifar10_vlb": 50,
}
LEVELS = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}  # channel multipliers, by image size


def parse(script, *flags):
    """What the parser of a script makes of `flags`: all flags, and the names of those given."""
    spec = importlib.util.spec_from_file_location(script, SCRIPTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.create_parser().parse_flags(" ".join(flags).split())


def train_config(name):
    script = "super_res_train" if name == "upsampler" else "image_train"
    return parse(script, "--data_dir path/to/images", *COMMANDS[name])[0]


def build(config):
    with th.device("meta"):  # shapes only: these models would take a gigabyte each
        return create_from_flags(config)


def expected_parameters(config):
    """The number of parameters by the building rules of Nichol & Dhariwal 2021, appendix A, layer by layer."""
    size = config.output_size
    base, blocks, levels = config.num_channels, config.num_res_blocks, LEVELS[size]
    attended = {int(side) for side in config.attention_resolutions.split(",")}
    embedding = 4 * base

    def affine(inputs, outputs, kernel=1):
        return inputs * outputs * kernel + outputs

    def residual(inputs, outputs):
        total = 2 * inputs + affine(inputs, outputs, 9) + 2 * outputs + affine(outputs, outputs, 9)
        total += affine(embedding, outputs * (2 if config.use_scale_shift_norm else 1))
        return total + (affine(inputs, outputs) if inputs != outputs else 0)

    def attention(channels):
        return 2 * channels + affine(channels, 3 * channels) + affine(channels, channels)

    total = affine(base, embedding) + affine(embedding, embedding)
    total += 1000 * embedding if config.class_cond else 0
    total += affine(6 if is_super_resolution(config) else 3, base, 9)
    widths, stack = [mult * base for mult in levels], [base]
    channels = base
    for level, width in enumerate(widths):
        for _ in range(blocks):
            total += residual(channels, width)
            total += attention(width) if size >> level in attended else 0
            channels = width
            stack.append(width)
        if level < len(widths) - 1:
            total += affine(width, width, 9)
            stack.append(width)
    total += 2 * residual(channels, channels) + attention(channels)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks + 1):
            total += residual(channels + stack.pop(), width)
            total += attention(width) if size >> level in attended else 0
            channels = width
        total += affine(width, width, 9) if level else 0
    assert not stack
    return total + 2 * channels + affine(channels, 6 if config.learn_sigma else 3, 9)


@pytest.mark.parametrize("name", COMMANDS)
def test_training_commands_build_the_model(name):
    config = train_config(name)
    model, diffusion = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == expected_parameters(config)
    if name in PUBLISHED:
        assert abs(parameters / 1e6 - PUBLISHED[name]) < 0.25 * PUBLISHED[name]
    assert diffusion.num_timesteps == config.diffusion_steps and config.lr in (1e-4, 3e-4, 2e-5)
    assert diffusion.rescale_timesteps == ("--rescale_timesteps False" not in COMMANDS[name][1])
    learned = name != "baseline"
    assert diffusion.model_var_type is (ModelVarType.LEARNED_RANGE if learned else ModelVarType.FIXED_LARGE)
    if name.endswith("_vlb"):
        expected = LossType.RESCALED_KL
    else:
        expected = LossType.MSE if UNSCALED in COMMANDS[name][1] else LossType.RESCALED_MSE
    assert diffusion.loss_type is expected
    sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion)
    assert isinstance(sampler, LossSecondMomentResampler if name.endswith("_vlb") else UniformSampler)


def test_the_cifar_10_model_has_52_million_parameters():
    assert sum(p.numel() for p in build(train_config("cifar10_hybrid"))[0].parameters()) == 52_546_438


@pytest.mark.parametrize(
    "name, shapes",
    [
        (
            "cifar10_hybrid",
            {
                "time_embed.0.weight": [512, 128],
                "input_blocks.0.0.weight": [128, 3, 3, 3],
                "input_blocks.4.0.op.weight": [128, 128, 3, 3],
                "input_blocks.5.0.emb_layers.1.weight": [512, 512],
                "input_blocks.5.0.skip_connection.weight": [256, 128, 1, 1],
                "input_blocks.5.1.qkv.weight": [768, 256, 1],
                "middle_block.1.proj_out.weight": [256, 256, 1],
                "output_blocks.3.1.conv.weight": [256, 256, 3, 3],
                "output_blocks.15.0.out_layers.3.weight": [128, 128, 3, 3],
                "out.2.weight": [6, 128, 3, 3],
            },
        ),
        ("imagenet64_classes", {"label_emb.weight": [1000, 768], "input_blocks.9.1.norm.weight": [576]}),
        ("upsampler", {"input_blocks.0.0.weight": [192, 6, 3, 3], "label_emb.weight": [1000, 768]}),
        (
            "bedrooms",
            {
                "input_blocks.1.0.emb_layers.1.weight": [128, 512],
                "input_blocks.13.1.qkv.weight": [1536, 512, 1],
            },
        ),
    ],
)
def test_state_dicts_have_the_published_layout(name, shapes):
    state = build(train_config(name))[0].state_dict()
    assert {key: list(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_take_the_same_flags(name):
    upsampler = name == "upsampler"
    script = "super_res_sample" if upsampler else "image_sample"
    model, diffusion, _ = COMMANDS[name]
    extra = "--base_samples 64_samples.npz" if upsampler else ""
    config, given = parse(script, "--model_path /path/to/model.pt", model, diffusion, extra)
    flags, trained = config.to_dict(), train_config(name).to_dict()
    shared = [*declared(SuperResModelAndDiffusion if upsampler else ModelAndDiffusion)]
    assert {"num_channels", "noise_schedule", "diffusion_steps"} <= set(shared) & given
    assert {key: flags[key] for key in shared} == {key: trained[key] for key in shared}
    respaced, _ = parse(
        script, f"--timestep_respacing ddim250 --use_ddim True --num_samples 10000 --batch_size 64 {extra}"
    )
    assert respaced.timestep_respacing == "ddim250" and respaced.use_ddim is True
    if not upsampler:
        measured, _ = parse("image_nll", "--model_path m.pt --data_dir d --num_samples 9", model, diffusion)
        assert build(measured)[1].num_timesteps == trained["diffusion_steps"]


UPSTREAM_FLAGS = {
    "image_train": "data_dir schedule_sampler lr weight_decay lr_anneal_steps batch_size microbatch ema_rate "
    "log_interval save_interval resume_checkpoint use_fp16 fp16_scale_growth image_size",
    "super_res_train": "data_dir schedule_sampler lr weight_decay lr_anneal_steps batch_size microbatch "
    "ema_rate log_interval save_interval resume_checkpoint use_fp16 fp16_scale_growth large_size small_size",
    "image_sample": "clip_denoised num_samples batch_size use_ddim model_path image_size",
    "super_res_sample": "clip_denoised num_samples batch_size use_ddim base_samples model_path large_size "
    "small_size",
    "image_nll": "data_dir clip_denoised num_samples batch_size model_path image_size",
}
MODEL_AND_DIFFUSION = (
    "num_channels num_res_blocks num_heads num_heads_upsample attention_resolutions dropout learn_sigma "
    "sigma_small class_cond diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart "
    "rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm"
)


@pytest.mark.parametrize("script", UPSTREAM_FLAGS)
def test_no_upstream_flag_is_missing(script):
    required = {"super_res_sample": "--base_samples b", "image_nll": "--data_dir d"}
    config, _ = parse(script, required.get(script, ""))
    assert set(f"{UPSTREAM_FLAGS[script]} {MODEL_AND_DIFFUSION}".split()) <= config.to_dict().keys()


def test_sixteen_bits_are_bfloat16_and_said_to_be(tmp_path, call_script):
    flags = [*TINY_FLAGS, "--data_dir", "builtin", "--total_steps", "1", "--log_dir", tmp_path / "run"]
    done = call_script("image_train.py", *flags, "--use_fp16", "True", "--fp16_scale_growth", "1e-3")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "--use_fp16" in line]
    assert len(said) == 1 and "bfloat16" in said[0]
    assert checkpoint.find(str(tmp_path / "run")).state["precision"] == "bf16"
    done = call_script(
        "image_train.py", *flags[:-1], tmp_path / "no", "--use_fp16", "True", "--precision", "fp32"
    )
    assert done.returncode == 2 and "--use_fp16 True and --precision fp32 contradict" in done.stderr
    done = call_script("image_train.py", *flags[:-1], tmp_path / "other", "--fp16_scale_growth", "1e-3")
    assert done.returncode == 2 and "--fp16_scale_growth: belongs to --use_fp16 True" in done.stderr
    assert not (tmp_path / "other").exists()
