"""What is told about the machine."""

import json
import math
import os
import platform
import subprocess
import sys
import types

import pytest

from improved_diffusion.cpu import machine
from improved_diffusion.cpu.machine import cpu_quota, describe_machine, usable_cores


def test_machine_is_described():
    machine = describe_machine()
    json.dumps(machine)
    assert machine["cores"] == usable_cores() >= 1
    assert len(machine["processor"]) > 2
    assert machine["memory_gb"] is None or machine["memory_gb"] > 0.2


ARM64 = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
X86_64 = "processor\t: 0\nmodel name\t: Some Processor: 2 GHz\nmodel\t: 1\n"


@pytest.mark.parametrize(
    "cpuinfo, lscpu, name",
    [
        (X86_64, "Model name: another", "Some Processor: 2 GHz"),
        (ARM64, "Architecture:  aarch64\nModel name:    Cortex-A76\n", "Cortex-A76"),
        (ARM64, "Model name:    -\n", "aarch64"),
        (ARM64, None, "aarch64"),
    ],
)
def test_the_name_of_the_processor(tmp_path, monkeypatch, cpuinfo, lscpu, name):
    def run(command, **options):
        assert command == ("lscpu",) and options["env"]["LC_ALL"] == "C"
        if lscpu is None:
            raise FileNotFoundError("lscpu")
        return subprocess.CompletedProcess(command, 0, stdout=lscpu)

    monkeypatch.setattr(machine.subprocess, "run", run)
    for question, answer in [("system", "Linux"), ("processor", ""), ("machine", "aarch64")]:
        monkeypatch.setattr(platform, question, lambda answer=answer: answer)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert machine.processor_name(str(tmp_path / "cpuinfo")) == name


@pytest.mark.parametrize("bits, expected", [(1 << 14, True), (0xFFFF ^ 1 << 14, False)])
def test_linux_tells_whether_an_arm64_processor_has_bf16(monkeypatch, bits, expected):
    def getauxval(kind):
        return {26: bits}[kind]

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "_c_library", lambda: types.SimpleNamespace(getauxval=getauxval))
    assert machine.has_bf16() is expected
    monkeypatch.setattr(platform, "machine", lambda: "arm64")  # as macOS says
    monkeypatch.setattr(machine, "_c_library", lambda: types.SimpleNamespace())
    assert machine.has_bf16() is False
    monkeypatch.setattr(machine, "_c_library", lambda: None)  # as on Windows
    assert machine.has_bf16() is False


SECOND = "31 23 0:28 / {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
FIRST = "33 25 0:30 {root} {top} rw,relatime - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    "mount, root, groups, files, quota",
    [
        (SECOND, "/", "0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        (SECOND, "/", "0::/a/b", {"a/cpu.max": "max 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        (SECOND, "/", "0::/", {"cpu.max": "200000 100000"}, 2.0),
        (SECOND, "/", "0::/a", {"a/cpu.max": "max 100000", "b/cpu.max": "1 100000"}, math.inf),
        (
            FIRST,
            "/",
            "1:name=systemd:/z\n4:cpu,cpuacct:/a\n0::/z",
            {"a/cpu.cfs_quota_us": "100000", "a/cpu.cfs_period_us": "50000"},
            2.0,
        ),
        (FIRST, "/", "4:cpu:/a", {"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "50000"}, math.inf),
        # Docker's, as seen from within: the mount is the container's own group.
        (
            FIRST,
            "/docker/c0ffee",
            "4:cpu:/docker/c0ffee",
            {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"},
            1.0,
        ),
        (FIRST, "/x", "4:cpu:/elsewhere", {"cpu.cfs_quota_us": "3", "cpu.cfs_period_us": "1"}, 3.0),
        ("nonsense", "/", "nonsense", {}, math.inf),
    ],
)
def test_the_quota_of_a_container(tmp_path, mount, root, groups, files, quota):
    top = tmp_path / "cgroup"
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(content + "\n")
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text(mount.format(root=root, top=top) + "\n")
    (proc / "cgroup").write_text(groups + "\n")
    assert cpu_quota(str(proc)) == quota


@pytest.mark.parametrize("quota, cores", [(math.inf, 4), (2.9, 2), (0.3, 1), (64.0, 4)])
def test_a_quota_is_rounded_down(monkeypatch, quota, cores):
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert usable_cores() == cores


def test_scripts_compute_on_the_cores_of_the_quota():
    code = (
        "from improved_diffusion.cpu import machine; from improved_diffusion.jobs.script import run_script\n"
        "import torch; torch.set_num_threads(4); machine.usable_cores = lambda: 3\n"
        "run_script(lambda: lambda: print(torch.get_num_threads()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "3\n"
