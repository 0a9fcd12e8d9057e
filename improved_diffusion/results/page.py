"""The web page of a run: a single file that needs no server and no network."""

import base64
import datetime
import hashlib
import html
import os
import shlex
from collections.abc import Callable, Sequence

import numpy as np

from improved_diffusion.results.axes import FITTED
from improved_diffusion.results.charts import chart_data, half_window, lines_of, plots_of
from improved_diffusion.results.columns import COUNT, DURATION, GENERAL, REAL, SCIENTIFIC, SHORT_REAL, TIME
from improved_diffusion.results.evaluations import evaluation_plots, heldout_plots
from improved_diffusion.results.figures import chart, to_svg
from improved_diffusion.results.overview import BUILT_IN, COMMAND, coverage, sections
from improved_diffusion.results.read import Run
from improved_diffusion.results.samples import description_of
from improved_diffusion.results.style import clean
from improved_diffusion.storage import is_remote, open_atomic

MODULE = ("python", "-m", "improved_diffusion")
FIGURE = (440, 300)  # size of a chart in pixels, before the browser scales it
MAX_PICTURES = 40
PICTURE_BYTES = 4_000_000  # of all pictures together; base64 adds a third
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB\x60\x82"

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1440px; padding: 16px 20px 40px; background: #fff; color: #262626;
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 24px; color: #1f4e79; overflow-wrap: anywhere; }
h2 { margin: 32px 0 10px; padding-bottom: 4px; border-bottom: 1px solid #9dc3e6; font-size: 18px; color: #1f4e79; }
h3 { margin: 0 0 4px; font-size: 15px; color: #1f4e79; }
.subtle { color: #6e6e6e; }
progress { width: 100%; height: 14px; accent-color: #1f4e79; }
.warning, .note { margin: 8px 0; padding: 8px 12px; border-radius: 4px; overflow-wrap: anywhere; }
.warning { background: #ffc7ce; color: #9c0006; font-weight: 600; }
.note { background: #fff2cc; color: #7f6000; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px; }
.charts svg { display: block; width: 100%; height: auto; border: 1px solid #d9d9d9; border-radius: 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 18px 28px; }
dl { display: grid; grid-template-columns: minmax(8em, 2fr) 3fr; gap: 2px 12px; margin: 0; }
dt { color: #6e6e6e; } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; image-rendering: pixelated; }
input[type=range] { width: min(100%, 640px); display: block; margin: 8px 0; }
pre { margin: 4px 0 12px; padding: 10px 12px; background: #f2f5f9; border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th { text-align: left; color: #fff; background: #1f4e79; }
th, td { padding: 3px 12px 3px 8px; vertical-align: top; overflow-wrap: anywhere; min-width: 5em; }
td:first-child { white-space: nowrap; } summary { margin: 10px 0; cursor: pointer; color: #1f4e79; }
tr:nth-child(even) td { background: #f5f8fb; }
"""
# Without JavaScript, only the newest picture is shown.
SCRIPT = """
const slider = document.getElementById("moment");
if (slider) {
  const pictures = document.querySelectorAll("#previews figure");
  const show = () => pictures.forEach((figure, number) => { figure.hidden = number !== Number(slider.value); });
  slider.parentElement.hidden = false;
  slider.addEventListener("input", show);
  show();
}
"""
# The browser loads nothing from elsewhere and runs no other script, even if a name or a path contains one.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    + "'"
)


def write_page(run: Run, output: str, check_folder: Callable[[], object] = lambda: None) -> None:
    """Write the page of `run` into the file `output`.

    :param check_folder: called before the file is written. Raises an OSError if it must not be written.
    :raises OSError: the file cannot be written.
    """
    name = os.path.basename(run.dir) or run.dir
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(name)}</title><style>{STYLE}</style></head><body>",
        f"<header><h1>{_text(name)}</h1>",
        f'<p class="subtle">{_text(coverage(run.metrics))} Written {now}; reload the page to see what is new.</p>',
        *_progress(run),
        *([f'<p class="warning">{_text(BUILT_IN)}</p>'] if run.data.get("source") == "builtin" else []),
        *(f'<p class="note">{_text(note)}</p>' for note in run.notes),
        "</header><main>",
        *_previews(run.previews),
        *_charts(run),
        *_facts(run),
        *_how_to_continue(run),
        *_arguments(run),
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    check_folder()
    with open_atomic(output, "w") as file:
        file.write("\n".join(parts) + "\n")


def _text(value) -> str:
    """`value` as HTML text, without any markup."""
    return html.escape(clean(str(value)))


def _progress(run: Run) -> list[str]:
    steps, total = run.metrics.column("step"), run.arguments.get("total_steps")
    if not len(steps) or not isinstance(total, int) or total <= 0:
        return []
    done = int(steps.max())
    label = f"{done:,} of {total:,} steps"
    return [f'<progress value="{min(done, total)}" max="{total}" aria-label="{label}">{label}</progress>']


def _previews(previews: Sequence[tuple[int, str]]) -> list[str]:
    """The previews of the run, of which one is shown, and a slider for the step.

    :param previews: steps and paths, the newest first.
    """
    if not previews:
        return []
    shown, left_out = _read_pictures(previews)
    parts = ['<section id="previews"><h2>Pictures</h2>']
    if len(shown) > 1:
        last = len(shown) - 1
        parts.append(
            f'<label hidden>From the first picture to the newest<input type="range" id="moment" min="0" max="{last}" '
            f'value="{last}"></label>'
        )
    for number, (step, content) in enumerate(shown):
        hidden = "" if number == len(shown) - 1 else " hidden"
        parts.append(
            f"<figure{hidden}><figcaption>Step {step:,}</figcaption>"
            f'<img alt="{_text(description_of(step))}" src="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}"></figure>'
        )
    if left_out:
        parts.append(
            f'<p class="subtle">{len(shown)} of {len(previews)} pictures are shown, to keep the page small; the others '
            "are in the folder samples.</p>"
        )
    return [*parts, "</section>"]


def _read_pictures(previews: Sequence[tuple[int, str]]) -> tuple[list[tuple[int, bytes]], int]:
    """An even selection of the pictures, in ascending order, and the number of pictures that are left out."""
    sizes = {}
    for step, path in previews:
        try:
            sizes[step, path] = os.path.getsize(path)
        except OSError:
            continue
    known = sorted(sizes)
    count = min(len(known), MAX_PICTURES)
    chosen = _spread(known, count)
    while count and sum(sizes[one] for one in chosen) > PICTURE_BYTES:
        count -= 1
        chosen = _spread(known, count)
    found = []
    for step, path in chosen:
        try:
            with open(path, "rb") as file:
                content = file.read(PICTURE_BYTES + 1)
        except OSError:
            continue
        if content.startswith(PNG_START) and content.endswith(PNG_END):
            found.append((step, content))
    return found, len(previews) - len(found)


def _spread(items: Sequence, count: int) -> list:
    """An even selection of `count` of `items`, always with the last one."""
    if count < 2:
        return list(items[len(items) - count :])
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _charts(run: Run) -> list[str]:
    drawn = []
    plots = plots_of(run.metrics)
    if plots:
        titles, points = chart_data(run.metrics, plots)
        for plot in plots:
            lines = lines_of(plot, titles, points, 1)
            drawn.append((plot.title, plot.y_title, plot.scale, lines, not plot.first_step))
    columns = run.checkpoints.columns
    for title, scale, lines in heldout_plots(run.checkpoints, columns):
        drawn.append((title, "held-out loss", scale, lines, True))
    for title, lines in evaluation_plots(run.evaluations):
        drawn.append((title, title.lower(), FITTED, lines, True))
    parts = ["<section><h2>Curves</h2>"]
    if not drawn:
        return [*parts, '<p class="subtle">No numbers have been logged yet.</p></section>']
    parts.append(
        f'<p class="subtle">Smoothed values are means over up to {half_window(len(run.metrics.rows))} rows on either '
        "side. The workbook has all numbers.</p>"
    )
    parts.append('<div class="charts">')
    for title, y_title, scale, lines, from_zero in drawn:
        shapes = chart(title, y_title, scale, lines, from_zero, FIGURE)
        parts.append(to_svg(shapes, FIGURE, f"{title}, over the step"))
    return [*parts, "</div></section>"]


def _facts(run: Run) -> list[str]:
    parts = ['<section><h2>The run</h2><div class="facts">']
    for title, facts in sections(run):
        parts.append(f"<div><h3>{_text(title)}</h3><dl>")
        for label, value, number_format in facts:
            if label == COMMAND:  # which is in another section
                continue
            shown = '<span class="subtle">not recorded</span>'
            if value is not None:
                shown = _text(as_text(value, number_format))
            parts.append(f"<dt>{_text(label)}</dt><dd>{shown}</dd>")
        parts.append("</dl></div>")
    return [*parts, "</div></section>"]


def _how_to_continue(run: Run) -> list[str]:
    """The commands that continue the run and draw images from it."""
    where = run.arguments.get("log_dir")
    if not (isinstance(where, str) and is_remote(where)):
        where = run.dir
    enlarges = "large_size" in run.arguments
    train, sample = _programs(run.command, enlarges)
    draw = [*sample, *(["--base_samples", "IMAGES"] if enlarges else []), "--model_path", where]
    resume = [*train, "--log_dir", where]
    steps, total = run.metrics.column("step"), run.arguments.get("total_steps")
    done = int(steps.max(initial=0))
    parts = ["<section><h2>Continue, draw</h2>"]
    if run.command:
        parts.append(f"<p>The last session was started by:</p><pre>{_text(run.command)}</pre>")
    files = os.listdir(run.dir)
    if not any(name.startswith("opt") and name.endswith(".pt") for name in files):
        parts.append("<p>There is no checkpoint here to continue from.</p>")
    elif isinstance(total, int) and done >= total:
        hours = run.arguments.get("hours")
        resume += ["--hours", f"{2 * hours:g}"] if hours else ["--total_steps", str(2 * total)]
        parts.append(f"<p>The run has done all its {total:,} steps. To make it longer:</p>{_command(resume)}")
    else:
        parts.append(f"<p>If it no longer runs, this continues it:</p>{_command(resume)}")
    if any(name.endswith(".pt") for name in files):
        parts.append(f"<p>To draw with its newest averaged weights, also while it runs:</p>{_command(draw)}")
    return [*parts, "</section>"]


def _command(words: Sequence[str]) -> str:
    return f"<pre>{_text(shlex.join(words))}</pre>"


def _programs(command: str | None, enlarges: bool) -> tuple[list[str], list[str]]:
    """The words that start a training, and a sampling, in the way in which the recorded command did.

    :param enlarges: whether the model is one of super-resolution.
    """
    prefix = "super_res_" if enlarges else ""
    try:
        words = shlex.split(command or "")
    except ValueError:  # a quotation without an end
        words = []
    if len(words) > 1 and words[1].endswith("_train.py"):
        sampler = f"{prefix or 'image_'}sample.py"
        return ["python", words[1]], ["python", os.path.join(os.path.dirname(words[1]), sampler)]
    return [*MODULE, f"{prefix}train"], [*MODULE, f"{prefix}sample"]


def _arguments(run: Run) -> list[str]:
    """All flags. Those that differ from the default are in a separate table."""
    parts = ["<section><h2>Arguments</h2>"]
    if not run.arguments:
        return [*parts, '<p class="subtle">The arguments of this run are not known.</p></section>']
    changed = {
        flag for flag, value in run.arguments.items() if flag in run.defaults and value != run.defaults[flag]
    }
    parts.append(
        f'<p class="subtle">{len(changed)} of {len(run.arguments)} flags differ from their defaults.</p>'
        if run.defaults
        else '<p class="subtle">The defaults were not recorded.</p>'
    )
    parts += _table(run, sorted(changed))
    others = sorted(run.arguments.keys() - changed)
    if others:
        what = "The others" if changed else "All of them"
        parts += [f"<details><summary>{what}</summary>", *_table(run, others), "</details>"]
    return [*parts, "</section>"]


def _table(run: Run, flags: Sequence[str]) -> list[str]:
    if not flags:
        return []
    parts = ['<div class="scroll"><table><tr><th>flag</th><th>value</th><th>default</th></tr>']
    for flag in flags:
        cells = (f"--{flag}", run.arguments[flag], run.defaults.get(flag, ""))
        parts.append(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    return [*parts, "</table></div>"]


def as_text(value, number_format: str) -> str:
    """`value` as a spreadsheet shows it in `number_format`."""
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, bool) or not isinstance(value, int | float) or number_format in (GENERAL, TIME):
        return str(value)
    if not np.isfinite(value):
        return str(value)
    if number_format == DURATION:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    if number_format == REAL and value < 1e5:
        return f"{value:.5f}"
    if number_format in (REAL, SCIENTIFIC):
        return f"{value:.2e}"
    plain = {COUNT: "{:,.0f}", SHORT_REAL: "{:,.2f}", "0.00": "{:.2f}", "0.0%": "{:.1%}"}
    return plain.get(number_format, "{}").format(value)
