"""Measure how close images, such as image_sample.py draws, are to real ones: FID, KID, Inception Score, precision and
recall. `--help` explains every flag.

The features come from the Inception network that the papers use, which is downloaded once; those of any other network,
and the pixels', are reported under their own names.
"""

import datetime
import glob
import os
import time

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.evaluation import report
from improved_diffusion.evaluation.features import INCEPTION, load_extractor
from improved_diffusion.evaluation.measuring import read_flag, reference_statistics, statistics_of
from improved_diffusion.evaluation.metrics import InceptionScore, compare
from improved_diffusion.flags import Parser, add_dict_to_argparser, check_range
from improved_diffusion.image_datasets import describe
from improved_diffusion.results.export import export
from improved_diffusion.results.read import read_run
from improved_diffusion.script_util import model_defaults, run_script
from improved_diffusion.storage import absolute, write_json

EVALUATION = {
    "samples": "",
    "reference": "",
    "features": INCEPTION,
    "inception_weights": "",
    "batch_size": 4,
    "output": "",
    "run_dir": "",
}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, EVALUATION)
    return parser


def main() -> None:
    flags, _ = create_parser().parse_flags()
    check_range(flags, {"batch_size": 1})
    for flag in ("samples", "reference"):
        if not flags[flag]:
            raise ValueError(f"--{flag} is missing: give an .npz file or a folder of images")
    output = report.output_path(flags["output"], flags["samples"])
    if flags["run_dir"]:
        read_run(flags["run_dir"])  # finds out now, not in an hour, whether it is one
    samples = read_samples(flags["samples"])
    reference = read_flag("reference", flags["reference"], samples.image_size)
    print(f"samples: {describe(samples)}\nreference: {describe(reference)}")
    extractor = load_extractor(flags["features"], flags["inception_weights"])

    real = reference_statistics(reference, extractor, flags["batch_size"])
    started = time.monotonic()
    score = None if extractor.classifier is None else InceptionScore(len(samples))
    drawn = statistics_of(samples, extractor, flags["batch_size"], "measuring the samples", score)
    seconds = time.monotonic() - started
    print("comparing ...")
    metrics = compare(drawn, real)
    if score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = score.result()

    record = {
        "evaluated_at": datetime.datetime.now().isoformat(timespec="seconds"),
        "features": extractor.name,
        "features_hash": extractor.fingerprint,
        "features_length": len(drawn.mean),
        "images": len(samples),
        "images_path": samples.summary["source"],
        "reference_images": len(reference),
        "reference_path": reference.summary["source"],
        "compared_images": min(len(drawn.kept), len(real.kept)),
        "image_size": samples.image_size,
        "metrics": {extractor.metric(name): value for name, value in metrics.items()},
        "warnings": report.warnings(drawn, real),
        "images_per_minute": round(60 * len(samples) / seconds, 1),
    }
    print(report.table(record))
    write_json(output, record)
    print(f"written: {output}")
    if flags["run_dir"]:
        report.append(flags["run_dir"], record)
        print(f"written: {export(flags['run_dir'])}")


def read_samples(path: str) -> ImageSet:
    """The images to measure, at the size they have.

    :raises ValueError: nothing usable there, or a folder whose .npz file was meant.
    """
    inside = sorted(glob.glob(os.path.join(glob.escape(absolute(path)), "*.npz")))
    if inside:
        raise ValueError(f"--samples {path}: give the .npz file in this folder, {inside[-1]}")
    usual = model_defaults()["image_size"]
    images = read_flag("samples", path, usual)
    size = min(map(int, images.summary["sizes"]["most_common"].split("x")))
    return images if size == usual else read_flag("samples", path, size)


if __name__ == "__main__":
    run_script(main)
