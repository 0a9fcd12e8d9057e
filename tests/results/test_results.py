"""The workbook: equal to its CSV, with charts that show something, from runs in any state of disrepair."""

import csv
import datetime
import gc
import io
import json
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook
from openpyxl.utils import range_boundaries
from openpyxl.worksheet._writer import WorksheetWriter
from PIL import Image
from run_records import COLUMNS, evaluation, make_run, numbers, write_rows

from improved_diffusion.results.charts import (
    AUTO,
    FITTED,
    FROM_ZERO,
    Line,
    chart_data,
    draw,
    lines_of,
    plots_of,
    smooth,
)
from improved_diffusion.results.columns import DURATION, describe, title_of
from improved_diffusion.results.export import export
from improved_diffusion.results.read import Table, read_run
from improved_diffusion.run.interrupts import Interrupts, Stopped

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_results.py"


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


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
    assert [cell.value for cell in sheet[1]] == [title_of(name) for name in COLUMNS]
    for row, cells in zip(sheet.iter_rows(min_row=2, values_only=True), expected[1:]):
        for name, value, text in zip(COLUMNS, row, cells):
            if isinstance(value, datetime.timedelta):
                assert name == "elapsed" and value.total_seconds() == pytest.approx(float(text))
            else:
                assert value == (pytest.approx(float(text), rel=1e-15) if text else None), name
    (table,) = sheet.tables.values()
    assert sheet.freeze_panes == "B2" and table.ref == table.autoFilter.ref == sheet.dimensions
    assert table.column_names == [cell.value for cell in sheet[1]]
    assert {"samples (images)", "elapsed (h:mm:ss)", "images_per_sec", "step"} <= set(table.column_names)
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
    assert facts["Images per second (median)"] == 19.25 and facts["Checkpoints"] == 2
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
    assert book["Checkpoints"].column_dimensions["G"].width >= len(row[6])
    samples = book["Samples"]
    assert len(samples._images) == 1
    assert re.search(r"Step 600\nStep 300\nstep_000600.png cannot be read.$", texts_of(samples))
    rows = list(book["Arguments"].iter_rows(min_row=2, values_only=True))
    arguments = {row[0]: row[1] for row in rows}
    assert list(arguments) == sorted(arguments)
    assert arguments["--lr"] == 1e-4 and arguments["--class_cond"] == "True"
    assert arguments["--data_dir"] == "=1+1" and book["Arguments"]["B3"].data_type != "f"
    assert {flag: mark for flag, *_, mark in rows if mark} == dict.fromkeys(
        ["--class_cond", "--data_dir", "--total_steps"], "changed"
    )
    bold = [row[0].value for row in book["Arguments"].iter_rows(min_row=2) if row[0].font.bold]
    assert bold == ["--class_cond", "--data_dir", "--total_steps"]


def test_arguments_of_a_run_whose_defaults_are_not_recorded(run_dir):
    info = json.loads((run_dir / "run.json").read_text())
    del info["defaults"]
    (run_dir / "run.json").write_text(json.dumps(info))
    sheet = load_workbook(export(str(run_dir)))["Arguments"]
    assert [cell.value for cell in sheet[1]] == ["flag", "value"]
    assert not any(cell.font.bold for row in sheet.iter_rows(min_row=2) for cell in row)


