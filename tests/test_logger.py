"""Logs: fixed columns, exact numbers, and histories that survive crashes, resumes and full disks."""

import csv
import json
import math
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion import logger

COLUMNS = ["step", "loss", "lr"]


@pytest.fixture(autouse=True)
def unconfigured():
    yield
    logger.close()


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log_steps(run_dir, steps, **options):
    logger.configure(str(run_dir), columns=COLUMNS, **options)
    for step in steps:
        logger.logkv("step", step)
        logger.logkv("loss", 1 / step)
        logger.dumpkvs()
    logger.close()


def test_columns_keep_their_order_whatever_is_logged_first(tmp_path):
    logger.configure(str(tmp_path / "new" / "run"), columns=COLUMNS)
    logger.logkv("lr", 1e-4)
    logger.logkv("step", 1)
    logger.dumpkvs()
    text = (tmp_path / "new" / "run" / "progress.csv").read_text()
    assert text == "step,loss,lr\n1,,0.0001\n"
    assert logger.get_dir() == str(tmp_path / "new" / "run")


def test_csv_and_json_lines_hold_the_same_exact_numbers(tmp_path):
    values = [0.1 + 0.2, 1e-300, np.float32(0.1), np.int64(7), math.nan, -math.inf]
    logger.configure(str(tmp_path), columns=COLUMNS)
    for step, value in enumerate(values):
        logger.logkv("step", step)
        logger.logkv("loss", value)
        logger.dumpkvs()
    in_csv = [float(row["loss"]) for row in rows_of(tmp_path / "progress.csv")]
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    in_json = [float(json.loads(line)["loss"]) for line in lines]
    np.testing.assert_array_equal(in_csv, np.array(values, dtype=np.float64))
    np.testing.assert_array_equal(in_json, in_csv)
    assert not any("NaN" in line or "Infinity" in line for line in lines)  # strict JSON has neither
    assert list(json.loads(lines[0])) == COLUMNS and json.loads(lines[0])["lr"] is None


def test_means_are_weighted_and_begin_anew_after_each_row():
    logger.logkv_mean("loss", 1.0, weight=3)
    logger.logkv_mean("loss", 5.0)
    logger.logkv_mean("mse", 9.0, weight=0)
    assert logger.getkvs() == {"loss": 2.0}
    assert logger.dumpkvs() == {"loss": 2.0}
    logger.logkv_mean("loss", 4.0)
    assert logger.dumpkvs() == {"loss": 4.0}


def test_unknown_key_is_refused(tmp_path):
    logger.configure(str(tmp_path), columns=COLUMNS)
    logger.logkv("los", 1.0)
    with pytest.raises(AssertionError, match="los"):
        logger.dumpkvs()


@given(
    values=st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 64)), min_size=1, max_size=20),
    cut=st.integers(0, 20),
)
@settings(max_examples=50, deadline=None)
def test_state_continues_an_interval_to_the_last_bit(values, cut):
    logger.close()
    logger.logkv("lr", 1e-4)
    for value, weight in values:
        logger.logkv_mean("loss", value, weight)
    expected = logger.dumpkvs()

    logger.logkv("lr", 1e-4)
    for value, weight in values[:cut]:
        logger.logkv_mean("loss", value, weight)
    saved = json.loads(json.dumps(logger.state()))
    logger.close()
    assert logger.getkvs() == {}
    logger.load_state(saved)
    for value, weight in values[cut:]:
        logger.logkv_mean("loss", value, weight)
    assert logger.dumpkvs() == expected


def test_configuring_again_appends(tmp_path):
    log_steps(tmp_path, [1, 2])
    log_steps(tmp_path, [3])
    assert [row["step"] for row in rows_of(tmp_path / "progress.csv")] == ["1", "2", "3"]
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3


def test_keep_until_drops_what_a_resumed_run_repeats(tmp_path):
    log_steps(tmp_path, [10, 20, 30])
    log_steps(tmp_path, [20, 30, 40], keep_until=10)
    assert [row["step"] for row in rows_of(tmp_path / "progress.csv")] == ["10", "20", "30", "40"]
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]


