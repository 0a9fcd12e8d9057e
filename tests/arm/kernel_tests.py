"""Run the tests of the kernels on an emulated processor. run.sh calls this file, with the command that runs Python."""

import sys

import pytest

sys.executable = sys.argv[1]  # for the tests that start other processes
sys.exit(
    pytest.main(
        [
            *("-q", "-o", "addopts=", "-p", "no:cacheprovider", "-rs", "--durations=5"),
            # It would compile for the machine that emulates.
            "--deselect=tests/kernels/test_kernels.py::test_under_sanitizers",
            *("tests/kernels", "tests/cpu/test_cpu.py"),
            *sys.argv[2:],
        ]
    )
)
