"""Thousands of damaged and invented inputs for everything that reads: a clean result or one clear line, always.

The inputs are the same in every run. To look further, FUZZ_FACTOR=20 tries twenty times as many new ones.
"""

import contextlib
import faulthandler
import importlib.util
import io
import json
import os
import pickle
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch as th
from conftest import ROOT, TINY
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion import logger, script_util
from improved_diffusion.config import TrainConfig
from improved_diffusion.data.decode import UnusableImage, inspect_image, read_image
from improved_diffusion.flags import declared
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs import runs
from improved_diffusion.jobs.script import run_script
from improved_diffusion.results.export import export
from improved_diffusion.run import checkpoint

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
SLOWEST = 20  # seconds for one input, on a busy machine
MOST_MEMORY = 2**30  # bytes, for one input; Pillow takes 700 MB for the largest picture that it accepts
INPUTS: Counter = Counter()  # by kind, for the last test


def inputs(count):
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def peak_memory() -> int:
    """The most memory that this process ever used, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(autouse=True)
def ends_in_finite_time():
    faulthandler.dump_traceback_later(600 * FACTOR, exit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged pictures
        yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@contextlib.contextmanager
def clean(kind, name=""):
    """Count an input; what its processing raises must be one line of a user's error, with `name` in it."""
    INPUTS[kind] += 1
    start, memory = time.monotonic(), peak_memory()
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error)
        assert message.strip() and "\n" not in message, repr(message)
        assert name in message, message
    assert time.monotonic() - start < SLOWEST
    assert peak_memory() - memory < MOST_MEMORY


