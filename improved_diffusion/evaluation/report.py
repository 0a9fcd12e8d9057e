"""The results of an evaluation, for people and for programs: a table, warnings, JSON files."""

import json
import os
from typing import Any

from improved_diffusion.data.decode import height_width
from improved_diffusion.evaluation.metrics import Statistics
from improved_diffusion.storage import absolute, output_file, write_json

FILE_NAME = "evaluation.json"  # in a run's directory: a list of records


def output_path(output: str, samples: str) -> str:
    """The JSON file to write: `output` or, if that is empty, a file beside `samples`.

    :raises ValueError: as `output_file`.
    """
    return output_file(output or os.path.splitext(absolute(samples))[0].rstrip("/\\") + ".evaluation.json")


def warnings(samples: Statistics, reference: Statistics) -> list[str]:
    """Warnings that a reader of the metrics needs."""
    found = []
    for name, stats in (("samples", samples), ("reference images", reference)):
        if stats.count < len(stats.mean):
            found.append(
                f"only {stats.count:,} {name} for {len(stats.mean):,} features: the Frechet distance is far too large; "
                "compare it only with distances of equally many images"
            )
    return found


def table(record: dict[str, Any]) -> str:
    """The metrics, numbers of images and warnings of a record, in a few lines."""
    metrics = record["metrics"]
    size = "{1}x{0}".format(*height_width(record["image_size"]))
    shown = [name for name in metrics if not name.partition("[")[0].endswith("_std")]
    width = max(map(len, shown))
    lines = [
        f"{record['images']:,} samples against {record['reference_images']:,} reference images of "
        f"{size} pixels (precision and recall: "
        f"{record['compared_images']:,} of each)",
        f"{record['features_length']:,} features from {record['features']}, "
        f"{record['images_per_minute']:,.0f} images per minute",
    ]
    for name in shown:
        spread = metrics.get(_spread(name))
        lines.append(
            f"  {name:<{width}}  {metrics[name]:.5g}" + (f" +- {spread:.2g}" if spread is not None else "")
        )
    if record["accuracy_of_each_class"]:
        shares = (f"{name} {share:.2f}" for name, share in record["accuracy_of_each_class"].items())
        lines.append(f"  of each class: {', '.join(shares)}")
    return "\n".join(lines + [f"WARNING: {warning}" for warning in record["warnings"]])


def append(run_dir: str, record: dict[str, Any]) -> None:
    """Add a record to those in a run's directory. The workbook reads them there."""
    path = os.path.join(absolute(run_dir), FILE_NAME)
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            records = json.load(file)
        if not isinstance(records, list):
            raise ValueError("not a list")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        # It must not cost this result too, nor this result what is left in it.
        os.replace(path, path + ".damaged")
        print(f"WARNING: {path}: cannot be read ({error}); it is kept as {path}.damaged, and a new one begun")
        records = []
    write_json(path, [*records, record])


def _spread(metric: str) -> str:
    """The name of a metric's standard deviation: ``kid_std`` for ``kid``, ``kernel_distance_std[pixel]`` too."""
    name, bracket, features = metric.partition("[")
    return f"{name}_std{bracket}{features}"
