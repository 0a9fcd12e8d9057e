"""A benchmark from its flags to its report: what scripts/benchmark.py does."""

import os
from typing import Any

import torch as th

from improved_diffusion import kernels
from improved_diffusion.benchmark.ablation import measure_ablation
from improved_diffusion.benchmark.busy import measure_busy
from improved_diffusion.benchmark.cost import measure_cost, measure_memory
from improved_diffusion.benchmark.parts import measure_parts
from improved_diffusion.benchmark.peaks import measure_peaks
from improved_diffusion.benchmark.report import section
from improved_diffusion.benchmark.sampling import measure_sampling
from improved_diffusion.benchmark.settings import Settings, build
from improved_diffusion.benchmark.training import measure_command, measure_training
from improved_diffusion.config import BenchmarkConfig, ImageFlags, UNetFlags
from improved_diffusion.cpu.compute import choose
from improved_diffusion.cpu.machine import describe_machine
from improved_diffusion.flags import declared, errors_about
from improved_diffusion.script_util import check_images_fit
from improved_diffusion.storage import output_file, write_json

MEASUREMENTS = {
    "memory": measure_memory,
    "peaks": measure_peaks,
    "training": measure_training,
    "command": measure_command,
    "parts": measure_parts,
    "sampling": measure_sampling,
    "busy": measure_busy,
    "ablation": measure_ablation,
    "cost": measure_cost,
}
BUSY = 0.5  # processes that were running, on average over a minute


def run_benchmark(config: BenchmarkConfig) -> None:
    """Do what the command line of benchmark.py asks for. :raises ValueError: a flag is unusable."""
    names = config.only.split(",")
    for name in names:
        if name not in MEASUREMENTS:
            raise ValueError(f"--only {name}: use some of {','.join(MEASUREMENTS)}")
    with errors_about("json"):
        output = output_file(config.json) if config.json else ""
    settings = read_settings(config)
    th.set_num_threads(settings.compute.workers)  # of the plain path; the fast one has its own

    machine = {**describe_machine(), "kernels": kernels.generation()}
    results: dict[str, Any] = {
        "machine": machine,
        "flags": config.to_dict(),
        "computing_in": vars(settings.compute),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 2)
        if machine["load"] > BUSY:
            print(f"WARNING: other programs are running (load {machine['load']}), so these times mean little")
    print(f"the fast path: {settings.compute}; {settings.rounds} rounds")
    for name in names:
        print(f"\nmeasuring {name}...", flush=True)
        results[name] = MEASUREMENTS[name](settings)
        print(section(results[name]))
        if output:
            write_json(output, results)
    if output:
        print(f"\nwritten: {output}")


def read_settings(config: BenchmarkConfig) -> Settings:
    """The settings that the flags describe. :raises ValueError: such a configuration cannot be trained."""
    check_images_fit(config, "batch_size", bytes_per_number=4)
    flags, batch_size, microbatch = config.to_dict(), config.batch_size, config.microbatch
    settings = Settings(
        model={name: flags[name] for name in (*declared(ImageFlags), *declared(UNetFlags))},
        batch_size=batch_size,
        microbatch=min(microbatch, batch_size) if microbatch > 0 else batch_size,
        data_dir=config.data_dir,
        compute=choose(config.precision, config.num_workers),
        rounds=config.rounds,
    )
    build(settings)  # or a mistake would show only after minutes
    return settings