def test_the_first_sheet_leads_on(run_dir):
    Image.new("RGB", (80, 60), "blue").save(run_dir / "samples" / "step_000600.png")
    (run_dir / "samples" / "step_000700.png").write_bytes(b"\x89PNG\r\n\x1a\n half a picture")
    path = export(str(run_dir))
    book = load_workbook(path)
    links = {cell.value: cell.hyperlink.location for row in book["Run"] for cell in row if cell.hyperlink}
    assert links == {name: f"'{name}'!A1" for name in book.sheetnames[1:]}
    assert book.properties.title == "Training run run"
    (picture,) = book["Run"]._images
    assert Image.open(io.BytesIO(picture._data())).convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    assert "Samples at step 600" in texts_of(book["Run"])
    extent = picture.anchor.ext
    assert extent.width / extent.height == pytest.approx(80 / 60, rel=0.01)
    with zipfile.ZipFile(path) as archive:
        drawings = [archive.read(name).decode() for name in archive.namelist() if "drawings/drawing" in name]
    described = sorted(re.findall(r'descr="([^"]*)"', " ".join(drawings)))
    texts = [f"Grid of images drawn by the model after {step} steps of training" for step in (300, 600, 600)]
    assert described == texts
    for drawing in drawings:
        numbers = re.findall(r'cNvPr [^>]*?\bid="(\d+)"', drawing)
        assert len(set(numbers)) == len(numbers) > 0


def test_the_command_can_be_copied(run_dir):
    words = ["python", "image_train.py", "--data_dir", "my pictures", "--ema_rate", "0.999,0.9999"]
    words += [part for number in range(20) for part in (f"--a_long_name_{number}", "-1")]
    info = json.loads((run_dir / "run.json").read_text())
    info["command"] = shlex.join(words)
    (run_dir / "run.json").write_text(json.dumps(info))
    command = facts_of(load_workbook(export(str(run_dir))))["Command"]
    lines = command.split("\n")
    assert len(lines) > 5 and max(map(len, lines)) <= 50  # the width of the column: nothing is broken again
    assert shlex.split(command.replace("\\\n", "")) == words
    assert not re.search(r"(--\w+) \\\n[^-]", command)


def test_columns_that_repeat_others_are_hidden(run_dir):
    rows = [[step, 8 * step, 1 / step, 2 / step, "", 1 / step, 2 / step, ""] for step in range(1, 9)]
    header = ["step", "samples", "loss", "loss_q0", "loss_q1", "mse", "mse_q0", "mse_q1"]
    write_rows(run_dir, [header, *rows])
    book = load_workbook(export(str(run_dir)))
    hidden = [letter for letter, column in book["Metrics"].column_dimensions.items() if column.hidden]
    assert hidden == ["F", "G"]
    assert "Final loss" in facts_of(book) and "Final mse" not in facts_of(book)
    explained = {row[0]: row[2] for row in book["Explained"].iter_rows(values_only=True)}
    assert "equals loss in every row" in explained["mse"] and "equals" not in explained["mse_q1"]
    rows[5][5] += 1e-9
    write_rows(run_dir, [header, *rows])
    book = load_workbook(export(str(run_dir)))
    assert not book["Metrics"].column_dimensions["F"].hidden and "Final mse" in facts_of(book)


def test_print_is_limited_to_the_last_rows(run_dir):
    write_rows(run_dir, [COLUMNS, *numbers(200)])
    book = load_workbook(export(str(run_dir)))
    for name, last in (("Metrics", 201), ("Smoothed", 202)):
        sheet = book[name]
        _, first, _, end = range_boundaries(sheet.print_area.rpartition("!")[2])
        assert (end - first + 1, end) == (60, last) and sheet.max_row == last
        assert "the last 60 of 200 rows" in sheet.oddFooter.center.text and sheet.print_title_rows


def labels(axis):
    """The labels of a linear axis, as its number format shows them."""
    count = round((axis.scaling.max - axis.scaling.min) / axis.majorUnit)
    ticks = [axis.scaling.min + number * axis.majorUnit for number in range(count + 1)]
    shown = re.fullmatch(r"#,##0(?:\.(0+))?", axis.number_format.formatCode)
    return ticks, [f"{tick:.{len(shown[1] or '')}f}" if shown else f"{tick:.12g}" for tick in ticks]


def is_round(number):
    return re.match(r"[125]\.0+e", f"{number:e}")