@st.composite
def damaged(draw, originals):
    """One of `originals` after a few flips, cuts, repetitions, or with a piece of another in it."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 16))
        change = draw(st.sampled_from(["flip", "write", "insert", "delete", "truncate", "repeat", "splice"]))
        if change == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif change == "write":
            number = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"9"]))
            data[start : start + length] = number * length
        elif change == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif change == "delete":
            del data[start : start + length]
        elif change == "truncate":
            del data[start:]
        elif change == "repeat":
            data[start:start] = data[start : start + length] * draw(st.sampled_from([2, 100]))
        else:
            other = draw(st.sampled_from(originals))
            cut = draw(st.integers(0, len(other)))
            data = data[:start] + other[cut:]
    return bytes(data)


# Pictures


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (12, 10), dtype=np.uint16))
    floats = Image.fromarray(rng.random((12, 10), dtype=np.float32))
    palette = rgb.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "rgb.png": (rgb, {}),
        "rgba.png": (rgb.convert("RGBA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "sixteen.png": (grey16, {}),
        "bits.png": (rgb.convert("1"), {}),
        "rgb.jpg": (rgb, {"exif": turned}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (palette, {}),
        "palette.gif": (palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        "rgb.webp": (rgb, {"lossless": True}),
        "rgba.webp": (rgb.convert("RGBA"), {}),
        "raw.tif": (rgb, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tif": (rgb, {"compression": "tiff_adobe_deflate"}),
        "float.tif": (floats, {}),
        "sixteen.tif": (grey16, {}),
        "rgb.ppm": (rgb, {}),
        "grey.pgm": (rgb.convert("L"), {}),
        "bits.pbm": (rgb.convert("1"), {}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, format=Image.registered_extensions()[os.path.splitext(name)[1]], **options)
        files[name] = buffer.getvalue()
    return files


PICTURES = pictures()


@given(name=st.sampled_from(sorted(PICTURES)), data=st.data())
@inputs(3000)
def test_damaged_pictures(folder, name, data):
    others = [PICTURES[name], PICTURES[data.draw(st.sampled_from(sorted(PICTURES)))]]
    path = folder / name
    path.write_bytes(data.draw(damaged(others)))
    with clean("pictures"):
        try:
            inspect_image(str(path))
            pixels, size, mode = read_image(str(path), 8)
        except UnusableImage:
            return
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        assert min(size) >= 1 and mode


@given(contents=st.lists(damaged(list(PICTURES.values())), min_size=1, max_size=4))
@inputs(60)
def test_folders_of_damaged_pictures(folder, contents):
    place = folder / f"set{INPUTS['folders of pictures']}"
    place.mkdir()
    for index, content in enumerate(contents):
        (place / f"{index}.png").write_bytes(content)
    with clean("folders of pictures", name=str(place)):
        images = read_images(str(place), 8, progress=False)
        assert images.get(np.arange(len(images))).shape == (len(images), 8, 8, 3)
        assert len(images) + sum(images.summary["skipped"].values()) == len(contents)


# Data sets in files


def npz_files() -> list[bytes]:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 2, 1])
    files = []
    for save in (np.savez, np.savez_compressed):
        for arrays in ({"arr_0": images, "arr_1": labels}, {"x": images[..., :1]}):
            files.append(io.BytesIO())
            save(files[-1], **arrays)
    files.append(io.BytesIO())
    np.save(files[-1], images)
    return [file.getvalue() for file in files]


NPZ = npz_files()


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@st.composite
def damaged_within(draw, archives):
    """A zip archive that is whole, with one of its members damaged: its checksum does not give it away."""
    members = unzipped(draw(st.sampled_from(archives)))
    name = draw(st.sampled_from(sorted(members)))
    return zipped(members | {name: draw(damaged([members[name]]))})


@given(content=damaged(NPZ) | damaged_within(NPZ[:-1]))
@example(content=NPZ[-1])
@inputs(1000)
def test_damaged_npz(folder, content):
    path = folder / "set.npz"
    path.write_bytes(content)
    with clean("npz files", name=str(path)):
        images = read_images(str(path), 8)
        assert images.get(np.arange(len(images))).shape == (len(images), 8, 8, 3)
        assert images.labels is None or len(images.labels) == len(images)


@given(place=st.integers(0, 10**6), data=st.data())
@inputs(250)
def test_damaged_caches_never_give_other_pictures(folder, place, data):
    source = folder / "cached"
    if not source.exists():
        source.mkdir()
        for name, content in list(PICTURES.items())[:3]:
            (source / name).write_bytes(content)
    cache = folder / "cache"
    images = read_images(str(source), 8, cache_dir=str(cache), progress=False)
    expected = images.get(np.arange(3))
    (path,) = cache.iterdir()
    path.write_bytes(data.draw(damaged([path.read_bytes()])))
    with clean("image caches"):
        lines = []
        images = read_images(str(source), 8, cache_dir=str(cache), log=lines.append, progress=False)
        assert np.array_equal(images.get(np.arange(3)), expected)
        assert images.summary["cached"] or "its cache" in lines[0]


def cifar_members() -> dict[str, bytes]:
    batch = {"labels": [0, 1], "data": np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)}
    members = {f"data_batch_{i}": batch for i in range(1, 6)} | {"test_batch": batch}
    members["batches.meta"] = {"label_names": list("abcdefghij")}
    return {name: pickle.dumps(value, protocol=2) for name, value in members.items()}


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CIFAR = cifar_members()


@given(name=st.sampled_from(["test_batch", "batches.meta"]), whole=st.booleans(), data=st.data())
@inputs(600)
def test_damaged_cifar_archives(folder, name, whole, data):
    if whole:
        content = tarred(CIFAR | {name: data.draw(damaged([CIFAR[name]]))})
    else:
        content = data.draw(damaged([tarred(CIFAR)]))
    path = folder / "cifar.tar"
    path.write_bytes(content)
    with clean("CIFAR-10 archives", name=str(path)):
        archive = CIFAR10.read_archive(str(path))
        assert all(len(images) == len(labels) for images, labels in archive.splits.values())


def script(path):
    spec = importlib.util.spec_from_file_location(f"fuzzed_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CIFAR10 = script(ROOT / "datasets" / "cifar10.py")


# Checkpoints


def tensor_files() -> list[bytes]:
    weights = {"a.weight": th.arange(6.0).reshape(2, 3), "a.bias": th.ones(3).half(), "n": th.tensor([1, 2])}
    optimizer = {
        "state": {0: {"step": th.tensor(3.0), "exp_avg": th.zeros(2, 3)}},
        "param_groups": [{"lr": 1e-4}],
    }
    files = []
    for content in (weights, optimizer):
        for new in (True, False):
            files.append(io.BytesIO())
            th.save(content, files[-1], _use_new_zipfile_serialization=new)
    return [file.getvalue() for file in files]


TENSORS = tensor_files()


@given(content=damaged(TENSORS) | damaged_within([TENSORS[0], TENSORS[2]]))
@inputs(1500)
def test_damaged_weights(folder, content):
    path = folder / "model000001.pt"
    path.write_bytes(content)
    with clean("weight files", name=str(path)):
        tensors = checkpoint.load_tensors(str(path))
        assert all(isinstance(name, str) for name in tensors)
        for value in tensors.values():
            if isinstance(value, th.Tensor):
                value.sum()  # reads every number of it


def saved_checkpoint(folder, step):
    weights = {"w": th.arange(4.0)}
    state = {"samples": 8, "elapsed": 1.5, "arguments": {"lr": 1e-4}, "data": {}, "log": {}, "skipped": 0}
    return checkpoint.save(str(folder), step, {"model": weights, "0.9": weights, "opt": weights}, state)


@given(kind=st.sampled_from(["state", "state", "model", "0.9", "opt"]), data=st.data())
@inputs(700)
def test_damaged_checkpoints_are_passed_over(folder, kind, data):
    run = folder / "run"
    if not run.exists():
        run.mkdir()
        saved_checkpoint(run, 1)
        saved_checkpoint(run, 2)
    path = run / checkpoint.member_name(kind, 2)
    original = path.read_bytes()
    content = data.draw(damaged([original]))
    path.write_bytes(content)
    lines = []
    with clean("checkpoints"):
        found = checkpoint.find(str(run), log=lines.append)
        if found.step == 1:
            assert len(lines) == 1 and path.name in lines[0]
        else:
            assert content == original or (kind == "state" and same_json(content, original))
    with clean("checkpoints", name=str(path)):
        checkpoint.find(str(path))
    path.write_bytes(original)


def same_json(a: bytes, b: bytes) -> bool:
    """Whether two texts mean the same; the checksum is of no interest where the rest is right."""
    a, b = ({**json.loads(text), "sha256": 0} for text in (a, b))
    return a == b


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
STATE_KEYS = [
    "files",
    "step",
    "samples",
    "elapsed",
    "arguments",
    "data",
    "schedule_sampler",
    "log",
    "skipped",
]


@given(changes=st.dictionaries(st.sampled_from(STATE_KEYS), JSON, min_size=1, max_size=3))
@inputs(500)
def test_invented_state_files(folder, changes):
    """With right checksums, as somebody with bad intentions would write them."""
    run = folder / "invented"
    if not run.exists():
        run.mkdir()
        saved_checkpoint(run, 1)
    path = run / "state000001.json"
    original = path.read_text()
    state = {**json.loads(original), **changes}
    del state["sha256"]
    path.write_text(json.dumps({**state, "sha256": checkpoint._state_checksum(state)}))
    with clean("state files", name=str(path)):
        found = checkpoint.find(str(path))
        config = runs.merge_for_resume(TrainConfig(lr=0.5), set(), found)
        assert isinstance(config.lr, float | int)
    path.write_text(original)


# The record of a run


COLUMNS = ["step", "loss", "lr"]
ROWS = [",".join([str(10 * i), repr(1 / i), "0.0001"]) for i in range(1, 8)]
CSV = "\n".join([",".join(COLUMNS), *ROWS, ""]).encode()
JSON_LINES = "".join(json.dumps(dict(zip(COLUMNS, row.split(",")))) + "\n" for row in ROWS).encode()


@given(table=damaged([CSV]), lines=damaged([JSON_LINES]))
@inputs(700)
def test_damaged_records_are_continued(folder, table, lines):
    run = folder / "record"
    run.mkdir(exist_ok=True)
    (run / "progress.csv").write_bytes(table)
    (run / "progress.jsonl").write_bytes(lines)
    with clean("metrics"):
        logger.configure(str(run), COLUMNS, keep_until=40)
        logger.logkv("step", 50)
        logger.logkv("loss", 0.25)
        logger.dumpkvs()
    logger.close()
    written = (run / "progress.csv").read_text(encoding="utf-8").splitlines()
    assert written[0].split(",")[:3] == COLUMNS
    assert written[-1].split(",")[:3] == ["50", "0.25", ""]
    whole = (run / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(whole[-1])["step"] == 50
    assert all(json.loads(line)["step"] != 60 for line in whole)


@given(
    table=damaged([CSV]),
    checkpoints=damaged([b"step,samples,saved_at,files\n10,80,2026-01-02T03:04:05,model000010.pt\n"]),
    companions=st.tuples(
        *[damaged([b'{"total_steps": 70, "data": {"classes": {"a": 3}}, "sessions": [{}]}'])] * 2
    ),
)
@inputs(100)
def test_damaged_records_are_exported(folder, table, checkpoints, companions):
    run = folder / "exported"
    run.mkdir(exist_ok=True)
    contents = [table, checkpoints, *companions]
    for name, content in zip(["progress.csv", "checkpoints.csv", "args.json", "run.json"], contents):
        (run / name).write_bytes(content)
    with clean("exports", name=str(run)):
        export(str(run))


# Flags

# How each script is told to work on something that does not exist.
SCRIPTS = {
    script(ROOT / "scripts" / "image_train.py"): ["--log_dir", "run", "--data_dir", "absent"],
    script(ROOT / "scripts" / "image_sample.py"): ["--log_dir", "run", "--model_path", "absent"],
}
FLAGS = sorted({flag for program in SCRIPTS for flag in declared(program.create_parser().config)})
VALUES = (
    st.sampled_from(
        ["0", "1", "-1", "2", "3", "4", "8", "16", "32", "64", "96", "128", "1024", "99999999999"]
    )
    | st.sampled_from(["1,2", "1,2,2", "2,2,4,4", "16,8", "8,,4", "ddim5", "ddim0", "10,10", "True", "no"])
    | st.sampled_from(
        ["nan", "inf", "-inf", "1e400", "1e-400", "0.1", "0.9,0.99", "linear", "cosine", "9" * 5000]
    )
    | st.integers().map(str)
    | st.floats().map(str)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
)


@given(
    flags=st.lists(st.tuples(st.sampled_from([*FLAGS, "lr_", ""]), VALUES), min_size=1, max_size=4),
    tiny=st.booleans(),
    program=st.sampled_from(sorted(SCRIPTS, key=str)),
)
@inputs(1000)
def test_invented_flags(folder, flags, tiny, program):
    """All that a script does with its flags before it finds that there is nothing to work on."""
    start = {**TINY, "diffusion_steps": 10} if tiny else {}
    argv = [part for name, value in [*start.items(), *flags] for part in (f"--{name}", str(value))]
    place = folder / "commands"
    place.mkdir(exist_ok=True)
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, clean("command lines"):
        patch.setattr(script_util, "MAX_PARAMETERS", 10**6)  # what is legal but large would only take time
        patch.setattr(sys, "argv", ["script", *argv, *SCRIPTS[program]])
        patch.chdir(place)
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
            run_script(program.main)
    (line,) = errors.getvalue().splitlines()
    assert end.value.code == 2 and "--" in line
    assert not list(place.iterdir()), "nothing is left behind"


EXPECTED = {
    "pictures": 3000,
    "folders of pictures": 60,
    "npz files": 1000,
    "image caches": 250,
    "CIFAR-10 archives": 600,
    "weight files": 1500,
    "checkpoints": 1400,
    "state files": 500,
    "metrics": 700,
    "exports": 100,
    "command lines": 1000,
}


def test_as_many_inputs_as_the_readme_says(capsys):
    if INPUTS.keys() != EXPECTED.keys():
        pytest.skip("the other tests of this file were not all run")
    total = sum(INPUTS.values())
    with capsys.disabled():
        print(
            f"\nfuzzed: {total:,} inputs ({', '.join(f'{count:,} {kind}' for kind, count in INPUTS.items())})"
        )
    assert all(INPUTS[kind] >= count * FACTOR for kind, count in EXPECTED.items()), INPUTS
    assert total >= 10_000 * FACTOR
