"""The compiled operations, against what they are defined by in float64, and the model with and without them."""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from ctypes import c_int64
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch as th
import torch.nn.functional as F
from conftest import environment_without_choice_of_kernels
from torch import nn

import improved_diffusion
from improved_diffusion import kernels
from improved_diffusion.cpu import muon
from improved_diffusion.kernels import attention, conv3x3, fused, pointwise, update
from improved_diffusion.kernels.norm import norm_act, suits
from improved_diffusion.nn import Conv2d, pointwise_channels_last
from improved_diffusion.shipped import why_not_compiled
from improved_diffusion.unet import AttentionBlock, ResBlock, UNetModel

PACKAGE = Path(improved_diffusion.__file__).parent
CLOSE = {th.float32: 5e-6, th.bfloat16: 8e-3}  # relative errors of whole tensors
WITHOUT_BF16 = ("avx2", "avx512", "neon")  # generations whose processors have no products of bfloat16 numbers


@pytest.fixture(params=kernels.GENERATIONS)
def generation(request):
    """Every generation of kernels that this processor can run, in turn; 0: none, where a test asks for that."""
    with kernels.switched(request.param):
        if (kernels.generation() or "0") != request.param:
            pytest.skip(f"no kernels for {request.param} here")
        yield request.param


@pytest.fixture(autouse=True)
def seeded():
    th.manual_seed(0)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def images(n, channels, height, width, dtype):
    x = 2 + th.randn(n, channels, height, width)
    return x.to(dtype).contiguous(memory_format=th.channels_last).requires_grad_()


def test_they_are_compiled_where_they_can_be():
    if why_not_compiled().startswith("there are none") or shutil.which("gcc") is None:
        pytest.skip("needs GCC, on Linux, on x86-64 or ARM64")
    script = "from improved_diffusion import kernels; print(kernels.generation())"
    environment = environment_without_choice_of_kernels()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in kernels.GENERATIONS


def can_run(generation):
    with kernels.switched(generation):
        return kernels.generation() == generation


def test_the_newest_is_used_and_no_newer_than_asked_for():
    usable = [name for name in kernels.GENERATIONS if can_run(name)]
    if not usable:
        pytest.skip("no kernels here")
    for i, name in enumerate(kernels.GENERATIONS):
        older = [
            g for g in kernels.GENERATIONS[: i + 1] if g in usable and (g == name or g != kernels.EMULATED)
        ]
        with kernels.switched(name):
            assert kernels.generation() == (older[-1] if older else None)
    script = "from improved_diffusion import kernels; print(kernels.generation())"
    environment = environment_without_choice_of_kernels()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == [name for name in usable if name != kernels.EMULATED][-1]


@pytest.mark.parametrize("setting", ["0", "none", ""])
def test_do_without(setting):
    with kernels.switched(setting):
        assert kernels.generation() is None and kernels.SWITCH in kernels.why_none()
        x = images(1, 32, 4, 4, th.float32)
        assert not suits(x, nn.GroupNorm(32, 32)) and not update.suits([x])
        assert not attention.suits(th.zeros(1, 16, 48), 1)
        assert not conv3x3.suits(images(1, 32, 8, 8, th.float32), th.zeros(32, 32, 3, 3), th.zeros(32))


@pytest.mark.parametrize("change", ["another source", "not a library"])
def test_a_library_that_does_not_belong_to_the_sources_is_left_alone(tmp_path, change):
    shutil.copytree(PACKAGE, tmp_path / "improved_diffusion")
    folder = tmp_path / "improved_diffusion" / "kernels"
    if change == "another source":
        with open(folder / "update.h", "a", encoding="utf-8") as file:
            file.write("// changed\n")
    else:
        for path in folder.glob("compiled*"):
            path.write_bytes(b"not a library")
    script = "from improved_diffusion import kernels as k; print(k.__file__, k.generation(), k.why_none())"
    environment = environment_without_choice_of_kernels()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    says = "they belong to other code or another system: repeat the installation"
    assert done.stdout.strip() == f"{folder / '__init__.py'} None {says}"


def test_a_library_of_older_code_does_not_hide_the_new_one(tmp_path):
    if kernels.generation() is None:
        pytest.skip("no kernels here")
    shutil.copytree(PACKAGE, tmp_path / "improved_diffusion")
    folder = tmp_path / "improved_diffusion" / "kernels"
    (folder / f"compiled{EXTENSION_SUFFIXES[0]}").write_bytes(b"the first that is looked for")
    script = "from improved_diffusion import kernels; print(kernels.__file__, kernels.generation())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(folder / "__init__.py"), kernels.generation()]


