"""checkpoints.csv: a row for each checkpoint of a run."""

import os
from collections.abc import Sequence

from improved_diffusion.logger import CsvTable
from improved_diffusion.run.checkpoint import Checkpoint

COLUMNS = ("step", "samples", "saved_at", "elapsed", "seconds", "megabytes", "files")


class CheckpointTable:
    """The table of the checkpoints in `folder`. An existing one is continued.

    :param measured: the names of further columns, which are measured at every checkpoint.
    :raises OSError: the file cannot be read or written.
    """

    def __init__(self, folder: str, measured: Sequence[str] = ()):
        self._table = CsvTable(os.path.join(folder, "checkpoints.csv"), [*COLUMNS, *measured])

    def add(self, saved: Checkpoint, seconds: float | None = None) -> None:
        """Add the row of a checkpoint. :param seconds: the duration of saving it, where that is known."""
        files, measured = saved.state["files"], saved.state.get("heldout", {})
        row = {
            "step": saved.step,
            "samples": saved.state["samples"],
            "saved_at": saved.state.get("saved_at"),
            "elapsed": saved.state["elapsed"],
            "seconds": seconds,
            "megabytes": sum(entry["bytes"] for entry in files.values()) / 1e6,
            "files": " ".join(files),
        }
        known = {name: value for name, value in measured.items() if name in self._table.columns}
        self._table.append({**row, **known})

    def keep_until(self, step: int) -> float | None:
        """Drop the rows after `step`. :return: the step of the last row that stays, or None."""
        return self._table.keep_until(step)

    def close(self) -> None:
        """Close the file. Rows can no longer be added."""
        self._table.close()
