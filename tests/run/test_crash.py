"""kill -9 at any instant, during saves too: nothing saved is lost, and the end is that of an undisturbed run."""

import random
import re
import time

from openpyxl import load_workbook
from training_process import Training, assert_same_run, rows, run_training, temporaries

from improved_diffusion.run import checkpoint
from improved_diffusion.storage import TEMPORARY_PREFIX, open_atomic, remove_temporaries

KILLS = 20
SAVE_INTERVAL = 2
TOTAL_STEPS = 24
FLAGS = [
    *("--total_steps", TOTAL_STEPS, "--save_interval", SAVE_INTERVAL, "--log_interval", 5, "--keep_last", 2),
    *("--class_cond", True, "--dropout", 0.2, "--schedule_sampler", "loss-second-moment"),
    *("--diffusion_steps", 4, "--batch_size", 4, "--microbatch", 3, "--ema_rate", "0.9,0.99", "--lr", 1e-3),
]
MEMBER = re.compile(r"(\.tmp-[0-9a-f]+-)?(?:model|ema_[0-9.]+_|opt|state)(\d{6})\.(?:pt|json)")
FILES_PER_SAVE = 5


def test_kill_at_random_instants_and_resume(tmp_path):
    reference = tmp_path / "reference"
    run_training(reference, *FLAGS)
    rng = random.Random(0)
    kills, in_saves, finished = 0, 0, 0
    while kills < KILLS:
        # A run that has come to its end, which it did in spite of many kills, is compared; then the next begins.
        run = tmp_path / f"run{finished}"
        newest = 0
        while kills < KILLS:
            with Training(run, *FLAGS) as training:
                was_killed = kill_at_a_random_instant(training, rng)
            if "resumed step" in training.stdout:
                assert f"resumed step {newest} " in training.stdout
            assert "WARNING" not in training.stdout
            if not was_killed:
                break
            kills += 1
            newest, save_was_hit = inspect_after_kill(run, newest)
            in_saves += save_was_hit
        run_training(run, *FLAGS)
        assert_same_run(run, reference, TOTAL_STEPS)
        assert saves(run) == saves(reference)
        assert not temporaries(run)
        finished += 1
    print(f"{kills} kills, {in_saves} of them in the middle of a save; {finished} runs compared")
    assert in_saves >= KILLS // 6


def test_kill_right_after_the_last_checkpoint(tmp_path):
    run, reference = tmp_path / "run", tmp_path / "reference"
    with Training(run, *FLAGS) as training:
        training.wait_until(lambda: TOTAL_STEPS in checkpoint.steps(str(run)))
        training.kill()
        training.wait()
    # The row of the last, incomplete interval was there first: nothing is left to do but to tell of the save.
    assert rows(run)[-1]["step"] == str(TOTAL_STEPS)
    assert "nothing left to do" in run_training(run, *FLAGS).stdout
    run_training(reference, *FLAGS)
    assert_same_run(run, reference, TOTAL_STEPS)
    assert saves(run) == saves(reference)
    sheet = load_workbook(run / "results.xlsx")["Checkpoints"]
    assert sheet.cell(sheet.max_row, 1).value == TOTAL_STEPS


def kill_at_a_random_instant(training, rng):
    """Let it write a random number of files of checkpoints, wait a random moment, and kill.

    :return: False when it had come to its end before that.
    """
    wanted = rng.randint(0, 2 * FILES_PER_SAVE)
    # Half of the moments are short enough to hit the writing of a file, the others reach into what follows:
    # renaming, deleting old checkpoints, rows, the workbook, the next steps, or the start of the process.
    moment = rng.choice([rng.uniform(0, 0.004), rng.uniform(0, 0.4)])
    seen = set()
    while len(seen) < wanted and training.is_alive:
        seen |= {name for name in temporaries(training.folder) if MEMBER.fullmatch(name)}
        time.sleep(0.0005)
    time.sleep(moment)
    training.kill()
    was_killed = training.wait() != 0
    assert training.stderr == ""
    return was_killed


def inspect_after_kill(run, newest_before):
    """Whatever claims to be a checkpoint is one, and only the steps since the last save are lost.

    :return: the newest checkpoint's step, and whether the kill hit a save: whether files of a newer one are there.
    """
    complete = checkpoint.steps(str(run))
    for step in complete:
        checkpoint.verify(checkpoint.read(str(run), step))
    newest = max(complete, default=0)
    assert newest >= newest_before
    assert all(int(row["step"]) - newest <= SAVE_INTERVAL for row in rows(run))
    matches = [MEMBER.fullmatch(path.name) for path in run.iterdir()] if run.exists() else []
    return newest, any(int(match[2]) > newest for match in matches if match)


def saves(run):
    """The checkpoints that checkpoints.csv has a row for."""
    return [row["step"] for row in rows(run, "checkpoints.csv")]


def test_only_temporaries_are_removed(tmp_path):
    keep = ["model000002.pt", "tmp-notes.txt", f"my{TEMPORARY_PREFIX}x", ".lock"]
    for name in [*keep, f"{TEMPORARY_PREFIX}0a1b2c3d-model000004.pt", f"{TEMPORARY_PREFIX}x"]:
        (tmp_path / name).write_text("x")
    (tmp_path / f"{TEMPORARY_PREFIX}folder").mkdir()
    remove_temporaries(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*keep, f"{TEMPORARY_PREFIX}folder"}


def test_what_is_being_written_has_a_temporary_name(tmp_path):
    with open_atomic(str(tmp_path / "model000002.pt")) as file:
        file.write(b"x")
        assert [MEMBER.fullmatch(name)[2] for name in temporaries(tmp_path)] == ["000002"]
        assert len(list(tmp_path.iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model000002.pt"]
