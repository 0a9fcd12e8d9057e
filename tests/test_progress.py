"""How far the drawing is: a bar on a terminal, elsewhere a line now and then, of the same numbers."""

import io
import sys

from improved_diffusion import progress
from improved_diffusion.progress import Progress


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def draw_four(clock, show=True):
    """Two batches of two images that take three steps of ten seconds each."""
    with Progress(images=4, steps=3, doing="drawing", show=show) as shown:
        for _ in range(2):
            for _ in range(3):
                clock.now += 10
                shown.step(2)
            shown.finish(2)


def test_lines_now_and_then(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    draw_four(clock)
    output = capsys.readouterr()
    assert output.out.splitlines() == ["drawing: 0/4 images, 00:30 left", "drawing: 2/4 images, 00:00 left"]
    assert output.err == ""
    draw_four(clock, show=False)
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    draw_four(Clock())
    assert (
        "100%" in terminal.getvalue()
        and "4/4 images" in terminal.getvalue()
        and "left" in terminal.getvalue()
    )
    assert capsys.readouterr().out == ""