ALL_KERNELS = """
import sys
import torch as th
from torch import nn
from improved_diffusion import kernels
from improved_diffusion.cpu import muon
from improved_diffusion.kernels import attention, conv3x3, pointwise, update
from improved_diffusion.kernels.norm import norm_act, suits
from improved_diffusion.unet import AttentionBlock, ResBlock

assert kernels.__file__.startswith(sys.argv[1])
th.set_num_threads(2)
nan = float("nan")


def call_all():
    for dtype in (th.float32, th.bfloat16):
        for n, channels, side, groups, modulated in [(1, 32, 1, 32, True), (3, 96, 3, 4, False), (2, 64, 4, 1, True)]:
            x = th.randn(n, channels, side, side).to(dtype).contiguous(memory_format=th.channels_last)
            norm = nn.GroupNorm(groups, channels).to(dtype)
            modulation = th.randn(n, 2 * channels).to(dtype).requires_grad_() if modulated else None
            assert suits(x, norm, modulation)
            for value in (0.0, nan):
                x = x.detach().clone()
                x[0, 0, 0, 0] = value
                y, same = norm_act(norm, x.requires_grad_(), modulation, activate=modulated)
                leaves = [x, norm.weight, norm.bias, *([modulation] if modulated else [])]
                th.autograd.grad((y + same).sum(), leaves)
        for n, positions, heads, width in [(1, 16, 1, 16), (2, 48, 2, 32), (1, 64, 1, 32)]:
            qkv = th.randn(n, positions, 3 * heads * width).to(dtype).requires_grad_()
            if attention.suits(qkv, heads):
                for value in (0.0, nan):
                    qkv.detach()[0, 0, 0] = value
                    th.autograd.grad(attention.attention(qkv, heads).sum(), qkv)
        for n, channels, out, height, width in [(1, 32, 64, 8, 8), (3, 96, 32, 8, 12)]:
            x = th.randn(n, channels, height, width).to(dtype).contiguous(memory_format=th.channels_last)
            weight, bias = th.randn(out, channels, 3, 3).to(dtype), th.randn(out).to(dtype)
            if conv3x3.suits(x, weight, bias):
                for value in (0.0, nan):
                    x[0, 0, 0, 0] = value
                    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
                    th.autograd.grad(conv3x3.conv3x3(*leaves).sum(), leaves)
                    leaves[1] = weight[:, :, 0, 0].clone().requires_grad_()
                    th.autograd.grad(pointwise.pointwise(*leaves).sum(), leaves)
        for n, channels, out in [(1, 64, 64), (3, 32, 96)]:
            x = th.randn(n, channels, 8, 8).to(dtype).contiguous(memory_format=th.channels_last)
            residual = ResBlock(channels, 8, 0.0, out_channels=out, use_scale_shift_norm=True).to(dtype)
            residual(x.requires_grad_(), th.randn(n, 8).to(dtype)).sum().backward()
            AttentionBlock(channels, num_heads=2).to(dtype)(x).sum().backward()
        params = [th.randn(shape) for shape in [(1,), (17, 5), (40, 33, 1, 1), (5000,)]]
        params[1][0, 0] = nan
        gradient = [th.randn_like(p).to(dtype) for p in params]
        moments, average = [[th.zeros_like(p) for p in params] for _ in range(2)], [p.clone() for p in params]
        copies = [p.bfloat16() for p in params]
        settings = update.AdamWSettings(1e-3, (0.9, 0.999), 1e-8, 0.1, 1.0)
        assert update.adamw(
            params, gradient, moments, th.ones(len(params)), settings, [(average, 0.9)] * 2, copies, params
        )
        update.norm(gradient, params)
        for p, g, momentum, mean, copy in zip(params, gradient, moments[0], average, copies):
            assert update.muon(p, g, momentum, muon.settings(p.shape, 0.1, 0.1, 1.0), [(mean, 0.9)], copy, p)


for generation in sys.argv[2:]:
    with kernels.switched(generation):
        assert kernels.generation() == generation
        call_all()
    print(generation)
"""


def test_under_sanitizers(tmp_path):
    """Compiled with AddressSanitizer and UBSan, every kernel touches only what it is given, NaNs included."""
    if shutil.which("gcc") is None or kernels.generation() is None:
        pytest.skip("needs GCC, on Linux and x86-64")
    command = ["gcc", "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this GCC comes without AddressSanitizer")
    shutil.copytree(PACKAGE, tmp_path / "improved_diffusion", ignore=shutil.ignore_patterns("compiled*"))
    folder = tmp_path / "improved_diffusion" / "kernels"
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h"))
    checksum = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    # Without optimisation, GCC is done in a quarter of the time. x86-64 has no need of alignment.
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]
    command = ["gcc", "-O0", "-g", "-std=gnu11", "-fopenmp", "-Wno-psabi", "-shared", "-fPIC", *sanitizers]
    command += [f'-DSOURCES="{checksum}"', str(folder / "kernels.c"), "-lm"]
    subprocess.run([*command, "-o", str(folder / f"compiled{EXTENSION_SUFFIXES[0]}")], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep what they have until they end
    }
    generations = list(filter(can_run, kernels.GENERATIONS))
    done = subprocess.run(
        [sys.executable, "-c", ALL_KERNELS, str(tmp_path), *generations],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.split() == generations, done.stderr[-3000:]


# -- normalisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups", "threads"),
    [
        ((8, 64, 8, 8), 32, 2),
        ((3, 96, 5, 7), 32, 2),
        ((1, 192, 4, 4), 32, 3),
        ((2, 32, 1, 1), 4, 1),
        ((2, 128, 3, 1), 1, 8),
    ],
)
def test_norm_act(generation, dtype, activate, modulated, shape, groups, threads):
    n, channels = shape[:2]
    norm = nn.GroupNorm(groups, channels)
    with th.no_grad():
        norm.weight.normal_(1, 0.2)
        norm.bias.normal_()
    norm.to(dtype)
    x = images(*shape, dtype)
    modulation = (0.3 * th.randn(n, 2 * channels)).to(dtype).requires_grad_() if modulated else None
    dy, more = th.randn(shape).to(dtype), th.randn(shape).to(dtype)
    leaves = [x, norm.weight, norm.bias, *([modulation] if modulated else [])]

    assert suits(x, norm)
    before = th.get_num_threads()
    th.set_num_threads(threads)
    try:
        y, same = norm_act(norm, x, modulation, activate)
        found = th.autograd.grad([y, same], leaves, [dy, more])
    finally:
        th.set_num_threads(before)
    assert y.dtype == dtype and y.is_contiguous(memory_format=th.channels_last)
    assert th.equal(same, x)

    exact = [leaf.detach().double().contiguous().requires_grad_() for leaf in leaves]
    z = F.group_norm(exact[0], groups, *exact[1:3], norm.eps)
    if modulated:
        scale, shift = exact[3][..., None, None].chunk(2, dim=1)
        z = z * (1 + scale) + shift
    z = F.silu(z) if activate else z
    expected = th.autograd.grad([z, exact[0] * 1], exact, [dy.double(), more.double()])
    assert error(y, z) < CLOSE[dtype]
    for value, reference in zip(found, expected):
        assert value.dtype == dtype and value.shape == reference.shape
        assert error(value, reference) < 2 * CLOSE[dtype]


def test_a_mean_far_from_zero_does_not_drown_the_variance(generation):
    norm = nn.GroupNorm(32, 64)
    x = (1000 + th.randn(2, 64, 16, 16)).contiguous(memory_format=th.channels_last)
    expected = F.group_norm(x.double().contiguous(), 32)
    assert error(norm_act(norm, x, activate=False)[0].detach(), expected) < 1e-3


def test_only_one_of_the_results_is_used(generation):
    norm = nn.GroupNorm(32, 32)
    x = images(2, 32, 2, 2, th.float32)
    y, same = norm_act(norm, x)
    (gradient,) = th.autograd.grad(same.sum(), x, retain_graph=True)
    assert th.equal(gradient, th.ones_like(x))
    assert th.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_what_is_not_a_number_stays_so(generation):
    for dtype in CLOSE:
        x = images(1, 32, 4, 4, dtype).detach()
        x[0, 5, 1, 1] = float("nan")
        assert norm_act(nn.GroupNorm(32, 32).to(dtype), x)[0].isnan().any()


