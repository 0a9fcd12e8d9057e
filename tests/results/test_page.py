"""The page of a run: complete without a network, readable at any width, harmless whatever the run's files hold."""

import base64
import io
import json
import os
import re
import shlex
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from run_records import evaluation, make_run, write_rows

from improved_diffusion.results import page
from improved_diffusion.results.axes import AUTO, FITTED, FROM_ZERO, fit_values, fit_way
from improved_diffusion.results.charts import Line
from improved_diffusion.results.columns import COUNT, DURATION, GENERAL, REAL, SCIENTIFIC, SHORT_REAL
from improved_diffusion.results.export import export, export_all
from improved_diffusion.results.figures import Dot, Text, chart, to_picture, to_svg
from improved_diffusion.results.figures import Path as Stroke
from improved_diffusion.run.interrupts import Interrupts, Stopped

HOSTILE = """</title><script>alert(1)</script>"'&<img src=x onerror=alert(1)>\x01\u202e"""
MODULE = ["-m", "improved_diffusion"]
VOID = {"meta", "input", "img", "br"}


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")


class Reader(HTMLParser):
    """The elements of a page, and the text in each."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.errors = [], [], [], []
        self.feed(text)
        assert not self.open and not self.errors, (self.open, self.errors)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(run_dir):
    return Reader(Path(export(str(run_dir), str(Path(run_dir) / "index.html"))).read_text(encoding="utf-8"))


def add_preview(run_dir, step, colour="blue", size=(80, 60)):
    Image.new("RGB", size, colour).save(run_dir / "samples" / f"step_{step:06d}.png")


def test_everything_is_in_one_file(run_dir):
    add_preview(run_dir, 600)
    rows = [
        ["step", "samples", "elapsed", "heldout_loss", "heldout_sigma_1"],
        [300, 1, 1, 0.5, 0.4],
        [600, 2, 2, 0.25, 0.2],
    ]
    write_rows(run_dir, rows, "checkpoints.csv")
    (run_dir / "evaluation.json").write_text(json.dumps([evaluation("model000600.npz", 0.5)]))
    (run_dir / "model000600.pt").touch()
    (run_dir / "opt000600.pt").touch()
    read = read_page(run_dir)
    labels = [svg["aria-label"] for svg in read.all("svg")]
    assert labels == [
        f"{title}, over the step"
        for title in (
            *("Loss", "Loss, late part (smoothed)", "MSE by timestep quartile (smoothed)", "Gradient norm"),
            *("Training speed", "Held-out loss", "Held-out loss by noise level", "Kernel distance"),
        )
    ]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))))
        for image in read.all("img")
    ]
    assert [picture.convert("RGB").getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 0, 255)]
    (slider,) = read.all("input")
    assert slider["max"] == slider["value"] == "1"
    assert ["hidden" in figure for figure in read.all("figure")] == [
        True,
        False,
    ]  # the newest, also without scripts
    assert "600 of 1,200 steps" in read.text and read.all("progress")[0]["value"] == "600"
    assert "Some CPU" in read.text and "2: cat 25,000, dog 25,000" in read.text and "Held-out" in read.text
    assert "3 of 5 flags differ from their defaults. flag value default --class_cond True False" in read.text
    assert "Best held-out loss 0.25000" in read.text and "Training time 0:05:00" in read.text
    assert f"python image_train.py --log_dir {run_dir}" in read.text
    assert f"python image_sample.py --model_path {run_dir}" in read.text
    # Nothing is fetched from anywhere.
    for tag, attributes in read.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    (style,) = re.findall("<style>(.*?)</style>", (run_dir / "index.html").read_text("utf-8"), re.DOTALL)
    assert "url(" not in style and "@import" not in style


def test_a_run_in_any_state_has_a_page(tmp_path):
    write_rows(tmp_path, [["step", "loss"]])
    read = read_page(tmp_path)
    assert "No rows have been logged yet." in read.text and "No numbers have been logged yet." in read.text
    assert "args.json is missing" in read.text and "There is no checkpoint here" in read.text
    assert "The arguments of this run are not known." in read.text
    (tmp_path / "progress.csv").write_text("step,loss,lr\n10,nan,\n20,inf,1\n30,1e300,1\n40,-5,x\n")
    (tmp_path / "args.json").write_text('{"total_steps": "many", "hours": [1], "log_dir": 5}')
    (tmp_path / "run.json").write_text('{"command": "python \'x", "machine": {"cores": {}}}')
    (tmp_path / "opt000040.pt").touch()
    assert "python -m improved_diffusion train --log_dir" in read_page(tmp_path).text


@pytest.mark.parametrize(
    "arguments, command, expected",
    [
        ({"total_steps": 600}, "python a/image_train.py --x", ["a/image_train.py", "--total_steps", "1200"]),
        ({"total_steps": 600, "hours": 0.75}, None, [*MODULE, "train", "--hours", "1.5"]),
        ({"total_steps": 601}, "python image_train.py", ["image_train.py"]),
        ({"total_steps": 601, "large_size": 8}, "python super_res_train.py", ["super_res_train.py"]),
        ({"total_steps": 601, "large_size": 8}, "improved_diffusion.train()", [*MODULE, "super_res_train"]),
        ({"total_steps": 601}, "python -m improved_diffusion train --lr 1", [*MODULE, "train"]),
        ({"total_steps": 601, "log_dir": "gs://b/run"}, "python evil.sh", [*MODULE, "train"]),
    ],
)
def test_the_command_that_goes_on(run_dir, arguments, command, expected):
    (run_dir / "args.json").write_text(json.dumps(arguments))
    info = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**info, "command": command}))
    (run_dir / "opt000600.pt").touch()
    where = arguments.get("log_dir", str(run_dir))
    more = len(expected) - 2 if expected[-2:-1] in (["--hours"], ["--total_steps"]) else len(expected)
    line = shlex.join(["python", *expected[:more], "--log_dir", where, *expected[more:]])
    assert line in read_page(run_dir).text


def test_what_comes_from_outside_stays_text(run_dir):
    info = json.loads((run_dir / "run.json").read_text())
    info.update(
        command=f"python '{HOSTILE}",
        data={"source": HOSTILE, "classes": {HOSTILE: 5}},
        machine={"processor": HOSTILE, "os": HOSTILE},
        defaults={"lr": HOSTILE},
    )
    (run_dir / "run.json").write_text(json.dumps(info))
    (run_dir / "args.json").write_text(json.dumps({"lr": HOSTILE, HOSTILE: [HOSTILE], "log_dir": HOSTILE}))
    records = [evaluation(f"model00{n}000.npz", n, weights=HOSTILE, features=HOSTILE) for n in (1, 2)]
    (run_dir / "evaluation.json").write_text(json.dumps(records))
    write_rows(run_dir, [["step", f"heldout_{HOSTILE[:30]}"], [10, 0.5], [20, 0.4]], "checkpoints.csv")
    renamed = run_dir.with_name("a'\"&<b>")
    run_dir.rename(renamed)
    read = read_page(renamed)
    assert len(read.all("script")) == 1 and not read.all("img")[0].get("onerror")
    assert len(read.all("title")) == 1 and "alert(1)" in read.text
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "\x01" not in (renamed / "index.html").read_text("utf-8")


def test_pictures_are_few_and_whole(run_dir, monkeypatch):
    for step in range(1, 101):
        add_preview(run_dir, step)
    (run_dir / "samples" / "step_000100.png").write_bytes(b"\x89PNG\r\n\x1a\n half a picture")
    read = read_page(run_dir)
    assert len(read.all("img")) == page.MAX_PICTURES
    steps = [int(step) for step in re.findall(r"Step (\d+)", read.text)]
    assert steps[0] == 1 and steps[-1] == 300 and steps == sorted(steps) and 100 not in steps
    assert "40 of 101 pictures are shown" in read.text
    # By size: as many as fit, or none.
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for step in range(1, 101):
        Image.fromarray(noise).save(run_dir / "samples" / f"step_{step:06d}.png")
    one = (run_dir / "samples" / "step_000001.png").stat().st_size
    monkeypatch.setattr(page, "PICTURE_BYTES", 4 * one)
    assert 2 <= len(read_page(run_dir).all("img")) <= 5
    monkeypatch.setattr(page, "PICTURE_BYTES", 10)
    read = read_page(run_dir)
    assert not read.all("img") and not read.all("input") and "0 of 101 pictures are shown" in read.text


def test_one_report_that_cannot_be_written_does_not_cost_the_other(run_dir, monkeypatch):
    (run_dir / "index.html").mkdir()
    written, ((what, error),) = export_all(str(run_dir))
    assert written == [str(run_dir / "results.xlsx")] and what == "page" and "index.html" in str(error)
    (run_dir / "index.html").rmdir()
    (run_dir / "results.xlsx").unlink()
    (run_dir / "results.xlsx").mkdir()
    written, ((what, error),) = export_all(str(run_dir))
    assert written == [str(run_dir / "index.html")] and what == "workbook" and "results.xlsx" in str(error)
    assert not [name for name in os.listdir(run_dir) if name.startswith(".tmp")]


@pytest.mark.skipif(os.name != "posix", reason="a signal would end the process")
def test_a_broken_off_page_leaves_the_old_one(run_dir, monkeypatch):
    (run_dir / "index.html").write_text("the old one")
    monkeypatch.setattr(page, "_facts", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with Interrupts() as interrupts, pytest.raises(Stopped), interrupts.abandoning():
        export_all(str(run_dir))
    assert (run_dir / "index.html").read_text() == "the old one" and not (run_dir / "results.xlsx").exists()


def test_numbers_are_shown_as_in_the_workbook():
    shown = [
        (1234567, COUNT),
        (0.25, REAL),
        (1e25, REAL),
        (1e-4, SCIENTIFIC),
        (1234.5, SHORT_REAL),
        (3725, DURATION),
    ]
    texts = ["1,234,567", "0.25000", "1.00e+25", "1.00e-04", "1,234.50", "1:02:05"]
    assert [page.as_text(*pair) for pair in shown] == texts
    assert page.as_text(0.5, "0.0%") == "50.0%" and page.as_text(float("nan"), COUNT) == "nan"
    assert page.as_text("0.9999", GENERAL) == "0.9999" and page.as_text(3, GENERAL) == "3"


def line(x, y, title="a", **more):
    return Line(title, "1F4E79", 1, 2, 2, np.array(x, float), np.array(y, float), **more)


def test_a_chart_puts_points_where_its_axes_say():
    shapes = chart("T", "loss", FITTED, [line([0, 50, 100], [1.0, 2.0, 3.0])])
    curve = next(shape for shape in shapes if isinstance(shape, Stroke) and shape.colour == "1F4E79")
    texts = {shape.text: shape for shape in shapes if isinstance(shape, Text)}
    for (x, y), (step, loss) in zip(curve.points, (("0", "1.0"), (None, "2.0"), ("100", "3.0"))):
        assert y == pytest.approx(texts[loss].y - 4)
        assert step is None or x == pytest.approx(texts[step].x)
    svg = to_svg(shapes, (440, 300), "T & more")
    assert "T &amp; more" in svg and svg.count("<polyline") == sum(isinstance(s, Stroke) for s in shapes)
    picture = np.asarray(to_picture(shapes, (440, 300)))
    x, y = curve.points[1].round().astype(int)
    assert picture.shape == (300, 440, 3) and (picture[y, x] < 120).any() and (picture[1, 1] == 255).all()


def test_a_chart_leaves_out_what_has_no_place():
    shapes = chart("T", "y", AUTO, [line([1, 2, 3, np.nan], [1.0, np.nan, 1e200, 5.0], markers=True)])
    assert sum(isinstance(shape, Dot) for shape in shapes) == 1
    nothing = chart("T", "y", AUTO, [line([1, 2], [np.nan, np.inf])])
    assert [shape.text for shape in nothing if isinstance(shape, Text)][-1] == "no numbers yet"
    many = chart("T", "y", AUTO, [line(range(100_000), np.linspace(1, 2, 100_000))])
    assert max(len(shape.points) for shape in many if isinstance(shape, Stroke)) <= 440
    dashed = chart("T", "y", FITTED, [line([0, 1, 2], [0, 1, 0], dashed=True)])
    assert "stroke-dasharray" in to_svg(dashed, (440, 300), "") and to_picture(dashed, (440, 300))


@pytest.mark.parametrize("scale", [AUTO, FROM_ZERO, FITTED])
@pytest.mark.parametrize(
    "values", [[0.03, 0.9], [0.031, 0.033], [1e-7, 3e4], [-2.0, 5.0], [12345.0, 99999.0]]
)
def test_labels_lie_on_the_axis_and_differ(values, scale):
    axis = fit_values(np.array(values), scale)
    labels = axis.labels()
    assert len({text for _, text in labels}) == len(labels) >= 2
    places = axis.place(np.array([value for value, _ in labels]))
    assert (places > -1e-9).all() and (places < 1 + 1e-9).all()
    assert ((axis.place(np.array(values)) >= -1e-9) & (axis.place(np.array(values)) <= 1 + 1e-9)).all()


def test_hours_have_fractions():
    axis = fit_way(np.array([0.01, 0.35]), whole=False)
    assert axis.high == 0.35 and [text for _, text in axis.labels()][:3] == ["0.0", "0.1", "0.2"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(run_dir, tmp_path):
    for step, colour in ((600, "lime"), (900, "blue")):
        add_preview(run_dir, step, colour)
    (run_dir / "args.json").write_text(json.dumps({"lr": HOSTILE, "total_steps": 1200}))
    (run_dir / "opt000600.pt").touch()
    read_page(run_dir)
    with Browser(str(tmp_path / "profile")) as browser:
        for width in (1440, 360):
            browser.open((run_dir / "index.html").as_uri(), width)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("[...document.images].every(image => image.naturalWidth == 80)")
            assert browser.evaluate(
                "[...document.querySelectorAll('svg')].every(svg => svg.clientWidth > 250)"
            )
            places = (
                "[...document.querySelectorAll('svg')].map(svg => Math.round(svg.getBoundingClientRect().x))"
            )
            assert len(set(browser.evaluate(places))) == {1440: 3, 360: 1}[width]
            shown = "[...document.querySelectorAll('figure')].map(figure => figure.checkVisibility())"
            assert browser.evaluate(shown) == [False, False, True]
            browser.evaluate("moment.value = 1; moment.dispatchEvent(new Event('input')); 0")
            assert browser.evaluate(shown) == [False, True, False]
            assert browser.evaluate("moment.checkVisibility()")
        assert browser.evaluate("document.scripts.length") == 1
        assert "alert(1)" in browser.evaluate("document.body.innerText")
    assert browser.complaints == []
