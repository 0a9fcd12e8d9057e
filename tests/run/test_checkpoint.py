"""Checkpoints: names, completeness, checksums, finding them again."""

import json

import pytest
import torch as th

from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import DamagedCheckpoint, member_name, power_kind


def save(folder, step, **state):
    tensors = {kind: {"w": th.full((4,), float(step + i))} for i, kind in enumerate(("model", "0.9", "opt"))}
    return checkpoint.save(str(folder), step, tensors, state)


def test_names():
    assert member_name("model", 30000) == "model030000.pt"
    assert member_name("0.9999", 30000) == "ema_0.9999_030000.pt"
    assert member_name(power_kind("0.05"), 30000) == "power_0.05_030000.pt"
    for kind in ("model", "0.9999", "opt", "state", "power_0.05"):
        assert checkpoint.kind_of(member_name(kind, 7)) == kind
    assert checkpoint.kind_of("power_best_000007.pt") is None
    assert member_name("opt", 1) == "opt000001.pt"
    assert member_name("state", 12345678) == "state12345678.json"


def test_round_trip(tmp_path):
    save(tmp_path, 5, samples=40)
    found = checkpoint.find(str(tmp_path))
    assert (found.step, found.state["samples"], found.ema_rates) == (5, 40, ["0.9"])
    assert found.load("0.9")["w"].tolist() == [6.0] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ema_0.9_000005.pt",
        "model000005.pt",
        "opt000005.pt",
        "state000005.json",
    ]


@pytest.mark.parametrize("count", range(5))
def test_nothing_is_written_after_the_folder_was_found_to_be_another_one(tmp_path, count):
    """Between any two files, the directory may be moved, and one of somebody else take its place."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    calls = []

    def check_folder():
        if len(calls) == count:
            run.rename(elsewhere)
            run.mkdir()
            raise OSError("another folder")
        calls.append(1)

    with pytest.raises(OSError, match="another folder"):
        checkpoint.save(
            str(run), 5, {kind: {"w": th.zeros(1)} for kind in ("model", "0.9", "opt")}, {}, check_folder
        )
    assert list(run.iterdir()) == []
    assert len(list(elsewhere.iterdir())) == max(count - 1, 0)


@pytest.mark.parametrize("kind", ["model", "0.9", "opt", "state"])
def test_any_file_stands_for_the_checkpoint(tmp_path, kind):
    save(tmp_path, 5)
    save(tmp_path, 7)
    assert checkpoint.find(str(tmp_path / member_name(kind, 5))).step == 5
    assert checkpoint.find(str(tmp_path)).step == 7


def test_without_state_file_there_is_no_checkpoint(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 7)
    (tmp_path / "state000007.json").unlink()
    assert checkpoint.steps(str(tmp_path)) == [5]
    assert checkpoint.find(str(tmp_path)).step == 5
    with pytest.raises(DamagedCheckpoint, match="state000007.json: missing"):
        checkpoint.find(str(tmp_path / "model000007.pt"))


def test_directory_passes_over_damage_and_names_it(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 7)
    path = tmp_path / "opt000007.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    messages = []
    assert checkpoint.find(str(tmp_path), log=messages.append).step == 5
    assert "opt000007.pt" in messages[0] and "checksum" in messages[0]
    with pytest.raises(DamagedCheckpoint, match="opt000007.pt.*checksum"):
        checkpoint.find(str(tmp_path / "model000007.pt"))


def test_one_that_is_saved_while_the_last_is_read_and_deleted_is_found(tmp_path, monkeypatch):
    save(tmp_path, 5)
    read = checkpoint.read

    def read_late(folder, step):
        monkeypatch.setattr(checkpoint, "read", read)
        save(tmp_path, 7)
        checkpoint.rotate(folder, 1)
        return read(folder, step)

    monkeypatch.setattr(checkpoint, "read", read_late)
    messages = []
    assert checkpoint.find(str(tmp_path), log=messages.append).step == 7
    assert "skipping checkpoint 5" in messages[0]


def test_truncated_weights_are_named(tmp_path):
    save(tmp_path, 5)
    path = tmp_path / "model000005.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedCheckpoint, match="model000005.pt.*damaged"):
        checkpoint.load_tensors(str(path))
    with pytest.raises(DamagedCheckpoint, match="100 bytes where"):
        checkpoint.find(str(path))


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.find(str(tmp_path))
    with pytest.raises(ValueError, match="no such file or directory"):
        checkpoint.find(str(tmp_path / "absent"))
    other = tmp_path / "weights.pt"
    other.write_bytes(b"x")
    with pytest.raises(ValueError, match="not a file of a checkpoint"):
        checkpoint.find(str(other))


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, samples=1)
    save(tmp_path, 5, samples=2)
    assert checkpoint.find(str(tmp_path)).state["samples"] == 2


def test_state_file_is_written_last(tmp_path, monkeypatch):
    save(tmp_path, 5, samples=1)
    order = []
    original = checkpoint.open_atomic

    def spy(path, *args):
        order.append(path)
        assert not (tmp_path / "state000005.json").exists()  # also while a step is saved again
        return original(path, *args)

    monkeypatch.setattr(checkpoint, "open_atomic", spy)
    save(tmp_path, 5, samples=2)
    assert [path.endswith("state000005.json") for path in order] == [False, False, False, True]


def test_state_is_readable_json(tmp_path):
    save(tmp_path, 5, arguments={"lr": 1e-4})
    state = json.loads((tmp_path / "state000005.json").read_text())
    assert state["arguments"] == {"lr": 1e-4} and len(state["files"]["opt000005.pt"]["sha256"]) == 64