def test_the_number_of_threads_changes_no_bit(generation):
    norm = nn.GroupNorm(32, 64)
    results = []
    before = th.get_num_threads()
    for threads in (1, 2, 5):
        th.manual_seed(0)
        th.set_num_threads(threads)
        x = images(3, 64, 8, 8, th.float32)
        y, _ = norm_act(norm, x)
        results.append([y, *th.autograd.grad((y**3).sum(), [x, norm.weight, norm.bias])])
    th.set_num_threads(before)
    for others in results[1:]:
        assert all(th.equal(a, b) for a, b in zip(results[0], others))


def test_what_does_not_suit_is_left_to_pytorch():
    norm = nn.GroupNorm(32, 64)
    assert not suits(th.zeros(2, 64, 4, 4), norm)  # another layout
    assert not suits(images(2, 64, 4, 4, th.bfloat16), norm)  # another type
    assert not suits(images(2, 48, 4, 4, th.float32), nn.GroupNorm(4, 48))
    assert not suits(th.zeros(2, 64, 16), norm)
    assert not suits(th.zeros(0, 64, 4, 4).contiguous(memory_format=th.channels_last), norm)
    assert not suits(images(2, 64, 4, 4, th.float64), norm.double())


def test_modulation_of_another_type_or_size_is_left_to_pytorch(generation):
    norm = nn.GroupNorm(32, 64)
    x = images(2, 64, 4, 4, th.float32).detach()
    for modulation in (th.randn(2, 128).double(), th.randn(2, 128).bfloat16(), th.randn(1, 128)):
        assert not suits(x, norm, modulation)
        with pytest.raises(TypeError, match="a kernel needs torch.float32"):
            norm_act(norm, x, modulation)
    modulation = th.randn(128, 2).T
    assert suits(x, norm, modulation)
    assert th.equal(norm_act(norm, x, modulation)[0], norm_act(norm, x, modulation.contiguous())[0])


def test_weights_of_another_type_or_size_are_left_to_pytorch(generation):
    x = images(2, 64, 4, 4, th.float32).detach()
    assert not suits(x, nn.GroupNorm(32, 64, affine=False)) and not suits(x, nn.GroupNorm(32, 96))
    norm = nn.GroupNorm(32, 64)
    norm.bias = nn.Parameter(norm.bias.detach().double())
    assert not suits(x, norm)


@pytest.mark.parametrize("default", [th.float64, th.bfloat16])
def test_the_default_type_does_not_matter(generation, default):
    def results():
        norm = nn.GroupNorm(32, 64, dtype=th.float32)
        x = images(2, 64, 4, 4, th.float32)
        qkv = th.randn(2, 64, 96, dtype=th.float32, requires_grad=True)
        y, out = norm_act(norm, x)[0], attention.attention(qkv, 2)
        return [y, out, *th.autograd.grad([(y**3).sum(), (out**3).sum()], [x, norm.weight, qkv])]

    expected = results()
    before = th.get_default_dtype()
    x, qkv = images(2, 64, 4, 4, th.float32), th.randn(2, 64, 96, dtype=th.float32)
    th.manual_seed(0)
    th.set_default_dtype(default)
    try:
        assert norm_act(nn.GroupNorm(32, 64, dtype=th.float32), x)[0].dtype == th.float32
        room = attention._room(th.float32, 64, 16, 1)
        assert room.dtype == th.float32
        found = attention.attention(qkv, 2)
    finally:
        th.set_default_dtype(before)
    assert th.equal(found, attention.attention(qkv, 2))
    assert all(value.isfinite().all() for value in expected)


# -- attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("n", "positions", "heads", "width", "threads"),
    [
        (4, 64, 4, 32, 2),
        (1, 96, 2, 96, 2),
        (1, 256, 1, 64, 3),
        (3, 16, 2, 16, 2),
        (2, 48, 3, 48, 1),
        (2, 80, 1, 128, 2),
    ],
)
def test_attention(generation, dtype, n, positions, heads, width, threads):
    qkv = (1.5 * th.randn(n, positions, heads * 3 * width)).to(dtype).requires_grad_()
    dout = th.randn(n, positions, heads * width).to(dtype)
    if not attention.suits(qkv, heads):
        assert dtype == th.bfloat16 and generation in WITHOUT_BF16
        return
    before = th.get_num_threads()
    th.set_num_threads(threads)
    try:
        out = attention.attention(qkv, heads)
        (gradient,) = th.autograd.grad(out, qkv, dout)
    finally:
        th.set_num_threads(before)

    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact.view(n, positions, heads, 3, width).permute(3, 0, 2, 1, 4)
    weights = (q @ k.transpose(-1, -2) / width**0.5).softmax(dim=-1)
    expected = (weights @ v).permute(0, 2, 1, 3).reshape(n, positions, -1)
    (reference,) = th.autograd.grad(expected, exact, dout.double())
    assert out.dtype == dtype and error(out, expected) < CLOSE[dtype]
    assert error(gradient, reference) < 2 * CLOSE[dtype]


