"""The workbook: equal to its CSV, with charts that show something, from runs in any state of disrepair."""

import csv
import datetime
import gc
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import load_workbook
from openpyxl.utils import range_boundaries
from openpyxl.worksheet._writer import WorksheetWriter
from PIL import Image

from improved_diffusion.results.charts import chart_data, plots_of, smooth
from improved_diffusion.results.columns import DURATION, describe
from improved_diffusion.results.export import export
from improved_diffusion.results.read import Table, read_run
from improved_diffusion.run.interrupts import Interrupts, Stopped

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_results.py"
QUARTILES = [f"{base}{suffix}" for base in ("loss", "mse") for suffix in ("", "_q0", "_q1", "_q2", "_q3")]
COLUMNS = ["step", "samples", *QUARTILES, "grad_norm", "param_norm", "lr", "images_per_sec", "elapsed"]


def write_rows(run_dir, rows, name="progress.csv"):
    with open(run_dir / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def numbers(count, interval=10):
    """Rows of a plausible run, in which one quartile in seven has no value."""
    rng = np.random.default_rng(0)
    for index in range(1, count + 1):
        step = index * interval
        losses = (0.03 + np.exp(-step / 100) * rng.uniform(0.8, 1.2, len(QUARTILES))).tolist()
        cells = [
            value if index % 7 or not name.endswith("q3") else "" for name, value in zip(QUARTILES, losses)
        ]
        yield [step, 8 * step, *cells, 0.1 + 1 / step, 100.5, 1e-4, 19.25, 0.5 * step]


@pytest.fixture
def run_dir(tmp_path):
    """A complete run directory: 60 rows, two checkpoints, a preview."""
    path = tmp_path / "run"
    (path / "samples").mkdir(parents=True)
    write_rows(path, [COLUMNS, *numbers(60)])
    checkpoints = [
        ["step", "samples", "saved_at", "elapsed", "seconds", "megabytes", "files"],
        [300, 2400, "2025-01-02T03:04:05+01:00", 150.0, 0.5, 120.25, "model000300.pt opt000300.pt"],
        [600, 4800, "2025-01-02T04:04:05+01:00", 300.0, 0.5, 120.25, "model000600.pt opt000600.pt"],
    ]
    write_rows(path, checkpoints, "checkpoints.csv")
    arguments = {
        "total_steps": 1200,
        "lr": 1e-4,
        "diffusion_steps": 1000,
        "data_dir": "=1+1",
        "class_cond": True,
    }
    (path / "args.json").write_text(json.dumps(arguments))
    info = {
        "data": {"source": "/data/cifar_train", "images": 50000, "classes": {"cat": 25000, "dog": 25000}},
        "machine": {"processor": "Some CPU", "cores": 4, "threads": 2, "memory_gb": 7.5, "python": "3.12"},
        "model": {"parameters": 1234567},
        "started": "2025-01-02T02:00:00",
        "sessions": [
            {"started": "2025-01-02T02:00:00", "step": 0},
            {"started": "2025-01-02T03:30:00", "step": 300},
        ],
        "command": "python image_train.py",
    }
    (path / "run.json").write_text(json.dumps(info))
    Image.new("RGB", (80, 60), "red").save(path / "samples" / "step_000300.png")
    return path


def facts_of(book):
    """Label -> value of the first sheet."""
    return {row[1]: row[2] for row in book["Run"].iter_rows(values_only=True) if len(row) > 2}


def texts_of(sheet):
    return "\n".join(
        str(cell) for row in sheet.iter_rows(values_only=True) for cell in row if cell is not None
    )


def test_metrics_equal_the_csv_cell_by_cell(run_dir):
    sheet = load_workbook(export(str(run_dir)))["Metrics"]
    with open(run_dir / "progress.csv", newline="") as file:
        expected = list(csv.reader(file))
    assert sheet.max_row == len(expected) and sheet.max_column == len(COLUMNS)
    assert [cell.value for cell in sheet[1]] == expected[0]
    for row, cells in zip(sheet.iter_rows(min_row=2, values_only=True), expected[1:]):
        for name, value, text in zip(COLUMNS, row, cells):
            if isinstance(value, datetime.timedelta):
                assert name == "elapsed" and value.total_seconds() == pytest.approx(float(text))
            else:
                assert value == (pytest.approx(float(text), rel=1e-15) if text else None), name
    assert sheet.freeze_panes == "B2" and sheet.auto_filter.ref == sheet.dimensions
    formats = {name: cell.number_format for name, cell in zip(COLUMNS, sheet[2])}
    assert (formats["step"], formats["elapsed"]) == ("#,##0", DURATION) and "0.00000" in formats["loss"]


def test_sheets_and_the_run_at_a_glance(run_dir):
    book = load_workbook(export(str(run_dir)))
    assert book.sheetnames == [
        *("Run", "Metrics", "Charts", "Checkpoints", "Samples", "Arguments", "Explained", "Smoothed"),
    ]
    facts = facts_of(book)
    rows = np.array([row[2] for row in numbers(60)])
    assert facts["Steps done"] == 600 and facts["Steps planned"] == 1200 and facts["Finished"] == 0.5
    assert facts["Images seen"] == 4800
    assert facts["Training time"] == datetime.timedelta(seconds=300)
    assert facts["Final loss"] == pytest.approx(rows[-6:].mean())
    assert facts["Final values are"] == "means of the last 6 rows, steps 550 to 600"
    assert facts["Best smoothed loss"] == pytest.approx(facts["Final loss"], rel=0.1)
    assert facts["Images per second"] == 19.25 and facts["Checkpoints"] == 2
    assert facts["Source"] == "/data/cifar_train" and facts["Classes"] == "2: cat 25,000, dog 25,000"
    assert facts["Parameters"] == 1234567 and facts["Learning rate"] == 1e-4
    assert facts["Processor"] == "Some CPU" and facts["Cores"] == "4 cores, 2 threads used"
    assert facts["Started"] == datetime.datetime(2025, 1, 2, 2)
    assert facts["Sessions"] == "2, resumed at step 300"
    assert facts["System"] == "not recorded"
    assert "BUILT-IN" not in texts_of(book["Run"])


def test_built_in_images_cannot_be_missed(run_dir):
    info = json.loads((run_dir / "run.json").read_text())
    info["data"]["source"] = "builtin"
    (run_dir / "run.json").write_text(json.dumps(info))
    sheet = load_workbook(export(str(run_dir)))["Run"]
    assert sheet["B4"].value.startswith("BUILT-IN IMAGES") and sheet["B4"].font.bold


def test_checkpoints_samples_and_arguments(run_dir):
    (run_dir / "samples" / "step_000600.png").write_bytes(b"\x89PNG\r\n\x1a\n half a picture")
    book = load_workbook(export(str(run_dir)))
    row = [cell.value for cell in book["Checkpoints"][2]]
    assert row[:3] == [300, 2400, datetime.datetime(2025, 1, 2, 3, 4, 5)]
    assert row[6] == "model000300.pt opt000300.pt"
    samples = book["Samples"]
    assert len(samples._images) == 1
    assert re.search(r"Step 600\nStep 300\nstep_000600.png cannot be read.$", texts_of(samples))
    arguments = {row[0]: row[1] for row in book["Arguments"].iter_rows(min_row=2, values_only=True)}
    assert list(arguments) == sorted(arguments)
    assert arguments["--lr"] == 1e-4 and arguments["--class_cond"] == "True"
    assert arguments["--data_dir"] == "=1+1" and book["Arguments"]["B3"].data_type != "f"


def test_every_column_is_explained(run_dir):
    sheet = load_workbook(export(str(run_dir)))["Explained"]
    explained = {row[0]: row[2] for row in sheet.iter_rows(min_row=2, values_only=True)}
    assert explained.keys() >= set(COLUMNS) | {"saved_at", "seconds", "megabytes", "files"}
    assert all(len(text) > 20 and "Not a column" not in text for text in explained.values())
    assert "t = 250 to 499 of 1,000" in explained["mse_q1"]


def test_quartiles_name_all_timesteps_once():
    ranges = [re.findall(r"t = (\d+) to (\d+)", describe(f"mse_q{q}", 10).meaning)[0] for q in range(4)]
    timesteps = [t for first, last in ranges for t in range(int(first), int(last) + 1)]
    assert timesteps == list(range(10))
    assert [4 * int(first) // 10 for first, _ in ranges] == [0, 1, 2, 3]


def test_charts_draw_numbers_up_to_the_last_step(run_dir):
    book = load_workbook(export(str(run_dir)))
    assert len(book["Run"]._charts) == 1
    titles = [chart.title.tx.rich.p[0].r[0].t for chart in book["Charts"]._charts]
    assert titles == ["Loss", "MSE by timestep quartile (smoothed)", "Gradient norm", "Training speed"]
    for chart in book["Run"]._charts + book["Charts"]._charts:
        assert chart.x_axis.scaling.min == 0 and chart.x_axis.scaling.max == 600
        assert chart.x_axis.delete is False and chart.y_axis.delete is False
        for series in chart.series:
            for reference in (series.xVal.numRef.f, series.yVal.numRef.f):
                sheet, cells = reference.rsplit("!", 1)
                column, first, _, last = range_boundaries(cells)
                values = [book[sheet.strip("'")].cell(row, column).value for row in range(first, last + 1)]
                assert len(values) == 60 and all(isinstance(value, int | float) for value in values)
                header = book[sheet.strip("'")].cell(first - 1, column).value
            assert header == series.tx.v


def test_a_smoothed_curve_is_in_front_of_the_raw_one(run_dir):
    chart = load_workbook(export(str(run_dir)))["Run"]._charts[0]
    front = max(chart.series, key=lambda series: series.order)
    assert front.tx.v == "loss (smoothed)"


def test_smoothing_is_a_mean_that_leaves_gaps_and_diverged_rows_out():
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 4), 3.0)
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line, 4)[:95], line[:95])  # a centred mean keeps a straight line
    values = np.full(60, 2.0)
    values[[20, 21, 22]] = math.nan, math.inf, 1e30
    smoothed = smooth(values, 3)
    np.testing.assert_allclose(np.delete(smoothed, range(19, 26)), 2.0)
    assert np.isnan(smooth(np.full(5, math.nan), 2)).all()


