"""What is told about the machine."""

import json

from improved_diffusion.cpu.machine import describe_machine, usable_cores


def test_machine_is_described():
    machine = describe_machine()
    json.dumps(machine)
    assert machine["cores"] == usable_cores() >= 1
    assert len(machine["processor"]) > 2
    assert machine["memory_gb"] is None or machine["memory_gb"] > 0.2
