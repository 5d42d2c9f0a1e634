"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = """
import resource, sys
import numpy as np
from pipeline.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for round in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.full(2**22, 1.0) for _ in range(4)]  # 32 MiB each
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)  # in the last round
"""


def faults(how: str) -> int:
    """Pages that the kernel had to find in the last of four equal rounds."""
    command = [sys.executable, "-c", ROUNDS, how]
    return int(subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_of_a_freed_tensor_is_there_for_the_next_one() -> None:
    assert faults("plain") > 4 * 2**25 / 2**21  # one per huge page at least
    assert faults("keep") < 8
