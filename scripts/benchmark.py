"""Measure how fast this machine trains and samples, against the plain way of openai/improved-diffusion, in a few
minutes. `--help` explains every flag; by default, the model is that of the README.

Everything that is compared runs in turns in one process. A number is the median of --rounds, and in brackets is
between what the middle 80% lie. Nothing else should run meanwhile.
"""

import os
from typing import Any

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

import torch as th

from improved_diffusion.benchmark.ablation import measure_ablation
from improved_diffusion.benchmark.cost import measure_cost, measure_memory
from improved_diffusion.benchmark.parts import measure_parts
from improved_diffusion.benchmark.peaks import measure_peaks
from improved_diffusion.benchmark.report import section
from improved_diffusion.benchmark.sampling import measure_sampling
from improved_diffusion.benchmark.settings import Settings, build
from improved_diffusion.benchmark.training import measure_command, measure_training
from improved_diffusion.cpu.compute import choose
from improved_diffusion.cpu.machine import describe_machine
from improved_diffusion.flags import Parser, add_dict_to_argparser, args_to_dict, check_range
from improved_diffusion.jobs.train import COMPUTE, TRAINING
from improved_diffusion.script_util import check_images_fit, model_defaults, run_script
from improved_diffusion.storage import absolute, write_json

MODEL = {
    name: value
    for name, value in model_defaults().items()
    if name not in ("class_cond", "num_classes", "class_dropout")
}
CONFIGURATION = {"data_dir": "builtin", **args_to_dict(TRAINING, ["batch_size", "microbatch"]), **COMPUTE}
BY_DEFAULT = {
    "memory": measure_memory,
    "peaks": measure_peaks,
    "training": measure_training,
    "command": measure_command,
    "parts": measure_parts,
    "sampling": measure_sampling,
}
ON_REQUEST = {"ablation": measure_ablation, "cost": measure_cost}
BUSY = 0.5  # processes that were running, on average over a minute
MEASUREMENTS = {**BY_DEFAULT, **ON_REQUEST}


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, MODEL, "model")
    add_dict_to_argparser(parser, CONFIGURATION, "training")
    group = parser.add_argument_group("measurement")
    group.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of everything compared")
    group.add_argument(
        "--only",
        default=",".join(BY_DEFAULT),
        metavar="TEXT",
        help="comma-separated: what to measure; there are also ablation (what each optimisation gains) and cost (how "
        "time and memory grow with the configuration), of ten minutes each",
    )
    group.add_argument("--json", default="", metavar="TEXT", help="also write all results to this file")
    return parser


def main() -> None:
    flags, _ = create_parser().parse_flags()
    names = flags["only"].split(",")
    for name in names:
        if name not in MEASUREMENTS:
            raise ValueError(f"--only {name}: use some of {','.join(MEASUREMENTS)}")
    if flags["json"] and not os.path.isdir(os.path.dirname(absolute(flags["json"]))):
        raise ValueError(f"--json {flags['json']}: there is no such folder")
    settings = read_settings(flags)
    th.set_num_threads(settings.compute.workers)  # of the plain path; the fast one has its own

    machine = describe_machine()
    results: dict[str, Any] = {"machine": machine, "flags": flags, "computing_in": vars(settings.compute)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 2)
        if machine["load"] > BUSY:
            print(f"WARNING: other programs are running (load {machine['load']}); so these times mean little")
    print(f"the fast path: {settings.compute}; {settings.rounds} rounds")
    for name in names:
        print(f"\nmeasuring {name}...", flush=True)
        results[name] = MEASUREMENTS[name](settings)
        print(section(results[name]))
        if flags["json"]:
            write_json(flags["json"], results)
    if flags["json"]:
        print(f"\nwritten: {flags['json']}")


def read_settings(flags: dict[str, Any]) -> Settings:
    """What to measure. :raises ValueError: no such configuration can be trained."""
    check_range(flags, {"batch_size": 1, "microbatch": -1, "rounds": 1})
    if flags["microbatch"] == 0:
        raise ValueError("--microbatch 0: give the images per pass, or -1 for the whole batch")
    check_images_fit(flags, "batch_size", bytes_per_number=4)
    batch_size, microbatch = flags["batch_size"], flags["microbatch"]
    settings = Settings(
        model=args_to_dict(flags, MODEL),
        batch_size=batch_size,
        microbatch=min(microbatch, batch_size) if microbatch > 0 else batch_size,
        data_dir=flags["data_dir"],
        compute=choose(flags["precision"], flags["num_workers"]),
        rounds=flags["rounds"],
    )
    build(settings)  # or a mistake would show only after minutes
    return settings


if __name__ == "__main__":
    run_script(main)
