"""A worker without progress ends itself, and says where it stood."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.watchdog import STATUS

CODE = """
import sys, time
from pathlib import Path
from pipeline.watchdog import Watchdog

seconds, beats, pause, run = float(sys.argv[1]) or None, int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
def stuck():
    time.sleep(pause)
with Watchdog(seconds, "rank 3", run / "log.txt", run / "stacks.txt") as watchdog:
    for _ in range(beats):
        watchdog.beat()
        time.sleep(0.1)
    stuck()
"""


def work(run: Path, seconds: float, beats: int, pause: float) -> int:
    arguments = [str(seconds), str(beats), str(pause), str(run)]
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", CODE, *arguments], cwd=root, timeout=60, check=False).returncode


def test_no_progress_ends_the_process_with_its_stacks(tmp_path: Path) -> None:
    assert work(tmp_path, seconds=0.5, beats=2, pause=30) == STATUS
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.startswith("rank 3 saw no progress for 0.5 s (train.hang_timeout) and ends itself")
    assert "in stuck" in (tmp_path / "stacks.txt").read_text()


@pytest.mark.slow
def test_beats_keep_it_alive_and_the_clock_starts_with_the_first_one(tmp_path: Path) -> None:
    assert work(tmp_path, seconds=0.5, beats=8, pause=0) == 0  # 0.8 s, never 0.5 s without a beat
    assert work(tmp_path, seconds=0.2, beats=0, pause=0.6) == 0, "loading takes as long as it takes"
    assert work(tmp_path, seconds=0, beats=1, pause=0.6) == 0, "nobody would start it again"
    assert not (tmp_path / "log.txt").exists()


TWO = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from pipeline.watchdog import Watchdog

run, store = Path(sys.argv[1]), dist.HashStore()
waits, works = (Watchdog(0.5, f"rank {r}", run / "log.txt", run / "stacks.txt", store) for r in (0, 1))
with waits, works:
    waits.beat()
    for _ in range(15):
        works.beat()
        time.sleep(0.1)
    print("both live", flush=True)
    time.sleep(30)
"""


def test_a_rank_that_waits_for_one_that_works_lives_for_as_long_as_that_one_does(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(tmp_path)], cwd=root, timeout=60, check=False, capture_output=True, text=True
    )
    assert done.stdout == "both live\n"
    assert done.returncode == STATUS