def test_long_runs_are_thinned_for_the_charts_only():
    table = Table(["step", "loss"], [[10 * index, 1.0] for index in range(1, 5001)])
    titles, points = chart_data(table, plots_of(table))
    assert titles == ["step", "loss", "loss (smoothed)"]
    assert len(points) == 1500 and points[0, 0] == 10 and points[-1, 0] == 50_000


def test_broken_rows_are_left_out_and_counted(run_dir):
    good = "\n".join(["step,loss,lr", "10,0.5,0.0001", "20,nan,", "30,inf,-inf"])
    bad = "40,0.5\n50,0.5,0.1,7\nx,1,1\n,1,1\nnan,1,1\n60,what,1\n\0\0\n70,0.5,0.0"
    (run_dir / "progress.csv").write_text(f"{good}\n{bad}")
    book = load_workbook(export(str(run_dir)))
    rows = [[cell.value for cell in row] for row in book["Metrics"].iter_rows(min_row=2)]
    assert rows == [[10, 0.5, 0.0001], [20, "NaN", None], [30, "inf", "-inf"]]
    assert "progress.csv: 7 unreadable lines were left out." in texts_of(book["Run"])


@pytest.mark.parametrize("content", ["", "step,loss\n", "step,loss\n10,nan\n"])
def test_a_run_without_numbers_has_no_charts(run_dir, content):
    (run_dir / "progress.csv").write_text(content)
    book = load_workbook(export(str(run_dir)))
    assert not book["Run"]._charts and not book["Charts"]._charts
    assert "No numbers have been logged yet." in texts_of(book["Charts"])
    if "10" not in content:
        assert "No rows have been logged yet." in texts_of(book["Run"])


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"data": 3, "sessions": 4, "machine": []}'])
def test_missing_or_strange_companions_are_noted(tmp_path, content):
    write_rows(tmp_path, [COLUMNS, *numbers(3)])
    for name in ("run.json", "args.json"):
        if content is not None:
            (tmp_path / name).write_text(content)
    book = load_workbook(export(str(tmp_path)))
    text = texts_of(book["Run"])
    assert "checkpoints.csv is missing" in text
    assert ("run.json is missing" in text) == (content is None)
    assert ("args.json cannot be read" in text) == (content in ("{", "[1]"))
    assert facts_of(book)["Source"] == "not recorded"
    assert texts_of(book["Checkpoints"]) == "No checkpoint has been saved yet."


