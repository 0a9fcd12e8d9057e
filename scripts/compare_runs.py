"""Lay runs side by side: learning curves, held-out loss, evaluations, the flags in which they differ, and what the
newest averaged model of each makes of the same noise. Runs may be unfinished.

It writes the workbook runs.xlsx and the picture runs.png. The runs are only read.
"""

import os
from collections.abc import Callable
from functools import partial

from improved_diffusion.config import RunsConfig
from improved_diffusion.flags import Parser
from improved_diffusion.jobs.script import run_script

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLES = (
    "python scripts/compare_runs.py runs/a runs/b runs/c --log_dir compared",
    "python scripts/compare_runs.py runs/a runs/b --class_label cat,ship --guidance_scale 2",
)


def create_parser() -> Parser:
    return Parser(RunsConfig, __doc__, EXAMPLES, operand="RUN")


def main() -> Callable[[], int | None]:
    parser = create_parser()
    config, given = parser.parse_flags()
    from improved_diffusion.comparison.runs_job import run_comparison_of_runs

    return partial(run_comparison_of_runs, config, given, parser.operands, PROJECT)


if __name__ == "__main__":
    run_script(main)
