"""The allocator keeps what a command frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from deltafmt import core

# Allocates and frees a hundred buffers, twice, and prints the page faults of the second time.
PROGRAM = """
import resource
from deltafmt import core
if {keep}:
    core.keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [b"x" * 1_000_000 for _ in range(100)]
    del buffers
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults(keep: bool) -> int:
    program = [sys.executable, "-P", "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(core.native is None or platform.libc_ver()[0] != "glibc", reason="another allocator, or no loops")
def test_memory_that_is_kept_gives_no_page_faults() -> None:
    assert faults(True) < faults(False) / 10


def test_without_loops_memory_is_not_kept() -> None:
    with core.reference_only():
        core.keep_memory()
