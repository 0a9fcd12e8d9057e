"""Damaged files: found out by their checksums, named, and passed over for the newest that are intact."""

import hashlib
import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import read_json
from PIL import Image
from training_process import assert_one_line_error, assert_same_run, rows, run_training

from improved_diffusion.config import TrainConfig
from improved_diffusion.image_datasets import read_images
from improved_diffusion.jobs.runs import (
    record_run,
)
from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import DamagedCheckpoint, member_name

FLAGS = ["--save_interval", 2, "--log_interval", 1, "--batch_size", 4, "--ema_rate", "0.9"]
NEWEST, END = 6, 8
MORE = [*FLAGS, "--total_steps", END]
FLIPS, CUTS = 8, 4  # of each kind of file of a checkpoint


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run with checkpoints 2, 4 and 6. Not to be changed."""
    run = tmp_path_factory.mktemp("intact") / "run"
    run_training(run, *FLAGS, "--total_steps", NEWEST)
    return run


@pytest.fixture(scope="module")
def undisturbed(intact, tmp_path_factory):
    """The same run two steps later."""
    run = shutil.copytree(intact, tmp_path_factory.mktemp("undisturbed") / "run")
    run_training(run, *MORE)
    return run


@pytest.fixture
def run(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


def flip(path, rng):
    """Invert one random bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    """Keep a random number of the first bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


# -- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "0.9", "opt", "state"])
@pytest.mark.parametrize("harm, times", [(flip, FLIPS), (cut, CUTS)])
def test_every_damage_is_found_and_named(run, kind, harm, times):
    rng = random.Random(f"{kind} {harm.__name__}")
    path = run / member_name(kind, NEWEST)
    content = path.read_bytes()
    for _ in range(times):
        harm(path, rng)
        warnings = []
        assert checkpoint.find(str(run), log=warnings.append).step == 4
        assert len(warnings) == 1 and "skipping checkpoint 6" in warnings[0] and str(path) in warnings[0]
        with pytest.raises(DamagedCheckpoint, match=re.escape(str(path))):
            checkpoint.find(str(path))
        path.write_bytes(content)
    assert checkpoint.find(str(run), log=pytest.fail).step == NEWEST


@pytest.mark.parametrize("kind", ["model", "0.9", "opt"])
def test_a_file_that_was_exchanged_is_found(run, kind):
    shutil.copy(run / member_name(kind, 4), run / member_name(kind, NEWEST))
    assert checkpoint.find(str(run), log=[].append).step == 4


def test_the_same_command_goes_on_from_the_newest_intact_one(run, undisturbed):
    flip(run / "opt000006.pt", random.Random(0))
    cut(run / "model000004.pt", random.Random(0))
    done = run_training(run, *MORE)
    for name in ("opt000006.pt", "model000004.pt"):
        assert re.search(rf"WARNING: skipping checkpoint \d: {re.escape(str(run / name))}: ", done.stdout)
    assert "resumed step 2 " in done.stdout
    assert_same_run(run, undisturbed, END)
    assert checkpoint.find(str(run / "model000006.pt")).step == 6  # which has been written anew


def test_a_damaged_file_that_was_named_is_an_error(run, tmp_path):
    path = run / "ema_0.9_000006.pt"
    flip(path, random.Random(0))
    failed = run_training(tmp_path / "other", *MORE, "--resume_checkpoint", path, check=2)
    assert_one_line_error(failed, "--resume_checkpoint", str(path), "damaged")
    assert not (tmp_path / "other").exists()


def test_training_does_not_begin_anew_when_all_are_damaged(run):
    before = (run / "progress.csv").read_bytes()
    for step in (2, 4, 6):
        flip(run / member_name("model", step), random.Random(step))
    failed = run_training(run, *MORE, check=2)
    assert_one_line_error(failed, f"{run}: holds no intact checkpoint")
    assert (run / "progress.csv").read_bytes() == before


def test_sampling_from_damaged_weights_is_an_error(run, call_script):
    path = run / "ema_0.9_000006.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within a weight, which the file format itself does not notice
    path.write_bytes(content)
    done = call_script("image_sample.py", "--model_path", path, "--log_dir", run / "drawn", check=2)
    assert str(path) in done.stderr and "damaged" in done.stderr and done.stderr.count("\n") == 1
    assert not (run / "drawn").exists()


# -- state files that are sound JSON, with a matching checksum, and absurd ---------------------------------


def rewrite_state(run, change):
    """Let `change` loose on the newest state file's content, and write it with a checksum that fits."""
    path = run / member_name("state", NEWEST)
    state = read_json(path)
    del state["sha256"]
    change(state)
    state["sha256"] = checkpoint._state_checksum(state)
    path.write_text(json.dumps(state, indent=1))
    return path


def set_to(**values):
    def change(state):
        state.update(values)

    change.__name__ = ", ".join(f"{key}={str(value)[:20]}" for key, value in values.items())
    return change


def list_a_file(name):
    def change(state):
        state["files"][name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}

    change.__name__ = f"lists {name}"
    return change


