"""Memory that is freed stays with the process, also in the thread in which Ray Train trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.heap import HUGE_PAGES, ONE_HEAP

ROUNDS = """
import resource, sys, threading
import torch
from pipeline.heap import keep_freed_memory

if "keep" in sys.argv:
    assert keep_freed_memory()

def work():
    for round in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**18 * n) for n in (4, 8, 24)]  # 4, 8 and 24 MiB
        del tensors
        if round >= 30:
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(max(found))
"""


def faults(*arguments: str, **environment: str) -> int:
    """Pages that the system had to find in a later one of many equal rounds, in a thread."""
    command = [sys.executable, "-c", ROUNDS, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    place = Path(__file__).parent.parent
    return int(subprocess.run(command, cwd=place, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.slow
def test_memory_of_a_freed_tensor_is_there_for_the_next_one() -> None:
    assert faults(**HUGE_PAGES) > 18, "one per 2 MiB at least"
    assert faults("keep", **HUGE_PAGES, **ONE_HEAP) < 8