@given(
    low=st.floats(1e-7, 1e5),
    factor=st.floats(1.0001, 1e6),
    scale=st.sampled_from([AUTO, FROM_ZERO, FITTED]),
)
@settings(max_examples=200, deadline=None)
def test_labels_are_round_and_do_not_repeat(low, factor, scale):
    values = np.array([low, low * factor])
    steps = np.array([10.0, 20.0])
    axis = draw(Workbook().active, "", "", scale, [Line("a", "000000", 1, 2, 2, steps, values)]).y_axis
    assert axis.scaling.min <= values[0] * (1 + 1e-8) and axis.scaling.max >= values[1] * (1 - 1e-8)
    if axis.scaling.logBase:
        assert scale == AUTO and axis.scaling.logBase == 10 and axis.number_format.formatCode == "General"
        assert is_round(axis.scaling.min) and is_round(axis.scaling.max)
        return
    assert scale == FITTED or axis.scaling.min == 0
    assert is_round(axis.majorUnit)
    ticks, shown = labels(axis)
    assert 2 <= len(ticks) <= 9 and len(set(shown)) == len(shown)
    assert [float(text) for text in shown] == pytest.approx(ticks, rel=1e-9, abs=1e-9 * axis.majorUnit)


def test_the_speed_is_drawn_from_zero_without_logarithms(run_dir):
    rows = [row[:-2] + [0.5 if row[0] == 10 else 40.0] + row[-1:] for row in numbers(60)]
    write_rows(run_dir, [COLUMNS, *rows])
    charts = load_workbook(export(str(run_dir)))["Charts"]._charts
    speed = next(chart for chart in charts if chart.title.tx.rich.p[0].r[0].t == "Training speed")
    assert speed.y_axis.scaling.logBase is None and speed.y_axis.scaling.min == 0
    assert speed.y_axis.scaling.max == 40


def test_the_late_part_fills_its_chart():
    steps = np.arange(10.0, 10_010.0, 10)
    table = Table(["step", "loss"], [[int(step), 0.03 + math.exp(-step / 200)] for step in steps])
    late = next(plot for plot in plots_of(table) if "late" in plot.title)
    titles, points = chart_data(table, plots_of(table))
    (line,) = lines_of(late, titles, points, 2)
    chart = draw(Workbook().active, late.title, late.y_title, late.scale, [line], from_zero=False)
    assert line.x[0] >= 2000 and line.x[-1] == 10_000 and chart.x_axis.scaling.min == 2000
    spread = chart.y_axis.scaling.max - chart.y_axis.scaling.min
    assert line.y.max() - line.y.min() > 0.5 * spread and chart.y_axis.scaling.min > 0.02


HELD_OUT = ["heldout_loss", "heldout_sigma_0.03", "heldout_sigma_15"]


def test_held_out_loss_on_the_checkpoint_sheet(run_dir):
    losses = {100: 0.5, 200: 0.25, 300: "", 400: 0.2, 500: 0.3}
    rows = [
        [step, 8 * step, f"model{step:06d}.pt", loss, loss and 2 * loss, loss and loss / 20, "why not"]
        for step, loss in losses.items()
    ]
    header = ["step", "samples", "files", *HELD_OUT, "another program's"]
    write_rows(run_dir, [header, *rows], "checkpoints.csv")
    book = load_workbook(export(str(run_dir)))
    sheet = book["Checkpoints"]
    titles, *cells = sheet.iter_rows(max_row=6, values_only=True)
    assert titles == ("step", "samples (images)", HELD_OUT[0], "best", *HELD_OUT[1:], header[-1], "files")
    assert [row[3] for row in cells] == [None, None, None, "best", None]
    assert [row[2] for row in cells] == [0.5, 0.25, None, 0.2, 0.3] and cells[0][6] == "why not"
    assert sheet["A5"].font.bold and not sheet["A4"].font.bold
    mean, levels = sheet._charts
    assert [series.tx.v for series in mean.series] == HELD_OUT[:1]
    assert {series.tx.v for series in levels.series} == set(HELD_OUT[1:])
    assert mean.series[0].yVal.numRef.f == "'Checkpoints'!$C$2:$C$6"
    assert mean.series[0].xVal.numRef.f == "'Checkpoints'!$A$2:$A$6"
    assert levels.y_axis.scaling.logBase == 10 and mean.y_axis.scaling.min == 0.2
    assert facts_of(book)["Best held-out loss"] == 0.2 and facts_of(book)["in the checkpoint of step"] == 400
    explained = {row[0]: row[2] for row in book["Explained"].iter_rows(values_only=True)}
    assert "standard deviation of 0.03" in explained["heldout_sigma_0.03"] and "lowest" in explained["best"]