@pytest.mark.parametrize("mistake", ["missing", "file", "no csv", "other csv", "name"])
def test_mistakes_are_one_clear_line(tmp_path, mistake):
    target, output = tmp_path, None
    if mistake == "missing":
        target, named = tmp_path / "nowhere", "nowhere is not a directory"
    elif mistake == "file":
        target, named = tmp_path / "file", "file is not a directory"
        target.write_text("")
    elif mistake == "no csv":
        named = "progress.csv does not exist"
    elif mistake == "other csv":
        (tmp_path / "progress.csv").write_text("name,age\nme,3\n")
        named = "progress.csv is not the progress of a run"
    else:
        write_rows(tmp_path, [COLUMNS])
        output, named = str(tmp_path / "results.ods"), r"--output .*results.ods"
    with pytest.raises(ValueError, match=named) as error:
        export(str(target), output)
    assert "\n" not in str(error.value)


def test_a_locked_workbook_stays_as_it_was(run_dir, monkeypatch, capsys):
    before = Path(export(str(run_dir))).read_bytes()

    def locked(source, target):
        raise PermissionError(13, "The file is open in another program", source, None, target)

    monkeypatch.setattr(os, "replace", locked)
    monkeypatch.setattr(sys, "argv", ["export_results.py", str(run_dir)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "results.xlsx" in message and "close it in Excel" in message and "--output" in message
    assert message.count("\n") == 1
    assert (run_dir / "results.xlsx").read_bytes() == before
    assert not [name for name in os.listdir(run_dir) if name.startswith(".tmp")]


def test_script(run_dir, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
        )

    done = run(run_dir, "--output", "mine.xlsx")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'mine.xlsx'}\n" and not done.stderr
    assert facts_of(load_workbook(tmp_path / "mine.xlsx"))["Steps done"] == 600
    assert not (run_dir / "results.xlsx").exists()
    mistakes = [
        ([tmp_path / "nowhere"], "nowhere is not a directory"),
        ([run_dir, "--output", "no/such/folder/a.xlsx"], "another file with --output"),
    ]
    for arguments, message in mistakes:
        failed = run(*arguments)
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and message in failed.stderr


CELLS = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=8),
    st.sampled_from(["", "10", "0.5", "1e308", "5e-324", "=A1", '"', "1_0"]),
)
HEADERS = st.permutations(["step", "loss", "mse_q0", "grad_norm", "=x", "\x01"])


