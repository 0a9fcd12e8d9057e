"""--keep_last and --keep_every: old checkpoints are deleted only when newer ones are safe, other files never.

Power-function averages of deleted checkpoints stay.
"""

import os
import shutil

import pytest
import torch as th
from training_process import assert_one_line_error, run_training

from improved_diffusion.run import averages, checkpoint
from improved_diffusion.run.checkpoint import DamagedCheckpoint, member_name, power_kind

FOREIGN = ["model_best.pt", "notes.txt", "model999999.pt", "ema_0.9_000001.pt", "state.json", "opt1.pt"]


def save(folder, *steps, lengths=()):
    for step in steps:
        kinds = ("model", "0.9", "opt", *map(power_kind, lengths))
        tensors = {kind: {"w": th.full((4,), float(step))} for kind in kinds}
        checkpoint.save(str(folder), step, tensors, {"samples": step})


def steps(folder):
    return checkpoint.steps(str(folder))


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [(1, 0, [12]), (2, 0, [10, 12]), (9, 0, [2, 4, 6, 8, 10, 12]), (1, 4, [4, 8, 12]), (2, 5, [10, 12])],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, kept):
    save(tmp_path, 2, 4, 6, 8, 10, 12)
    checkpoint.rotate(str(tmp_path), keep_last, keep_every, log=pytest.fail)
    assert steps(tmp_path) == kept
    names = {member_name(kind, step) for step in kept for kind in ("model", "0.9", "opt", "state")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_other_peoples_files_are_left_alone(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text("mine")
    save(tmp_path, 2, 4, 6)
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    assert steps(tmp_path) == [6]
    assert all((tmp_path / name).read_text() == "mine" for name in FOREIGN)


@pytest.mark.parametrize("kind", ["model", "0.9", "opt", "state"])
def test_the_last_good_one_stays_when_the_newest_is_damaged(tmp_path, kind):
    save(tmp_path, 2, 4, 6)
    damage(tmp_path / member_name(kind, 6))
    messages = []
    checkpoint.rotate(str(tmp_path), 1, log=messages.append)
    assert steps(tmp_path) == [2, 4, 6] and "all checkpoints are kept" in messages[0]
    assert checkpoint.find(str(tmp_path), log=messages.append).step == 4


def test_one_good_one_among_those_that_stay_is_enough(tmp_path):
    save(tmp_path, 2, 4, 6)
    damage(tmp_path / "model000006.pt")
    checkpoint.rotate(str(tmp_path), 2, log=pytest.fail)
    assert steps(tmp_path) == [4, 6]


def test_a_damaged_old_one_is_named_and_left(tmp_path):
    save(tmp_path, 2, 4, 6)
    (tmp_path / "state000002.json").write_text("{")
    messages = []
    checkpoint.rotate(str(tmp_path), 1, log=messages.append)
    assert steps(tmp_path) == [2, 6]
    assert (
        len(messages) == 1
        and "checkpoint 2 is not deleted" in messages[0]
        and "state000002.json" in messages[0]
    )


def test_the_state_file_goes_first(tmp_path, monkeypatch):
    save(tmp_path, 2, 4)
    removed = []
    original = checkpoint.bf.remove

    def remove(path):
        removed.append(os.path.basename(path))
        if len(removed) == 2:
            raise PermissionError(13, "in use", path)  # as on Windows, while somebody reads the file
        original(path)

    monkeypatch.setattr(checkpoint.bf, "remove", remove)
    messages = []
    checkpoint.rotate(str(tmp_path), 1, log=messages.append)
    assert removed == ["state000002.json", "model000002.pt"]
    assert steps(tmp_path) == [4] and "in use" in messages[0]


@pytest.mark.parametrize("owner, name", [(checkpoint, "verify"), (checkpoint.bf, "remove")])
def test_a_folder_that_is_moved_meanwhile_ends_it_with_one_error(tmp_path, monkeypatch, owner, name):
    run = tmp_path / "run"
    run.mkdir()
    save(run, 2, 4, 6)
    original = getattr(owner, name)

    def move(argument):
        if run.exists():
            run.rename(tmp_path / "elsewhere")
        original(argument)

    def check_folder():
        if not run.exists():
            raise OSError("was moved")

    monkeypatch.setattr(owner, name, move)
    with pytest.raises(OSError, match="was moved"):
        checkpoint.rotate(str(run), 1, log=pytest.fail, check_folder=check_folder)
    assert steps(tmp_path / "elsewhere") == [2, 4, 6]


LENGTHS = ("0.05", "0.1")


def test_averages_of_any_length_are_made_as_if_no_checkpoint_had_been_deleted(tmp_path):
    save(tmp_path, 2, 4, 6, 8, lengths=LENGTHS)
    before = averages.with_averages(str(tmp_path))
    expected, distance = averages.reconstruct(before, 0.08)
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    assert steps(tmp_path) == [8]
    left = {path.name for path in tmp_path.iterdir()}
    kept = {f"averages{step:06d}.json" for step in (2, 4, 6)}
    kept |= {member_name(power_kind(length), step) for step in (2, 4, 6) for length in LENGTHS}
    assert kept == {name for name in left if "000008" not in name}
    after = averages.with_averages(str(tmp_path))
    assert [(one.step, one.power_lengths) for one in after] == [(one.step, list(LENGTHS)) for one in before]
    found, same_distance = averages.reconstruct(after, 0.08)
    assert th.equal(found["w"], expected["w"]) and same_distance == distance
    # A single average is still drawn with the arguments of its run.
    source = checkpoint.state_beside(str(tmp_path / "power_0.1_000004.pt"))
    assert source.step == 4 and source.state["samples"] == 4 and source.load("power_0.1")["w"][0] == 4
    # What is left is no checkpoint to continue from, and the next rotation does not touch it.
    assert checkpoint.find(str(tmp_path), log=pytest.fail).step == 8
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_checkpoint_saved_again_takes_the_place_of_the_averages_that_were_left(tmp_path):
    save(tmp_path, 2, 4, lengths=LENGTHS)
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    save(tmp_path, 2, lengths=("0.2",))
    assert [one.power_lengths for one in averages.with_averages(str(tmp_path))] == [["0.2"], list(LENGTHS)]
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    assert [one.power_lengths for one in averages.with_averages(str(tmp_path))] == [["0.2"], list(LENGTHS)]


@pytest.mark.parametrize("name", ["averages000002.json", "power_0.05_000002.pt"])
def test_damaged_averages_of_a_deleted_checkpoint_are_named(tmp_path, name):
    save(tmp_path, 2, 4, lengths=LENGTHS)
    checkpoint.rotate(str(tmp_path), 1, log=pytest.fail)
    damage(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match=name):
        averages.reconstruct(averages.with_averages(str(tmp_path)), 0.08)


def test_averages_are_thinned_out_to_about_equal_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_AVERAGES", 5)
    for step in range(1, 25):
        save(tmp_path, step, lengths=LENGTHS)
        checkpoint.rotate(str(tmp_path), 1, keep_every=10, log=pytest.fail)
        kept = checkpoint.averages_steps(str(tmp_path))
        assert len(kept) == min(5, step - len(steps(tmp_path)))
    assert steps(tmp_path) == [10, 20, 24]
    places = sorted({0, *kept, *steps(tmp_path)})
    assert max(after - before for before, after in zip(places, places[1:])) <= 5
    weights = {member_name(power_kind(length), step) for length in LENGTHS for step in places[1:]}
    assert weights == {path.name for path in tmp_path.glob("power_*.pt")}


FLAGS = ["--save_interval", 2, "--batch_size", 2, "--ema_rate", 0.9]


def test_a_run_keeps_what_its_flags_say(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in FOREIGN:
        (run / name).write_text("mine")
    run_training(run, *FLAGS, "--total_steps", 11, "--keep_last", 2, "--keep_every", 4)
    assert steps(run) == [4, 8, 10, 11]
    assert all((run / name).read_text() == "mine" for name in FOREIGN)
    weights = {path.name for path in run.glob("*.pt")} - set(FOREIGN)
    assert weights == {member_name(kind, step) for step in steps(run) for kind in ("model", "0.9", "opt")}


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path):
    run = tmp_path / "run"
    run_training(run, *FLAGS, "--total_steps", 4)
    limit = (run / "opt000004.pt").stat().st_size - 1
    undisturbed = shutil.copytree(run, tmp_path / "copy")
    more = [*FLAGS, "--total_steps", 6, "--keep_last", 1]
    failed = run_training(run, *more, check=2, file_size_limit=limit)
    assert_one_line_error(failed, f"{run}: cannot write checkpoint 6")
    assert steps(run) == [2, 4]
    for folder in (run, undisturbed):
        run_training(folder, *more)
        assert steps(folder) == [6]