def test_checkpoints_without_held_out_loss_have_no_chart(run_dir):
    header = ["step", "heldout_loss"]
    write_rows(run_dir, [header, [10, ""], [20, "nan"]], "checkpoints.csv")
    book = load_workbook(export(str(run_dir)))
    assert not book["Checkpoints"]._charts and "Best held-out loss" not in facts_of(book)
    assert [cell.value for cell in book["Checkpoints"][1]] == header


def test_columns_of_other_programs_are_shown_as_they_are(run_dir):
    write_rows(
        run_dir, [["step", "loss", "remark", "Step", ""], [10, 0.5, "=1+1", 3, 1], [20, "what", "", 4, 2]]
    )
    book = load_workbook(export(str(run_dir)))
    sheet = book["Metrics"]
    assert [cell.value for cell in sheet[1]] == ["step", "loss", "remark", "Step (column 4)", "column 5"]
    assert [cell.value for cell in sheet[2]] == [10, 0.5, "=1+1", 3, 1] and sheet["C2"].data_type == "s"
    assert sheet.max_row == 2 and "progress.csv: 1 unreadable line was" in texts_of(book["Run"])


def test_evaluations_are_sorted_and_drawn_over_the_step(run_dir):
    few, other = "only 500 images: far too large", "something else"
    records = [
        evaluation("/a/model002000.npz", 0.4, [few]),
        evaluation("/a/ema_0.999_002000/samples_500x32x32x3.npz", 0.2, [few, other]),
        evaluation("/a/ema_0.999_001000.npz", 0.3, [few]),
        evaluation("/a/photographs", 0.0),
        evaluation("/a/model001000.npz", 0.5, [few], evaluated_at="2025-01-02T03:04:05"),
        evaluation("/a/anything.npz", 0.1, step=3000, weights="ema 0.999"),
    ]
    (run_dir / "evaluation.json").write_text(json.dumps(records))
    sheet = load_workbook(export(str(run_dir)))["Evaluation"]
    titles, *rows = sheet.iter_rows(max_row=7, values_only=True)
    names = [title.partition(" (")[0] for title in titles]
    cells = [dict(zip(names, row)) for row in rows]
    assert names[:2] == ["step", "weights"] and "warnings" not in names
    assert [(row["step"], row["weights"], row["kernel_distance"], row["notes"]) for row in cells] == [
        (1000, "ema 0.999", 0.3, "1"),
        (2000, "ema 0.999", 0.2, "1, 2"),
        (3000, "ema 0.999", 0.1, None),
        (1000, "model", 0.5, "1"),
        (2000, "model", 0.4, "1"),
        (None, None, 0.0, None),
    ]
    assert cells[3]["evaluated_at"] == datetime.datetime(2025, 1, 2, 3, 4, 5)
    text = texts_of(sheet)
    assert text.count(few) == 1 and f"1: {few}\n2: {other}" in text
    (chart,) = sheet._charts
    ranges = {series.tx.v: series.yVal.numRef.f for series in chart.series}
    column = "ABCDEFGH"[names.index("kernel_distance")]
    assert ranges == {
        "ema 0.999": f"'Evaluation'!${column}$2:${column}$4",
        "model": f"'Evaluation'!${column}$5:${column}$6",
    }


