"""Signals and time limits: the step is finished and saved, the exit code tells why, and the run goes on exactly."""

import os
import signal
import sys
import threading
import time

import pytest
from openpyxl import load_workbook
from training_process import Training, assert_same_run, assert_same_tensors, rows, run_training

from improved_diffusion.run import checkpoint
from improved_diffusion.run.interrupts import Interrupts, Stoppable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there are no signals between processes")

FLAGS = ["--save_interval", 10**6, "--log_interval", 4, "--batch_size", 4, "--ema_rate", "0.9,0.99"]
ENDLESS = ["--total_steps", 10**6]
SECONDS = 60  # for the rest of a tiny step, a save and an export, on a busy machine


def assert_goes_on_exactly(run, reference):
    """Resume `run` where it stopped, for some steps more, and compare with a run that nothing disturbed."""
    stopped = checkpoint.steps(str(run))[-1]
    more = [*FLAGS, "--total_steps", stopped + 3, "--max_hours", 0]
    resumed = run_training(run, *more)
    assert f"resumed step {stopped} " in resumed.stdout and "WARNING" not in resumed.stdout
    run_training(reference, *more)
    assert_same_run(run, reference, stopped + 3)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_finishes_the_step_saves_exports_and_exits(tmp_path, name, code):
    run = tmp_path / "run"
    with Training(run, *FLAGS, *ENDLESS) as training:
        training.wait_for_rows(2)
        assert checkpoint.steps(str(run)) == [] and not (run / "results.xlsx").exists()
        training.signal(getattr(signal, name))
        sent = time.monotonic()
        assert training.wait() == code
        assert time.monotonic() - sent < SECONDS
    assert f"{name}: finishing this step and saving" in training.stderr and "Traceback" not in training.stderr
    (stopped,) = checkpoint.steps(str(run))
    assert f"stopped by {name} at step {stopped}; to go on: " in training.stdout
    assert f"--log_dir {run}" in training.stdout
    # Every step is in a row, the last ones in one of their own; the workbook has all rows.
    assert rows(run)[-1]["step"] == str(stopped)
    metrics = load_workbook(run / "results.xlsx")["Metrics"]
    assert metrics.cell(metrics.max_row, 1).value == stopped
    assert_goes_on_exactly(run, tmp_path / "reference")


def test_the_command_to_go_on_is_quoted(tmp_path):
    run = tmp_path / "my run"
    training = run_training(run, *FLAGS, *ENDLESS, "--max_hours", 1 / 3600, check=0)
    assert f"image_train.py --log_dir '{run}'" in training.stdout
    more = ["--total_steps", checkpoint.steps(str(run))[-1] + 1, "--max_hours", 0]
    done = run_training(run, *FLAGS, *more)
    assert f"image_sample.py --model_path '{run}'" in done.stdout


def test_max_hours_stops_cleanly(tmp_path):
    run = tmp_path / "run"
    started = time.monotonic()
    training = run_training(run, *FLAGS, *ENDLESS, "--max_hours", 1 / 3600, check=0)
    assert 1 < time.monotonic() - started < 1 + SECONDS
    (stopped,) = checkpoint.steps(str(run))
    assert f"stopped by --max_hours at step {stopped}; to go on: " in training.stdout
    assert_goes_on_exactly(run, tmp_path / "reference")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
def test_sigusr1_saves_and_goes_on(tmp_path):
    run = tmp_path / "run"
    with Training(run, *FLAGS, *ENDLESS) as training:
        training.wait_for_rows(1)
        training.signal(signal.SIGUSR1)
        training.wait_until(lambda: checkpoint.steps(str(run)))
        (saved,) = checkpoint.steps(str(run))
        training.wait_until(lambda: int(rows(run)[-1]["step"]) > saved + 4)
        assert checkpoint.steps(str(run)) == [saved]
        training.signal(signal.SIGTERM)
        assert training.wait() == 143
    stopped = checkpoint.steps(str(run))[-1]
    assert stopped > saved
    # What the extra save holds is what any other save at that step would.
    run_training(tmp_path / "reference", *FLAGS, "--total_steps", saved)
    a, b = (checkpoint.read(str(folder), saved) for folder in (run, tmp_path / "reference"))
    for kind in ("model", "opt", *b.ema_rates):
        assert_same_tensors(a.load(kind), b.load(kind))


def take_save_interrupted(interrupts, before):
    """`interrupts.take_save()`, with SIGUSR1 before its bytecode number `before`.

    :return: what it returns, and how many bytecodes it has.
    """
    bytecodes = 0

    def interrupt(frame, event, arg):
        nonlocal bytecodes
        if frame.f_code is Interrupts.take_save.__code__:
            frame.f_trace_opcodes = True
            if event == "opcode":
                if bytecodes == before:
                    os.kill(os.getpid(), signal.SIGUSR1)
                bytecodes += 1
        return interrupt

    tracing = sys.gettrace()
    sys.settrace(interrupt)
    try:
        return interrupts.take_save(), bytecodes
    finally:
        sys.settrace(tracing)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")
def test_sigusr1_is_taken_once_whenever_it_comes():
    before, bytecodes = 0, 1
    while before < bytecodes:
        with Interrupts() as interrupts:
            taken, bytecodes = take_save_interrupted(interrupts, before)
            assert taken + interrupts.take_save() == 1, f"before bytecode {before} of {bytecodes}"
            assert not interrupts.take_save()
        before += 1


def test_second_sigint_exits_at_once(tmp_path):
    run = tmp_path / "run"
    # A step of this size takes longer than the signals need, which come in the second one.
    with Training(run, *ENDLESS, "--batch_size", 1000, "--microbatch", 16, "--log_interval", 1) as training:
        training.wait_for_rows(1)
        training.signal(signal.SIGINT)
        training.wait_until(lambda: "finishing this step" in training.stderr)
        training.signal(signal.SIGINT)
        assert training.wait() == 130
    # The step was not finished: the first signal alone would have saved it.
    assert [row["step"] for row in rows(run)] == ["1"] and checkpoint.steps(str(run)) == []


def test_a_signal_in_the_middle_of_a_print_is_survived(capfd):
    reading, writing = os.pipe()
    main = threading.main_thread().ident
    received = []

    def interrupt_then_read():
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        while chunk := os.read(reading, 1 << 16):
            received.append(chunk)

    with Interrupts() as interrupts, open(writing, "w") as full_pipe:
        reader = threading.Thread(target=interrupt_then_read)
        reader.start()
        full_pipe.write("x" * 10**6)  # blocks within the buffered file until somebody reads
        full_pipe.flush()
    reader.join()
    os.close(reading)
    assert interrupts.stop == "SIGINT" and len(b"".join(received)) == 10**6
    assert "finishing this step" in capfd.readouterr().err


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stoppable_block_ends_at_once(name, code):
    # A shell starts what it runs in the background without SIGINT, nohup without SIGHUP.
    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(getattr(signal, name), default)
    reached = []
    with Stoppable() as stoppable:
        os.kill(os.getpid(), getattr(signal, name))
        reached.append("the end")
    signal.signal(getattr(signal, name), before)
    assert stoppable.exit_code == code and not reached


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
