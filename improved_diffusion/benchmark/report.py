"""Benchmark results as text: a title, how it was measured, and a table."""

import textwrap
from typing import Any

WIDTH = 100


def section(content: dict[str, Any]) -> str:
    """A part of the results, {"title", "note", "rows"}, as lines of text. The rows' keys are the columns' headings."""
    rows = content["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[name.replace("_", " ") for name in names]]
    lines += [[_cell(row[name]) if name in row else "" for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = []
    for line in lines:
        cells = [
            cell.ljust(width) if isinstance(rows[0].get(name), str) else cell.rjust(width)
            for name, cell, width in zip(names, line, widths)
        ]
        table.append("  ".join(cells).rstrip())
    note = textwrap.wrap(f"({content['note']})", WIDTH)
    return "\n".join([content["title"], *note, *table])


def _cell(value: Any) -> str:
    """A text, a number, or a median with the range of the middle 80%."""
    if isinstance(value, dict):
        return f"{_number(value['median'])} ({_number(value['p10'])}..{_number(value['p90'])})"
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"