def test_keep_until_drops_broken_lines(tmp_path):
    (tmp_path / "progress.csv").write_bytes(b"step,loss,lr\n1,2,3\n\0\0\0\n2,2\nx,2,3\n\n3,1,1\n9,1,1\n4,1")
    (tmp_path / "progress.jsonl").write_bytes(b'{"step": 1}\n[]\n{"st\nnull\n{"step": 9}\n{"step": 2')
    logger.configure(str(tmp_path), columns=COLUMNS, keep_until=5)
    assert (tmp_path / "progress.csv").read_text() == "step,loss,lr\n1,2,3\n3,1,1\n"
    assert (tmp_path / "progress.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("torn", ["4", "4,0.2", "4,0.25,0.1"])
def test_torn_last_line_is_not_glued_to_the_next(tmp_path, torn):
    log_steps(tmp_path, [1, 2])
    for name in ("progress.csv", "progress.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write(torn)
    log_steps(tmp_path, [4])
    assert [row["step"] for row in rows_of(tmp_path / "progress.csv")] == ["1", "2", "4"]
    lines = (tmp_path / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]


def test_new_columns_are_added_and_old_rows_keep_their_values(tmp_path):
    log_steps(tmp_path, [1])
    table = logger.CsvTable(str(tmp_path / "progress.csv"), ["step", "vb", "loss"])
    table.append({"step": 2, "vb": 0.5})
    table.close()
    assert table.columns == ["step", "vb", "loss", "lr"]
    assert (tmp_path / "progress.csv").read_text() == "step,vb,loss,lr\n1,,1.0,\n2,0.5,,\n"


def test_table_keeps_text_with_commas_and_quotes(tmp_path):
    path = tmp_path / "checkpoints.csv"
    table = logger.CsvTable(str(path), ["step", "files"])
    table.append({"step": 5, "files": 'model.pt, "ema".pt'})
    table.keep_until(5)
    table.append({"step": 6, "files": None})
    table.close()
    assert [row["files"] for row in rows_of(path)] == ['model.pt, "ema".pt', ""]


def test_full_disk_leaves_no_torn_line_and_loses_no_row(tmp_path):
    class FullDisk:
        """A file that takes only half of what it is given."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    logger.configure(str(tmp_path), columns=COLUMNS)
    table = logger._run.table
    healthy = table._file
    table._file = FullDisk(healthy)
    logger.logkv("step", 1)
    with pytest.raises(OSError, match=r"(?i)space"):
        logger.dumpkvs()
    assert (tmp_path / "progress.csv").read_text() == "step,loss,lr\n"
    table._file = healthy
    logger.dumpkvs()
    assert (tmp_path / "progress.csv").read_text() == "step,loss,lr\n1,,\n"


def test_log_goes_to_the_terminal_and_with_the_time_to_log_txt(tmp_path, capsys):
    logger.log("before", 1)
    logger.configure(str(tmp_path))
    logger.log("alpha", 2)
    logger.close()
    logger.configure(str(tmp_path), keep_until=0)
    logger.log("β")
    logger.close()
    logger.log("after")
    assert capsys.readouterr().out == "before 1\nalpha 2\nβ\nafter\n"
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["alpha 2", "β"]
    assert not (tmp_path / "progress.csv").exists()


@pytest.mark.parametrize("name", [".", "below"])
def test_directory_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ValueError, match=r"file.*: cannot write") as error:
        logger.configure(str(tmp_path / "file" / name), columns=COLUMNS)
    assert "\n" not in str(error.value)
    assert logger.get_dir() is None


def test_remote_directory_is_refused():
    with pytest.raises(ValueError, match="gs://bucket/run: .*local directory"):
        logger.configure("gs://bucket/run")


def test_tensorboard_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'pip install "improved_diffusion\[tensorboard\]"'):
        logger.configure(str(tmp_path), columns=COLUMNS, tensorboard=True)


def test_tensorboard_gets_every_number_at_its_step(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, dir, purge_step):
            calls.append((dir, purge_step))

        def add_scalar(self, key, value, step):
            calls.append((key, value, step))

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(
        Writer,
        "add_image",
        lambda self, key, pixels, step, dataformats: calls.append(
            (key, pixels.shape, pixels[0, 0].tolist(), step, dataformats)
        ),
        raising=False,
    )
    log_steps(tmp_path, [4], keep_until=3, tensorboard=True)
    logger.configure(str(tmp_path), columns=COLUMNS, keep_until=4, tensorboard=True)
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "a.png")
    logger.log_picture("samples", str(tmp_path / "a.png"), 4)
    assert calls == [
        (str(tmp_path), 4),
        ("loss", 0.25, 4),
        (str(tmp_path), 5),
        ("samples", (2, 3, 3), [10, 20, 30], 4, "HWC"),
    ]
    logger.close()
    logger.log_picture("samples", str(tmp_path / "absent.png"), 5)  # no TensorBoard, nothing to do