@given(
    header=HEADERS,
    rows=st.lists(st.lists(CELLS, min_size=5, max_size=7).map(",".join), max_size=6),
    garbage=st.binary(max_size=20),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_progress_file_is_too_broken(tmp_path, header, rows, garbage):
    lines = [",".join(header), "10,0.5,0.5,0.5,0.5,0.5", *rows]
    content = "\n".join(lines).encode("utf-8", "replace") + garbage
    (tmp_path / "progress.csv").write_bytes(content)
    book = load_workbook(export(str(tmp_path)))
    readable = len(read_run(str(tmp_path)).metrics.rows)
    assert book["Metrics"].max_row == readable + 1


@given(content=st.binary(max_size=60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_progress_file_is_a_value_error(tmp_path, content):
    (tmp_path / "progress.csv").write_bytes(b"loss\n" + content)
    with pytest.raises(ValueError, match="progress"):
        export(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="a signal would end the process")
def test_a_broken_off_export_leaves_the_old_workbook(tmp_path, monkeypatch, capfd):
    write_rows(tmp_path, [COLUMNS, *numbers(200)])
    (tmp_path / "results.xlsx").write_text("the old one")
    write_row = WorksheetWriter.write_row

    def stopped_at_row_50(self, element, row, number):
        if number == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        write_row(self, element, row, number)

    monkeypatch.setattr(WorksheetWriter, "write_row", stopped_at_row_50)
    with Interrupts() as interrupts, pytest.raises(Stopped), interrupts.abandoning():
        export(str(tmp_path))
    assert (tmp_path / "results.xlsx").read_text() == "the old one"
    assert {path.name for path in tmp_path.iterdir()} == {"progress.csv", "results.xlsx"}
    gc.collect()
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception ignored" not in said