@pytest.mark.parametrize("generation", [kernels.EMULATED], indirect=True)
@pytest.mark.parametrize(
    ("positions", "width", "by_tiles"), [(64, 32, True), (96, 64, True), (48, 32, False)]
)
def test_attention_by_tiles(generation, positions, width, by_tiles):
    """Every product of matrices is made of products of tiles, 16 x 32 by 32 x 16, if the sizes fit two tiles."""
    products = kernels.function("tile_products", (), result=c_int64)
    qkv = th.randn(2, positions, 3 * width).bfloat16().requires_grad_()
    before = th.get_num_threads()
    th.set_num_threads(1)  # each thread counts its own
    try:
        counts = [products()]
        out = attention.attention(qkv, 1)
        counts.append(products())
        th.autograd.grad(out.sum(), qkv)
        counts.append(products())
    finally:
        th.set_num_threads(before)
    each = 2 * (positions // 16) ** 2 * (width // 32) * by_tiles  # scores of both images
    values = 2 * (positions // 16) * (positions // 32) * (width // 16) * by_tiles
    assert counts[1] - counts[0] == each + values
    assert counts[2] - counts[1] == 2 * each + 3 * values


def test_the_permission_to_use_tiles_is_asked_for_first():
    """Where there are no tiles, or the system refuses them, the question ends well, and older kernels are used."""
    if not can_run(kernels.EMULATED):
        pytest.skip("no kernels with bfloat16 here")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    with kernels.switched("amx"):
        works = "amx_bf16" in flags and kernels.generation() == "amx"
        assert kernels._library()[0].tiles_work() == works
        assert works or kernels.generation() in ("avx512bf16", "avx512fp16")


def test_scores_that_differ_widely(generation):
    qkv = th.randn(1, 32, 48)
    qkv[..., :32] *= 100
    q, k, v = qkv.double().split(16, dim=2)
    expected = (q @ k.transpose(1, 2) / 4).softmax(dim=-1) @ v
    assert error(attention.attention(qkv, 1), expected) < 1e-4


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("width", [16, 32, 1024])
def test_attention_to_larger_or_smaller_numbers_is_as_exact(generation, dtype, width):
    """Powers of two change no digit: not those of values, and not those of gradients."""
    qkv = th.full((2, 48, 3 * width), 1.99)  # the largest sums that there can be
    qkv[1] = th.randn(48, 3 * width)
    qkv, dout = qkv.to(dtype), th.full((2, 48, width), -1.99).to(dtype)
    if not attention.suits(qkv, 1):
        assert dtype == th.bfloat16 and generation in WITHOUT_BF16
        return
    results = []
    for of_v, of_dout in ((1, 1), (2.0**-20, 2.0**-20), (2.0**16, 2.0**-30), (2.0**-16, 2.0**30)):
        scaled = qkv.clone()
        scaled[..., 2 * width :] *= of_v
        out = attention.attention(scaled.requires_grad_(), 1)
        (gradient,) = th.autograd.grad(out, scaled, dout * of_dout)
        gradient[..., : 2 * width] /= of_v
        results.append((out.detach() / of_v, gradient / of_dout))
    assert all(value.isfinite().all() for value in results[0])
    assert all(th.equal(value, first) for result in results[1:] for value, first in zip(result, results[0]))


@pytest.mark.parametrize("shape", [(1, 15, 48), (1, 16, 36), (1, 2048, 48), (1, 0, 48)])
def test_attention_leaves_other_sizes_to_pytorch(shape):
    assert not attention.suits(th.zeros(shape), 1)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("part", "rows"), [(0, [5]), (1, range(32)), (2, range(32))])
def test_attention_keeps_what_is_not_a_number(generation, dtype, part, rows):
    """A NaN in a query is in that position's result, one in a key or value in the results of all positions."""
    qkv = th.randn(1, 32, 96).to(dtype)
    qkv[0, 5, 32 * part + 3] = float("nan")
    qkv.requires_grad_()
    if not attention.suits(qkv, 1):
        assert dtype == th.bfloat16 and generation in WITHOUT_BF16
        return
    out = attention.attention(qkv, 1)
    assert out[0, list(rows)].isnan().any(dim=1).all()
    (gradient,) = th.autograd.grad(out.sum(), qkv)
    assert gradient.isnan().any()


# -- convolutions ------------------------------------------------------------------------------------------


def some(n, channels, out, height, width, dtype=th.float32):
    """Images that are not centred, weights and biases."""
    x = (1 + th.randn(n, channels, height, width)).to(dtype).contiguous(memory_format=th.channels_last)
    weight = (th.randn(out, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    return x, weight.contiguous(memory_format=th.channels_last), th.randn(out).to(dtype)


def some_that_suit(generation, *sizes_and_type):
    tensors = some(*sizes_and_type)
    skip_unless_they_suit(conv3x3, generation, *tensors)
    return tensors


def skip_unless_they_suit(operation, generation, *tensors):
    if not operation.suits(*tensors):
        assert tensors[0].dtype == th.bfloat16 and generation == "neonbf16"
        pytest.skip("products of matrices in bfloat16 are faster")


def with_gradients(forward, tensors, dy):
    leaves = [t.detach().clone(memory_format=th.preserve_format).requires_grad_() for t in tensors]
    y = forward(*leaves)
    return [y, *th.autograd.grad(y, leaves, dy.to(y.dtype))]


def definition(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("n", "channels", "out", "height", "width", "threads"),
    [(1, 32, 32, 8, 8, 1), (3, 64, 96, 12, 8, 2), (2, 128, 64, 32, 32, 1), (5, 96, 160, 16, 4, 3)],
)
def test_convolution(generation, dtype, n, channels, out, height, width, threads):
    tensors = some_that_suit(generation, n, channels, out, height, width, dtype)
    th.set_num_threads(threads)
    dy = th.randn(n, out, height, width).to(dtype)
    found = with_gradients(conv3x3.conv3x3, tensors, dy)
    expected = with_gradients(definition, [t.double() for t in tensors], dy.double())
    for mine, exact in zip(found, expected):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= CLOSE[dtype] * exact.norm()
    # No single number is far off either.
    assert (found[0].double() - expected[0]).abs().max() <= 3 * CLOSE[dtype] * expected[0].abs().max()


@pytest.mark.parametrize("generation", [kernels.EMULATED], indirect=True)
@pytest.mark.parametrize(
    ("n", "height", "width", "threads"), [(1, 1, 1, 1), (2, 5, 7, 2), (50, 4, 4, 3), (2, 24, 23, 2)]
)
def test_convolutions_by_tiles_of_any_size(generation, n, height, width, threads):
    """Also of many small images together, and of numbers of positions that fill no whole tiles."""
    x, weight, bias = some(n, 64, 32, height, width, th.bfloat16)
    dy = th.randn(n, 32, height, width).bfloat16()
    th.set_num_threads(threads)
    for operation, expected, factors in (
        (conv3x3, definition, weight),
        (pointwise, lambda x, w, b: F.conv2d(x, w[:, :, None, None], b), weight[:, :, 1, 1].contiguous()),
    ):
        tensors = (x, factors, bias)
        assert operation.suits(*tensors)
        found = with_gradients(vars(operation)[operation.__name__.rpartition(".")[2]], tensors, dy)
        exact = with_gradients(expected, [t.double() for t in tensors], dy.double())
        assert all(error(mine, other) < CLOSE[th.bfloat16] for mine, other in zip(found, exact))


@pytest.mark.parametrize("generation", [kernels.EMULATED], indirect=True)
def test_products_of_a_convolution_by_tiles(generation):
    """Each tap of the kernel takes the products of all tiles of 16 positions, 32 channels and 16 outputs."""
    products = kernels.function("tile_products", (), result=c_int64)
    th.set_num_threads(1)  # each thread counts its own
    x, weight, bias = (t.requires_grad_() for t in some(2, 64, 32, 31, 31, th.bfloat16))
    counts = [products()]
    y = conv3x3.conv3x3(x, weight, bias)
    counts.append(products())
    th.autograd.grad(y.sum(), (x, weight))
    counts.append(products())
    # 31 rows of 31 positions and one of zeros, and in the gradient of the weights one more row of zeros, which fill
    # whole tiles of 32 positions.
    of_image = 9 * (64 // 32) * (32 // 16)
    assert counts[1] - counts[0] == 2 * of_image * (31 * 32 // 16)
    assert counts[2] - counts[1] == 2 * of_image * (31 * 32 // 16 + 32 * 32 // 16)


def test_only_some_gradients_of_a_convolution_are_wanted(generation):
    x, weight, bias = some(2, 32, 64, 8, 8)
    dy = th.randn(2, 64, 8, 8)
    every = with_gradients(conv3x3.conv3x3, (x, weight, bias), dy)[1:]
    for wanted in ([0], [1], [2], [1, 2]):
        leaves = [t.clone(memory_format=th.preserve_format) for t in (x, weight, bias)]
        for i in wanted:
            leaves[i].requires_grad_()
        found = th.autograd.grad(conv3x3.conv3x3(*leaves), [leaves[i] for i in wanted], dy)
        assert all(th.equal(gradient, every[i]) for gradient, i in zip(found, wanted))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_an_image_is_convolved_alike_in_any_batch_on_any_number_of_threads(generation, dtype):
    x, weight, bias = some_that_suit(generation, 21, 64, 32, 16, 12, dtype)
    x[::4] *= 1e6  # its neighbours must not matter, however large they are
    th.set_num_threads(1)
    whole = conv3x3.conv3x3(x, weight, bias)
    gradients = with_gradients(conv3x3.conv3x3, (x, weight, bias), whole)
    th.set_num_threads(3)
    again = with_gradients(conv3x3.conv3x3, (x, weight, bias), whole)
    assert all(th.equal(one, other) for one, other in zip(gradients, again))
    for part in (slice(0, 1), slice(4, 9), slice(7, 21)):
        assert th.equal(conv3x3.conv3x3(x[part], weight, bias), whole[part])


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_convolution_of_larger_or_smaller_numbers_is_as_exact(generation, dtype):
    """Powers of two change no digit: not of the result, and not of the gradients."""
    x, weight, _ = some_that_suit(generation, 3, 64, 96, 12, 8, dtype)
    assert_scale_does_not_matter(conv3x3.conv3x3, x, weight, th.randn(3, 96, 12, 8).to(dtype))


def assert_scale_does_not_matter(convolve, x, weight, dy):
    none = weight.new_zeros(len(weight))
    y, dx, dweight, _ = with_gradients(convolve, (x, weight, none), dy)
    for of_x, of_weight, of_dy in ((2.0**-30, 1, 2.0**20), (2.0**20, 2.0**-20, 2.0**-30), (1, 2.0**12, 1)):
        found = with_gradients(convolve, (x * of_x, weight * of_weight, none), dy * of_dy)
        assert th.equal(found[0], y * of_x * of_weight)
        assert th.equal(found[1], dx * of_dy * of_weight) and th.equal(found[2], dweight * of_dy * of_x)


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_the_largest_sums_of_a_convolution_stay_finite(generation, dtype):
    """All products of one of the 36 points have the same sign, and the largest size, in all channels."""
    x, weight, bias = some_that_suit(generation, 1, 512, 32, 16, 16, dtype)
    sign = th.tensor([-1.0, -1, 1, 1])
    x.zero_()[:, :, :4, :4] = 1.99 * sign[:, None] * sign
    weight[:] = 1.99
    y, exact = conv3x3.conv3x3(x, weight, bias), definition(x.double(), weight.double(), bias.double())
    error = (y.double() - exact).norm()
    assert error <= 0.1 * exact.norm()  # equal numbers have equal rounding errors, which add up


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_convolution_keeps_what_is_not_finite(generation, value, dtype):
    x, weight, bias = some_that_suit(generation, 2, 32, 32, 8, 8, dtype)
    x[1, 5, 4, 4] = value
    y = conv3x3.conv3x3(x, weight, bias)
    assert not y[1, :, 3:6, 3:6].isfinite().any()  # all that it reaches
    assert y[0].isfinite().all()


def test_a_convolution_by_weights_in_the_usual_layout(generation):
    x, weight, bias = some(2, 64, 32, 8, 8)
    usual = weight.contiguous()
    assert usual.stride() != weight.stride()
    assert th.equal(conv3x3.conv3x3(x, usual, bias), conv3x3.conv3x3(x, weight, bias))


@pytest.mark.parametrize(
    "change",
    [
        {"height": 6},  # not a multiple of 4
        {"height": 4},  # too few pixels
        {"channels": 512, "out": 160},  # too many channels for them
        {"channels": 48},
        {"out": 3},
        {"n": 0},
        {"dtype": th.float64},
        {"dtype": th.float16},
    ],
)
def test_convolutions_of_other_sizes_are_left_to_pytorch(generation, change):
    shape = {"n": 1, "channels": 32, "out": 32, "height": 8, "width": 8}
    assert conv3x3.suits(*some(**shape))
    assert not conv3x3.suits(*some(**{**shape, **change}))


def test_the_smallest_images_are_convolved_in_bfloat16_only(generation):
    for dtype, threads in itertools.product(CLOSE, (1, 2)):
        tensors = some(5, 64, 32, 4, 4, dtype)
        assert conv3x3.suits(*tensors) == (dtype == th.bfloat16 and kernels.multiplies(dtype))
        if conv3x3.suits(*tensors):
            th.set_num_threads(threads)
            dy = th.randn(5, 32, 4, 4).to(dtype)
            found = with_gradients(conv3x3.conv3x3, tensors, dy)
            expected = with_gradients(definition, [t.double() for t in tensors], dy.double())
            assert all(error(mine, exact) < CLOSE[dtype] for mine, exact in zip(found, expected))


def test_convolutions_of_other_layouts_and_types_are_left_to_pytorch(generation):
    x, weight, bias = some(1, 32, 32, 8, 8)
    assert not conv3x3.suits(x.contiguous(), weight, bias)
    assert not conv3x3.suits(x, weight, None)
    assert not conv3x3.suits(x, weight.double(), bias) and not conv3x3.suits(x, weight, bias.double())
    assert not conv3x3.suits(x, weight[:, :, :1, :1], bias) and not conv3x3.suits(x[:, :, 0], weight, bias)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}]
)
def test_a_convolution_of_any_kind_is_what_pytorch_computes(generation, options):
    options = {"padding": 1, **options}
    layer, theirs = Conv2d(32, 64, 3, **options), th.nn.Conv2d(32, 64, 3, **options)
    theirs.load_state_dict(layer.state_dict())
    x = some(2, 32, 32, 8, 8)[0]
    assert th.allclose(layer(x), theirs(x), atol=1e-5)


def test_only_convolutions_that_suit_reach_the_kernel(generation, monkeypatch):
    asked = []
    monkeypatch.setattr(conv3x3, "conv3x3", lambda *tensors: asked.append(tensors) or definition(*tensors))
    x = some(1, 32, 32, 8, 8)[0]
    Conv2d(32, 32, 3, padding=1)(x)
    assert len(asked) == 1
    for options in ({}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}):
        Conv2d(32, 32, 3, **options)(x)
    Conv2d(32, 32, 1)(x)
    assert len(asked) == 1


def test_second_gradients_of_a_convolution_are_refused(generation):
    leaves = [t.requires_grad_() for t in some(1, 32, 32, 8, 8)]
    gradient = th.autograd.grad(conv3x3.conv3x3(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# -- whole blocks --------------------------------------------------------------------------------------------


def with_random_weights(block, dtype):
    """`block` without weights of zero, which would hide errors."""
    for p in block.parameters():
        p.data.add_(0.05 * th.randn_like(p))
    return block.to(dtype).to(memory_format=th.channels_last)


def some_images(n, channels, height, width, dtype):
    x = th.randn(n, channels, height, width).to(dtype).contiguous(memory_format=th.channels_last)
    return x.requires_grad_()


def forbid(monkeypatch):
    for name in ("suits_residual", "suits_attention"):
        monkeypatch.setattr(fused, name, lambda *layers: False)


def counted(monkeypatch, name):
    """The calls of a function in `fused`, as a list that grows."""
    calls, function = [], getattr(fused, name)
    monkeypatch.setattr(fused, name, lambda *given: calls.append(name) or function(*given))
    return calls


def result_and_gradients(block, *inputs):
    y = block(*inputs)
    weights = [p for p in block.parameters() if p.requires_grad]
    return [y, *th.autograd.grad((y * th.arange(y.numel()).view_as(y).cos()).sum(), [*inputs, *weights])]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("out", [64, 96])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_residual_block(generation, monkeypatch, dtype, out, use_checkpoint):
    block = ResBlock(64, 40, 0.0, out_channels=out, use_scale_shift_norm=True, use_checkpoint=use_checkpoint)
    with_random_weights(block, dtype)
    inputs = some_images(3, 64, 8, 12, dtype), th.randn(3, 40).to(dtype).requires_grad_()
    calls = counted(monkeypatch, "residual")
    found = result_and_gradients(block, *inputs)
    assert len(calls) == (1 + use_checkpoint if kernels.multiplies(dtype) else 0)
    forbid(monkeypatch)
    expected = result_and_gradients(block, *inputs)
    assert len(found) == (13 if out == 64 else 15)
    assert all(th.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_block_of_attention(generation, monkeypatch, dtype):
    block = with_random_weights(AttentionBlock(64, num_heads=2), dtype)
    x = some_images(3, 64, 4, 8, dtype)
    calls = counted(monkeypatch, "attention_block")
    found = result_and_gradients(block, x)
    assert len(calls) == (kernels.multiplies(dtype) and kernels.has("attention_forward", dtype))
    forbid(monkeypatch)
    assert all(th.equal(one, other) for one, other in zip(found, result_and_gradients(block, x)))


@pytest.mark.parametrize(
    "change",
    [
        {"use_scale_shift_norm": False},
        {"dropout": 0.1},
        {"use_conv": True, "out_channels": 96},
    ],
)
def test_other_residual_blocks_are_computed_step_by_step(monkeypatch, change):
    usual = {"channels": 64, "emb_channels": 40, "dropout": 0.0, "use_scale_shift_norm": True}
    calls = counted(monkeypatch, "residual")
    for options, count in ((usual, kernels.generation() is not None), ({**usual, **change}, 0)):
        calls.clear()
        block = ResBlock(**options).to(memory_format=th.channels_last)
        block(some_images(2, 64, 8, 8, th.float32), th.randn(2, 40))
        assert len(calls) == count
    if "dropout" in change:  # which does nothing in evaluation
        block.eval()(some_images(2, 64, 8, 8, th.float32), th.randn(2, 40))
        assert len(calls) == (kernels.generation() is not None)


def test_other_images_are_computed_step_by_step(generation, monkeypatch):
    """Contiguous ones, and sizes that are no multiple of 4."""
    calls = counted(monkeypatch, "residual")
    block = ResBlock(64, 40, 0.0, use_scale_shift_norm=True).to(memory_format=th.channels_last)
    for x in (some_images(2, 64, 8, 8, th.float32).contiguous(), some_images(2, 64, 6, 8, th.float32)):
        block(x, th.randn(2, 40))
    assert not calls


def test_second_gradients_of_a_block_are_refused(generation):
    block = with_random_weights(ResBlock(32, 40, 0.0, use_scale_shift_norm=True), th.float32)
    x = some_images(2, 32, 8, 8, th.float32)
    (gradient,) = th.autograd.grad(block(x, th.randn(2, 40)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


# -- the update ----------------------------------------------------------------------------------------------

SHAPES = [(3,), (64, 32, 3, 3), (17, 5), (1,), (40, 33, 1, 1), (5000,)]


def tensors(dtype=th.float32, shapes=SHAPES):
    made = [th.randn(shape).to(dtype) for shape in shapes]
    return [t.contiguous(memory_format=th.channels_last) if t.dim() == 4 else t for t in made]


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_norm_of_a_gradient(generation, dtype):
    values = [*tensors(dtype), th.ones(1).to(dtype).expand(7), th.randn(6, 4).to(dtype)[:, ::2]]
    expected = sum((v.double() ** 2).sum() for v in values) ** 0.5
    assert update.norm(values) == pytest.approx(expected.item(), rel=1e-6)


def test_not_a_number_stays_so_in_16_bits(generation):
    """Of every NaN, also of those that rounding would carry over to zero."""
    bits = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7FFF8000, -0x8000, 0x7F80FFFF]
    nans = th.tensor(bits, dtype=th.int32).view(th.float32).repeat(5)  # whole vectors, and some that are left
    params, copies = [nans.clone()], [th.zeros(len(nans), dtype=th.bfloat16)]
    moments = ([th.zeros_like(nans)], [th.zeros_like(nans)])
    settings = update.AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.0, 1.0)
    assert update.adamw(params, [th.zeros_like(nans)], moments, th.ones(1), settings, [], copies)
    assert params[0].isnan().all() and copies[0].isnan().all()
    x = images(1, 32, 4, 4, th.bfloat16).detach()
    norm = nn.GroupNorm(32, 32).to(th.bfloat16)
    with th.no_grad():
        norm.weight.view(th.int16)[3] = 0x7FFF
    assert norm_act(norm, x, activate=False)[0][:, 3].isnan().all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t[:-1],
        lambda t: t[:1],
        lambda t: th.stack([t, t], dim=1)[:, 0],
        lambda t: t.to("meta"),
        lambda t: t.to_sparse(),
    ],
)
@pytest.mark.parametrize("which", range(6))
def test_tensors_that_do_not_belong_together_are_left_alone(generation, which, spoil):
    gradient, first, second, average, copy, param = (th.ones(300) for _ in range(6))
    found = [gradient, first, second, average, copy.bfloat16(), param]
    found[which] = spoil(found[which]) if which != 4 else spoil(copy).to(th.float32)
    if which == 0 and found[0].dtype == th.bfloat16:
        return  # a gradient may have 16 bits
    gradient, first, second, average, copy, param = found
    settings = update.AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.0, 1.0)
    if which == 0 and gradient.layout == th.strided and not gradient.is_contiguous():
        return  # a gradient is put in order first
    done = update.adamw(
        [param], [gradient], ([first], [second]), th.ones(1), settings, [([average], 0.9)], [copy]
    )
    assert not done
    assert all((t == 1).all() for t in found if t.layout == th.strided and not t.is_meta)


@pytest.mark.parametrize("other", list(CLOSE))
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_gradient_in_two_parts_is_their_sum(generation, dtype, other):
    gradient, more = tensors(dtype), [t.contiguous() for t in tensors(other)]
    total = [g.float() + m for g, m in zip(gradient, more)]
    settings = update.AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
    assert update.norm(gradient, more) == update.norm(total)
    results = []
    start = tensors()
    for parts in ((gradient, more), (total, ())):
        params = [p.clone() for p in start]
        moments, average = (
            tuple([th.zeros_like(p) for p in start] for _ in range(2)),
            [p.clone() for p in start],
        )
        assert update.adamw(
            *(params, parts[0], moments, th.ones(len(params)), settings, [(average, 0.9)]),
            *([None] * len(params), parts[1]),
        )
        results.append([*params, *moments[0], *moments[1], *average])
    assert all(map(th.equal, *results))


def test_shares_of_an_update_are_the_whole(generation, monkeypatch):
    """However the tensors are shared out, and in which order the shares are worked on."""
    results = []
    gradient, start = tensors(), tensors()
    for share in (2**20, 5000, 1):
        monkeypatch.setattr(update, "SHARE", share)
        params, counts = [p.clone() for p in start], []

        def backwards(tasks, counts=counts):
            counts.append(len(tasks))
            update.in_turn(tasks[::-1])

        moments = tuple([th.zeros_like(p) for p in start] for _ in range(2))
        settings = update.AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
        none = [None] * len(params)
        assert update.adamw(
            params, gradient, moments, th.ones(len(params)), settings, [], none, run=backwards
        )
        results.append([*params, th.tensor(update.norm(gradient, run=backwards))])
        assert counts[0] == counts[1] == {2**20: 1, 5000: 3, 1: len(SHAPES)}[share]
    for others in results[1:]:
        assert all(map(th.equal, results[0], others))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite(generation, value):
    values = tensors()
    values[5][4999] = value
    assert not update.norm(values) < float("inf")


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_adamw(generation, dtype):
    params = tensors()
    reference = [nn.Parameter(p.double()) for p in params]
    torch_adamw = th.optim.AdamW(reference, lr=1e-2, weight_decay=0.1)
    averages = [([p.clone() for p in params], decay) for decay in (0.9, 0.99)]
    expected_averages = [[p.double() for p in params] for _ in averages]
    copies = [p.bfloat16() if i % 2 else None for i, p in enumerate(params)]
    moments = tuple([th.zeros_like(p) for p in params] for _ in range(2))
    settings = update.AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1, 0.5)
    for step in range(1, 4):
        gradient = tensors(dtype)
        gradient[1] = gradient[1].contiguous()  # as autograd may return it
        assert update.adamw(
            params, gradient, moments, th.full((len(params),), float(step)), settings, averages, copies
        )
        for p, g in zip(reference, gradient):
            p.grad = 0.5 * g.double()
        torch_adamw.step()
        for (_, decay), average in zip(averages, expected_averages):
            for a, p in zip(average, reference):
                a.lerp_(p.detach(), 1 - decay)
    for i, p in enumerate(params):
        assert th.allclose(p.double(), reference[i], rtol=1e-5, atol=1e-6)
        state = torch_adamw.state[reference[i]]
        assert th.allclose(moments[0][i].double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
        assert th.allclose(moments[1][i].double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)
        assert copies[i] is None or th.equal(copies[i], p.bfloat16())
        for (average, _), expected in zip(averages, expected_averages):
            assert th.allclose(average[i].double(), expected[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (130, 70), (33, 300), (5, 2, 1), (1, 9)], ids=str)
def test_muon(generation, shape, dtype):
    """Against PyTorch's operations in float64, for matrices that are wide or high, and in whole blocks or not."""
    param, momentum = tensors(shapes=[shape, shape])
    expected, expected_momentum = param.double(), momentum.double()
    averages, copy = [(param.clone(), decay) for decay in (0.9, 0.99)], param.bfloat16()
    expected_averages = [average.double() for average, _ in averages]
    for _ in range(3):
        (gradient, more), start = tensors(dtype, [shape, shape]), expected.clone()
        settings = muon.settings(param.shape, 0.2, 0.1, 0.5)
        assert update.muon(param, gradient.contiguous(), momentum, settings, averages, copy, more)
        muon.muon(expected, 0.5 * (gradient.double() + more.double()), expected_momentum, 0.2, 0.1)
        assert error(momentum, expected_momentum) < 1e-6
        assert (param.double() - expected).norm() < 1e-4 * (expected - start).norm()
        assert th.equal(copy, param.bfloat16())
        for (average, decay), exact in zip(averages, expected_averages):
            exact.lerp_(expected, 1 - decay)
            assert th.allclose(average.double(), exact, rtol=1e-5, atol=1e-5)


def test_muon_takes_only_tensors_that_belong_together(generation):
    def update_is_done(spoiled, value):
        found = {name: th.ones(6, 4) for name in ("param", "gradient", "momentum", "average")}
        found["copy"] = th.ones(6, 4, dtype=th.bfloat16)
        if spoiled:
            found[spoiled] = value
        settings = muon.settings(found["param"].shape, 0.1, 0.1, 1.0)
        done = update.muon(
            *(found["param"], found["gradient"], found["momentum"], settings, [(found["average"], 0.9)]),
            found["copy"],
        )
        assert done or all((t == 1).all() for t in found.values())
        return done

    assert update_is_done("", None)
    for name in ("param", "gradient", "momentum", "average", "copy"):
        for value in (th.ones(6, 4).double(), th.ones(4, 6), th.ones(7, 4)):
            assert not update_is_done(name, value), name


# -- the model -----------------------------------------------------------------------------------------------


def model_and_gradients(dims=2, **options):
    th.manual_seed(0)
    model = UNetModel(3, 32, 3, 1, attention_resolutions=(1, 2), channel_mult=(1, 2), dims=dims, **options)
    # A copy, for random numbers fill a tensor in the order in which it lies in memory.
    model.load_state_dict({name: th.randn(p.shape) / 8 + p for name, p in model.state_dict().items()})
    size = {1: (16,), 2: (8, 8)}[dims]
    x, timesteps = th.randn(2, 3, *size), th.tensor([3.0, 70.0])
    y = model(x, timesteps)
    return model, y, th.autograd.grad((y**2).mean(), list(model.parameters()))


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True, "num_heads": 2}, {"dims": 1}])
def test_the_model_computes_the_same_without_them(generation, options):
    model, y, gradients = model_and_gradients(**options)
    assert model.channels_last == (options.get("dims", 2) == 2)
    with kernels.switched("0"):
        other, expected, references = model_and_gradients(**options)
    assert not other.channels_last
    assert th.allclose(y, expected, rtol=1e-4, atol=1e-5)
    for gradient, reference in zip(gradients, references):
        assert th.allclose(gradient, reference, rtol=1e-3, atol=1e-6)
    other.load_state_dict(model.state_dict())


