"""compare_runs.py: tables, charts, flags and images of runs in any state, and every mistake in one line."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import save_trained
from openpyxl import load_workbook
from PIL import Image

from improved_diffusion.comparison import runs, runs_job, runs_report
from improved_diffusion.comparison.picture import side_by_side
from improved_diffusion.config import ModelAndDiffusion
from improved_diffusion.jobs.runs import load_trained
from improved_diffusion.sample_util import Plan, Subject, sample_images

FAST = ("--precision", "fp32", "--num_workers", 1, "--sample_steps", 3, "--num_samples", 4)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def make_run(folder, seconds=2.0, steps=40, batch=8, heldout=(), distances=(), defaults=None, **arguments):
    """The records of a run with a row every 10 steps, `seconds` apart."""
    folder.mkdir(exist_ok=True)
    columns = ["step", "samples", "loss", "mse", "images_per_sec", "elapsed"]
    rows = [
        [step, batch * step, 0.5 + 1 / step, 0.25 + 1 / step, 4.0, seconds * step / 10]
        for step in range(10, steps + 1, 10)
    ]
    write_csv(folder / "progress.csv", [columns, *rows])
    columns = ["step", "samples", "saved_at", "elapsed", "seconds", "megabytes", "files"]
    saved = [
        [step, batch * step, "2025-01-02T03:04:05", seconds * step / 10, 0.5, 1.5, "x.pt", loss, 2 * loss]
        for step, loss in heldout
    ]
    write_csv(folder / "checkpoints.csv", [[*columns, "heldout_loss", "heldout_sigma_1"], *saved])
    arguments = {"total_steps": 40, "lr": 1e-4, "batch_size": batch, "image_size": 8, **arguments}
    (folder / "args.json").write_text(json.dumps({**arguments, "log_dir": str(folder)}))
    info = {"defaults": defaults or {"lr": 1e-4}, "data": {"source": "builtin"}, "machine": {"cores": 2}}
    (folder / "run.json").write_text(json.dumps(info))
    records = [
        {
            "features": "net.pt",
            "images": 50,
            "reference_images": 60,
            "images_path": f"/a/ema_0.99_{step:06d}.npz",
            "metrics": {"kernel_distance[net.pt]": distance},
        }
        for step, distance in distances
    ]
    if records:
        (folder / "evaluation.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def compare(call_script, tmp_path):
    def call(*arguments, check=0):
        return call_script("compare_runs.py", *FAST, "--log_dir", tmp_path / "out", *arguments, check=check)

    return call


def rows_of(sheet):
    titles, *rows = sheet.iter_rows(values_only=True)
    return [dict(zip((title.partition(" (")[0] for title in titles if title), row)) for row in rows]


def texts_of(sheet):
    return [str(cell) for row in sheet.iter_rows(values_only=True) for cell in row if cell is not None]


def titles_of(sheet):
    return [chart.title.tx.rich.p[0].r[0].t for chart in sheet._charts]


def test_everything_side_by_side(compare, tmp_path):
    a = save_trained(
        make_run(tmp_path / "a", heldout=[(20, 0.5), (40, 0.25)], distances=[(20, 0.3)]), step=40
    )
    b = save_trained(
        make_run(
            tmp_path / "b", seconds=360.0, lr=2e-4, batch=16, heldout=[(40, 0.125)], distances=[(40, 0.1)]
        ),
        step=40,
    )
    done = compare(a, b)
    book = load_workbook(tmp_path / "out" / "runs.xlsx")
    assert book.sheetnames == [
        *("Runs", "CurvesCharts", "Curves", "HeldOutCharts", "HeldOut", "EvaluationsCharts", "Evaluations"),
        *("Samples", "Flags"),
    ]
    assert all(
        list(book[name].tables) == [name] for name in ("Runs", "Curves", "HeldOut", "Evaluations", "Flags")
    )
    first, second, *_ = rows_of(book["Runs"])
    assert (first["run"], first["steps done"], first["heldout_loss"], first["best at step"]) == (
        "a",
        40,
        0.25,
        40,
    )
    assert (second["run"], second["samples"], second["hours"]) == ("b", 640, pytest.approx(0.4))

    curves = rows_of(book["Curves"])
    assert [row["run"] for row in curves] == ["a"] * 4 + ["b"] * 4
    assert [row["samples"] for row in curves] == [80, 160, 240, 320, 160, 320, 480, 640]
    assert curves[4]["hours"] == pytest.approx(0.1) and curves[4]["mse"] == pytest.approx(0.35)
    heldout = [
        (row["run"], row["step"], row["heldout_loss"], row["heldout_sigma_1"])
        for row in rows_of(book["HeldOut"])
    ]
    assert heldout == [("a", 20, 0.5, 1.0), ("a", 40, 0.25, 0.5), ("b", 40, 0.125, 0.25)]
    measured = [(row["run"], row["hours"], row["kernel_distance"]) for row in rows_of(book["Evaluations"])]
    assert measured == [("a", pytest.approx(4 / 3600), 0.3), ("b", pytest.approx(0.4), 0.1)]

    ways = ("step", "images seen", "hours")
    expected = {"Curves": ("Loss (smoothed)", "Mse (smoothed)"), "HeldOut": ("Held-out loss",)}
    expected["Evaluations"] = ("Kernel distance",)
    for name, titles in expected.items():
        charts = book[f"{name}Charts"]
        assert titles_of(charts) == [f"{title} over {way}" for title in titles for way in ways]
        for chart in charts._charts:
            assert [series.tx.v for series in chart.series] == ["a", "b"]
    # Each series draws the rows of its run, and the column of its axis.
    hours = book["HeldOutCharts"]._charts[2]
    assert [series.xVal.numRef.f for series in hours.series] == ["'HeldOut'!$D$2:$D$3", "'HeldOut'!$D$4"]
    assert [series.yVal.numRef.f for series in hours.series] == ["'HeldOut'!$E$2:$E$3", "'HeldOut'!$E$4"]
    assert hours.x_axis.scaling.max == pytest.approx(0.4)

    flags = {row["flag or fact"]: (row["a"], row["b"], row["default"]) for row in rows_of(book["Flags"])}
    assert flags == {"--lr": (1e-4, 2e-4, 1e-4), "--batch_size": (8, 16, None)}
    assert len(book["Samples"]._images) == 2
    assert str(b / "ema_0.99_000040.pt") in texts_of(book["Samples"])
    with Image.open(tmp_path / "out" / "runs.png") as picture:
        assert picture.width == 3 * 440 and picture.height > 4 * 300 + 2 * 128
    assert "unfinished" not in done.stdout.lower() and "differ" not in done.stdout


def test_each_run_draws_the_same_noise(compare, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(runs_job, "write_picture", lambda path, compared: kept.extend(compared))
    folders = [
        save_trained(make_run(tmp_path / "a")),
        save_trained(make_run(tmp_path / "b"), predict_xstart=True),
    ]
    compare(*folders, "--seed", 7)
    for one, folder in zip(kept, folders):
        trained = load_trained(str(folder), ModelAndDiffusion(), set())
        plan = Plan("sde_dpmpp_2m", 3, "karras", 1.0)
        batches = sample_images(
            trained.model, trained.diffusion, plan, Subject(8, 7), num_samples=4, batch_size=4
        )
        expected = np.concatenate(list(batches))[:, -1]
        assert np.abs(one.images.astype(int) - expected).max() <= 1
    assert (kept[0].images != kept[1].images).any()


def test_classes_are_drawn_in_turn_and_guided_where_they_can_be(compare, tmp_path):
    names = {"class_cond": True, "num_classes": 3}
    a = save_trained(make_run(tmp_path / "a"), class_names=["x", "y", "z"], class_dropout=0.1, **names)
    b = save_trained(make_run(tmp_path / "b"), class_names=["x", "y", "z"], **names)
    c = save_trained(make_run(tmp_path / "c"))
    published = {"guidance_scale": 3.0, "guidance_interval": "0.2,3", "class_dropout": 0.1}
    d = save_trained(make_run(tmp_path / "d"), class_names=["x", "y", "z"], **names, **published)
    assert "d: Drawn with --guidance_scale 3, which it was published with." in compare(a, d).stdout
    done = compare(a, b, c, "--guidance_scale", 2, "--class_label", "z,x")
    assert "b: Drawn without guidance" in done.stdout and "a: Drawn" not in done.stdout
    assert "c: --class_label z,x: it was trained without classes." in done.stdout
    assert len(load_workbook(tmp_path / "out" / "runs.xlsx")["Samples"]._images) == 3


def test_runs_in_any_state(compare, tmp_path):
    whole = save_trained(make_run(tmp_path / "whole", heldout=[(40, 0.5)]))
    young = tmp_path / "young"
    young.mkdir()
    write_csv(young / "progress.csv", [["step", "samples", "loss"]])
    larger = save_trained(make_run(tmp_path / "larger", steps=20, image_size=16), image_size=16)
    damaged = save_trained(make_run(tmp_path / "damaged"))
    for path in damaged.glob("*.pt"):
        path.write_bytes(b"nothing")
    large = save_trained(make_run(tmp_path / "super"), small_size=4, large_size=8)
    done = compare(whole, young, larger, damaged, large)
    said = done.stdout
    assert (
        "young: No rows have been logged yet" in said
        and "young: Nothing was drawn: it has no checkpoint" in said
    )
    assert "young: args.json is missing" in said
    assert "larger: Unfinished: 20 of 40 steps." in said and "all runs: The runs differ in the size" in said
    assert "damaged: Nothing was drawn: " in said and "super: Nothing was drawn: " in said
    assert said.count("No evaluation is recorded") == 5 and said.count("No held-out loss was measured") == 4
    book = load_workbook(tmp_path / "out" / "runs.xlsx")
    assert texts_of(book["Evaluations"]) == ["No evaluation is recorded (image_eval.py --run_dir)."]
    assert len(book["Samples"]._images) == 2 and texts_of(book["Samples"]).count("Nothing was drawn.") == 3
    assert "Unfinished: 20 of 40 steps." in texts_of(book["Runs"])
    assert {row["run"] for row in rows_of(book["Curves"])} == {"whole", "larger", "damaged", "super"}
    flags = {row["flag or fact"]: row for row in rows_of(book["Flags"])}
    assert flags["--image_size"]["larger"] == 16 and flags["--image_size"]["young"] == "not recorded"


def test_nothing_at_all_still_makes_a_report(compare, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "progress.csv", [["step", "loss"]])
    compare(tmp_path / "a", tmp_path / "b", "--num_samples", 0)
    book = load_workbook(tmp_path / "out" / "runs.xlsx")
    assert book.sheetnames == ["Runs", "Curves", "HeldOut", "Evaluations", "Samples", "Flags"]
    assert texts_of(book["Flags"]) == ["The runs have the same flags, data and machines."]
    assert Image.open(tmp_path / "out" / "runs.png").height > 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give the directories of the runs"),
        (["a", "absent"], "absent is not a directory"),
        (["a", "empty"], "progress.csv does not exist"),
        (["a", "a"], "a: is given twice"),
        (["a", "--class_labels", "x"], "--class_labels: there is no such flag; did you mean --class_label?"),
        (["a", "--num_samples", "101"], "--num_samples 101: must be at least 0 and at most 100"),
        (
            ["a", "--class_label", "cat"],
            "--class_label cat: no run could draw it; Nothing was drawn: 'cat': no such",
        ),
        (["a", "--image_size", "16"], None),
    ],
)
def test_mistakes_in_one_line(compare, tmp_path, monkeypatch, arguments, message):
    save_trained(make_run(tmp_path / "a"), class_cond=True, num_classes=2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    if message is None:  # it contradicts that one model; the others may be drawn
        assert "a: Nothing was drawn: --image_size 16: contradicts" in compare(*arguments).stdout
        return
    done = compare(*arguments, check=2)
    assert re.search(re.escape(message), done.stderr) and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_are_as_short_as_can_be():
    assert runs._short_names(["/x/a", "/y/b"]) == ["a", "b"]
    assert runs._short_names(["/x/a/run", "/x/b/run"]) == ["a/run", "b/run"]


def test_a_flag_that_did_not_exist_yet_is_its_default(tmp_path):
    old = make_run(tmp_path / "old")
    new = make_run(tmp_path / "new", defaults={"lr": 1e-4, "patch": 1}, patch=1)
    newer = make_run(tmp_path / "newer", defaults={"lr": 1e-4, "patch": 1}, patch=2)
    assert runs.differing_flags(runs.read_runs([str(old), str(new)])).rows == []
    (row,) = runs.differing_flags(runs.read_runs([str(old), str(newer)])).rows
    assert row == ["--patch", 1, 2, 1]


def test_more_runs_than_colours_are_told_apart(tmp_path):
    compared = runs.read_runs([str(make_run(tmp_path / f"run{number}")) for number in range(10)])
    assert len({(one.colour, one.dashed) for one in compared}) == 10
    table = runs.learning_curves(compared)
    assert [len(chart.lines) for chart in runs.curve_charts(table, compared)] == [10] * 6


def test_other_tasks_have_other_losses(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", loss_weighting="edm")]
    notes = runs.general_notes(runs.read_runs(list(map(str, folders))))
    assert any("--loss_weighting" in note and "held-out" in note for note in notes)


def test_images_of_all_sizes_have_about_the_same_place():
    for size, height in ((8, 128), (48, 96), (128, 128), (256, 128)):
        images = np.zeros((3, size, size, 3), np.uint8)
        strip = runs_report._strip(images)
        assert abs(strip.height - height) <= 2 and strip.width > 3 * strip.height - 3
    assert side_by_side(np.zeros((2, 32, 32, 3), np.uint8)).shape == (64, 130, 3)