ABSURD = [
    set_to(step=7),
    set_to(step="6"),
    set_to(format="x"),
    set_to(format=10**9),
    set_to(samples="24"),
    set_to(samples=None),
    set_to(logged_step=[6]),
    set_to(elapsed={}),
    set_to(arguments=[]),
    set_to(data="builtin"),
    set_to(log=[]),
    set_to(schedule_sampler=7),
    set_to(files=[]),
    set_to(files={"model000006.pt": 5}),
    set_to(files={"model000006.pt": {"bytes": "many", "sha256": "0"}}),
    set_to(files={"model000006.pt": {"bytes": float("inf"), "sha256": "0"}}),
    set_to(files={"model000006.pt": {"bytes": 10**400, "sha256": "0"}}),
    list_a_file("../secret000006.pt"),
    list_a_file("../model000006.pt"),
    list_a_file("model000004.pt"),
    list_a_file("notes.txt"),
]


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: change.__name__)
def test_absurd_state_is_damage(run, change):
    for name in ("secret000006.pt", "model000006.pt"):
        (run.parent / name).write_bytes(b"secret")
    (run / "notes.txt").write_bytes(b"secret")
    path = rewrite_state(run, change)
    warnings = []
    assert checkpoint.find(str(run), log=warnings.append).step == 4
    assert len(warnings) == 1 and "skipping checkpoint 6" in warnings[0]
    with pytest.raises(DamagedCheckpoint, match=re.escape(str(run))):
        checkpoint.find(str(path))
    # Rotating is not led astray either: nothing outside, and no file of somebody else, is deleted.
    checkpoint.rotate(str(run), 1, log=warnings.append)
    assert (run.parent / "model000006.pt").exists() and (run / "notes.txt").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "7",
        '"x"',
        "{}",
        '{"files": {}}',
        "[" * 100_000,
        '{"step": 1' + "0" * 5000 + "}",
    ],
)
def test_text_that_is_no_state_is_damage(run, text):
    path = run / member_name("state", NEWEST)
    path.write_text(text)
    with pytest.raises(DamagedCheckpoint, match=re.escape(str(path))):
        checkpoint.find(str(path))
    assert checkpoint.find(str(run), log=[].append).step == 4


@pytest.mark.parametrize(
    "change",
    [
        set_to(log={}),
        set_to(log={"values": 5, "sums": {"loss": 1}}),
        set_to(samples=-4),
        set_to(samples=10**30),
        set_to(arguments={"image_size": "8"}),
        set_to(files={}),
    ],
    ids=lambda change: change.__name__,
)
def test_a_state_that_no_run_can_go_on_from_is_one_line(run, change):
    path = rewrite_state(run, change)
    failed = run_training(run, *MORE, "--resume_checkpoint", path, check=2)
    assert_one_line_error(failed, str(run))


# -- logs and records ------------------------------------------------------------------------------------


def change_a_digit(content):
    position = content.index(b"\n4,") + len(b"\n4,16,0.")
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


CSV_DAMAGE = {
    "a digit changed": (change_a_digit, 6),
    "cut within a row": (lambda content: content[: content.index(b"\n4,") + 9], 3),
    "a row of garbage": (lambda content: content.replace(b"\n4,", b"\n\x00\xff;;4\x1f,"), 5),
    "emptied": (lambda content: b"", 0),
    "binary": (lambda content: random.Random(0).randbytes(len(content)), 0),
    "header damaged": (lambda content: content.replace(b"loss_q0", b"loss\x1fq0"), 0),
}


@pytest.mark.parametrize("case", CSV_DAMAGE)
def test_a_damaged_csv_is_named_and_training_goes_on(run, undisturbed, case):
    change, readable = CSV_DAMAGE[case]
    path = run / "progress.csv"
    path.write_bytes(change(path.read_bytes()))
    done = run_training(run, *MORE)
    assert f"WARNING: {path}: " in done.stdout and "workbook could not" not in done.stdout
    # What can be read stays, what follows is complete, and the columns are the usual ones.
    expected = rows(undisturbed)
    assert [list(row) for row in rows(run)] == [list(expected[0])] * (readable + END - NEWEST)
    assert rows(run)[readable:] == expected[NEWEST:]
    if case == "header damaged":
        assert b"loss\x1fq0" in (run / "progress.csv.damaged").read_bytes()


def test_an_intact_csv_is_not_complained_about(run):
    assert "WARNING" not in run_training(run, *MORE).stdout


BROKEN_JSON = ["", "{", "[]", "null", '{"sessions": 5}', '{"sessions": [5]}', "[" * 100_000, "\0\xff"]


@pytest.mark.parametrize("text", BROKEN_JSON)
def test_broken_records_of_a_run_are_written_anew(tmp_path, text):
    for name in ("args.json", "run.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    config = TrainConfig(lr=0.1)
    record_run(str(tmp_path), config, {"model": {}}, step=4)
    assert read_json(tmp_path / "args.json") == config.to_dict()
    assert [session["step"] for session in read_json(tmp_path / "run.json")["sessions"]] == [4]


# -- the image cache -------------------------------------------------------------------------------------


def test_a_damaged_cache_is_named_and_rebuilt(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"a_{number}.png")

    def read():
        messages = []
        images = read_images(str(folder), 8, cache_dir=str(cache), log=messages.append, progress=False)
        return images.get(np.arange(3)), messages

    fresh, _ = read()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    for number in range(40):
        (cut if number % 4 == 0 else flip)(path, random.Random(number))
        pixels, messages = read()
        assert np.array_equal(pixels, fresh)
        assert len(messages) == 1 and str(folder) in messages[0] and "damaged" in messages[0]
        assert path.read_bytes() == content  # as good as new
    assert read()[1] == []