def pointwise_definition(x, weight, bias):
    return F.conv2d(x, weight[:, :, None, None], bias)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(
    ("n", "channels", "out", "height", "width", "threads"),
    [(1, 32, 64, 1, 1, 1), (3, 96, 32, 5, 9, 2), (2, 64, 192, 16, 16, 1), (5, 160, 96, 7, 8, 3)],
)
def test_pointwise_convolution(generation, dtype, n, channels, out, height, width, threads):
    x, weight, bias = some(n, channels, out, height, width, dtype)
    weight = 3 * weight[:, :, 1, 1].contiguous()
    skip_unless_they_suit(pointwise, generation, x, weight, bias)
    dy = th.randn(n, out, height, width).to(dtype)
    expected = with_gradients(pointwise_definition, [t.double() for t in (x, weight, bias)], dy.double())
    results = []
    for count in (threads, 1):
        th.set_num_threads(count)
        results.append(with_gradients(pointwise.pointwise, (x, weight, bias), dy))
    for mine, again, exact in zip(*results, expected):
        assert th.equal(mine, again)
        assert mine.dtype == dtype and mine.shape == exact.shape and error(mine, exact) < CLOSE[dtype]
    assert results[0][0].is_contiguous(memory_format=th.channels_last)
    assert th.equal(pointwise.pointwise(x[:1], weight, bias), results[0][0][:1])


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_large_neighbours_do_not_matter_to_a_position(generation, dtype):
    x, weight, bias = some(3, 64, 96, 5, 7, dtype)
    weight = weight[:, :, 1, 1].contiguous()
    skip_unless_they_suit(pointwise, generation, x, weight, bias)
    before = pointwise.pointwise(x, weight, bias)[:, :, ::2]
    x[:, :, 1::2] *= 1e6
    assert th.equal(pointwise.pointwise(x, weight, bias)[:, :, ::2], before)


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_a_pointwise_convolution_of_larger_or_smaller_numbers_is_as_exact(generation, dtype):
    """As for the convolution of 3x3 pixels."""
    x, weight, _ = some(3, 64, 96, 5, 7, dtype)
    weight, none = weight[:, :, 1, 1].contiguous(), th.zeros(96, dtype=dtype)
    skip_unless_they_suit(pointwise, generation, x, weight, none)
    assert_scale_does_not_matter(pointwise.pointwise, x, weight, th.randn(3, 96, 5, 7).to(dtype))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_the_largest_sums_of_a_pointwise_convolution_stay_finite(generation, dtype):
    x = th.full((1, 1024, 4, 4), 1.99).to(dtype).contiguous(memory_format=th.channels_last)
    weight, bias = th.full((32, 1024), 1.99).to(dtype), th.zeros(32).to(dtype)
    skip_unless_they_suit(pointwise, generation, x, weight, bias)
    y = pointwise.pointwise(x, weight, bias)
    exact = pointwise_definition(x.double(), weight.double(), bias.double())
    error = (y.double() - exact).norm()
    assert error <= 0.1 * exact.norm()  # equal numbers have equal rounding errors, which add up


def test_pointwise_convolutions_that_do_not_suit_are_left_to_pytorch(generation):
    x, weight, bias = some(2, 32, 64, 8, 8)
    weight = weight[:, :, 0, 0].contiguous()
    assert pointwise.suits(x, weight, bias)
    assert not pointwise.suits(x.contiguous(), weight, bias) and not pointwise.suits(x[:0], weight, bias)
    assert not pointwise.suits(x, weight[:48], bias[:48]) and not pointwise.suits(x, weight, None)
    assert not pointwise.suits(x, weight.double(), bias) and not pointwise.suits(x.double(), weight, bias)
    assert not pointwise.suits(x, weight[:, :16], bias)


@pytest.mark.parametrize("generation", ["0", *kernels.GENERATIONS], indirect=True)
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("out", [48, 64])
def test_pointwise_channels_last(generation, dtype, out):
    x = images(2, 32, 4, 5, dtype).detach()
    weight, bias = th.randn(out, 32).to(dtype), th.randn(out).to(dtype)
    y = pointwise_channels_last(x, weight[..., None], bias)
    expected = F.conv2d(x.double(), weight[..., None, None].double(), bias.double())
    assert y.is_contiguous(memory_format=th.channels_last) and error(y, expected) < CLOSE[dtype]