def test_evaluations_that_cannot_be_compared_share_no_line(run_dir):
    records = [evaluation(f"model00{n}000.npz", 0.1, images=n) for n in (1, 2)]
    records.append(evaluation("model001000.npz", 0.1, images=2))
    (run_dir / "evaluation.json").write_text(json.dumps(records))
    (chart,) = load_workbook(export(str(run_dir)))["Evaluation"]._charts
    assert {series.tx.v for series in chart.series} == {"model, 1 images", "model, 2 images"}


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
    assert len(book["Run"]._charts) == 2
    titles = [chart.title.tx.rich.p[0].r[0].t for chart in book["Charts"]._charts]
    assert titles == [
        *("Loss", "Loss, late part (smoothed)", "MSE by timestep quartile (smoothed)", "Gradient norm"),
        "Training speed",
    ]
    for chart in book["Run"]._charts + book["Charts"]._charts:
        is_late = chart.title.tx.rich.p[0].r[0].t == titles[1]
        assert chart.x_axis.scaling.min == (100 if is_late else 0) and chart.x_axis.scaling.max == 600
        assert chart.x_axis.delete is False and chart.y_axis.delete is False
        for series in chart.series:
            for reference in (series.xVal.numRef.f, series.yVal.numRef.f):
                sheet, cells = reference.rsplit("!", 1)
                column, first, _, last = range_boundaries(cells)
                values = [book[sheet.strip("'")].cell(row, column).value for row in range(first, last + 1)]
                assert len(values) == (49 if is_late else 60) and all(
                    isinstance(value, int | float) for value in values
                )
                header = book[sheet.strip("'")].cell(2, column).value
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
        output, named = (
            str(tmp_path / "results.ods"),
            r"results.ods: the name must end in .xlsx, for a workbook",
        )
    with pytest.raises(ValueError, match=named) as error:
        export(str(target), output)
    assert "\n" not in str(error.value)


def test_a_locked_workbook_stays_as_it_was(run_dir, monkeypatch, capsys):
    before = Path(export(str(run_dir))).read_bytes()

    replace = os.replace

    def locked(source, target):
        if str(target).endswith(".xlsx"):
            raise PermissionError(13, "The file is open in another program", source, None, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    monkeypatch.setattr(sys, "argv", ["export_results.py", str(run_dir)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "results.xlsx" in message and "close it in Excel" in message and "--output" in message
    assert message.count("\n") == 1
    assert (run_dir / "results.xlsx").read_bytes() == before and (run_dir / "index.html").exists()
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
    done = run(run_dir)
    assert done.stdout == f"wrote {run_dir / 'index.html'}\nwrote {run_dir / 'results.xlsx'}\n"
    assert done.returncode == 0
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


def test_hostile_texts_become_harmless_titles(run_dir):
    bad = "=1+1\x01<\ud800"
    records = [evaluation(f"model00{n}000.npz", n, weights=bad, features=bad, warnings=[bad]) for n in (1, 2)]
    (run_dir / "evaluation.json").write_text(json.dumps(records))
    write_rows(run_dir, [["step", "heldout_=\x02", "heldout_loss"], [10, 0.5, 0.5]], "checkpoints.csv")
    info = json.loads((run_dir / "run.json").read_text())
    info.update(command=f"python '{bad}", defaults={"lr": bad})
    (run_dir / "run.json").write_text(json.dumps(info))
    renamed = run_dir.with_name("=1+1\x01 run")
    run_dir.rename(renamed)
    book = load_workbook(export(str(renamed)))
    assert not [cell for sheet in book for row in sheet for cell in row if cell.data_type == "f"]
    (chart,) = book["Evaluation"]._charts
    assert chart.series[0].tx.v == "=1+1?<?" and book.properties.title == "Training run =1+1? run"


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_full_disk_costs_the_workbook_and_leaves_nothing(run_dir, tmp_path, monkeypatch):
    """Neither the sheets of openpyxl, nor its archive, nor the XML writer fail once more when they are closed."""
    import resource

    write_rows(run_dir, [COLUMNS, *numbers(300)])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    before = sorted(run_dir.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(str(run_dir))
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not unraisable
    assert sorted(run_dir.rglob("*")) == before and not os.listdir(tmp_path / "temporary")
