"""A comparison of runs from the command line to workbook and picture: what compare_runs.py does."""

import os

import blobfile as bf
import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.comparison.runs import Compared, general_notes, read_runs
from improved_diffusion.comparison.runs_report import paths, write_picture, write_workbook
from improved_diffusion.config import RunsConfig
from improved_diffusion.cpu.compute import Compute, choose
from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.data.class_labels import parse_class_labels
from improved_diffusion.jobs.runs import choose_out_dir, load_trained
from improved_diffusion.jobs.sample import choose_plan, describe_images, where_to_guide
from improved_diffusion.run import checkpoint
from improved_diffusion.sample_util import guide, sample_images
from improved_diffusion.script_util import check_images_fit, count_classes


def run_comparison_of_runs(config: RunsConfig, given: set[str], directories: list[str], project: str) -> None:
    """Do what the command line of compare_runs.py asks for.

    :param config, given: of `Parser.parse_flags`. :param directories: of the runs.
    :param project: the folder with ``samples``, where results go by default.
    :raises ValueError: a directory is none of a run, or a flag is unusable.
    """
    dist_util.setup_dist()
    if dist_util.get_world_size() > 1:
        raise ValueError("several processes cannot share this work; start one, which uses all cores")
    compared = read_runs(directories)
    compute = choose(config.precision, config.num_workers)
    if config.num_samples:
        for one in compared:
            _draw(one, config, given, compute)
        if config.class_label and all(one.images is None for one in compared):
            raise ValueError(
                f"--class_label {config.class_label}: no run could draw it; {compared[0].notes[-1]}"
            )
    notes = general_notes(compared)
    out_dir = choose_out_dir(config.log_dir, os.path.join(project, "samples"))
    workbook, picture = paths(out_dir)
    write_workbook(workbook, compared, notes)
    write_picture(picture, compared)
    for name, lines in [("all runs", notes), *((one.name, one.notes) for one in compared)]:
        for line in lines:
            print(f"{name}: {line}")
    print(f"written: {workbook}\n         {picture}")


def _draw(one: Compared, config: RunsConfig, given: set[str], compute: Compute) -> None:
    """Draw the images of a run with its newest averaged model, or note why there are none.

    Image i starts from the noise of (--seed, i) and is of the i-th class in turn, whatever the run.
    """
    if not checkpoint.steps(one.run.dir):
        one.notes.append("Nothing was drawn: it has no checkpoint yet.")
        return
    try:
        trained = load_trained(one.run.dir, config, given)
        config = trained.config
        check_images_fit(config, "num_samples", bytes_per_number=4)
        plan = choose_plan(config, given, trained.diffusion)
        labels = None
        if config.class_cond:
            labels = parse_class_labels(config.class_label, count_classes(config), trained.class_names)
        elif config.class_label:
            one.notes.append(f"--class_label {config.class_label}: it was trained without classes.")
        is_guided = config.guidance_scale != 1 and bool(config.class_dropout)
        within = where_to_guide(config.guidance_interval, trained.diffusion) if is_guided else None
    except (ValueError, OSError, bf.Error) as error:
        one.notes.append(f"Nothing was drawn: {error}.")
        return
    model = fast_model(trained.model, compute.precision, compute.workers)
    if is_guided:
        model = guide(model, config.guidance_scale, count_classes(config), within)
        if "guidance_scale" not in given:
            one.notes.append(
                f"Drawn with --guidance_scale {config.guidance_scale:g}, which it was published with."
            )
    elif config.guidance_scale != 1:
        one.notes.append("Drawn without guidance: it was trained without --class_dropout.")
    elif config.guidance_interval:
        one.notes.append(
            f"Drawn without guidance: --guidance_interval {config.guidance_interval} needs a scale."
        )
    subject, _ = describe_images(config, plan, labels)
    batches = sample_images(
        model,
        trained.diffusion,
        plan,
        subject,
        num_samples=config.num_samples,
        batch_size=min(config.batch_size, config.num_samples),
        progress=f"drawing {one.name}",
    )
    one.images = np.concatenate(list(batches))[:, -1]
    one.weights = trained.path
