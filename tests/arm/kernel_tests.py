"""Run the tests of the kernels on an emulated processor. run.sh calls this file, with the command that runs Python."""

import sys

import pytest

sys.executable = sys.argv[1]  # for a test that starts another process

# These compile for the machine that emulates, or start Python anew for minutes and test nothing of the processor.
ELSEWHERE = [
    "they_are_compiled",
    "that_does_not_belong",
    "of_older_code",
    "under_sanitizers",
    "cores_of_the_quota",
]
sys.exit(
    pytest.main(
        [
            *("-q", "-o", "addopts=", "-p", "no:cacheprovider", "-rs", "--durations=5"),
            *("-k", f"not ({' or '.join(ELSEWHERE)})"),
            *("tests/kernels", "tests/cpu/test_cpu.py"),
            *sys.argv[2:],
        ]
    )
)
