"""Checkpoints are committed by the newest attempt of a living driver only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.fencing import Attempt, next_attempt
from pipeline.lease import Lease, Superseded
from tests.test_checkpoint import WEIGHTS, save

SOON = 0.3  # seconds that a lease lasts in these tests


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_only_the_newest_attempt_commits(run: Path) -> None:
    assert next_attempt(run) == 1
    old = Attempt.begin(run)
    first = save(old, 10)
    half_written = old.temporary(20)
    checkpoint.write_tensors(half_written / "weights-00001-of-00001.safetensors", WEIGHTS)
    new = Attempt.begin(run)
    assert (old.number, new.number, next_attempt(run)) == (1, 2, 3)
    assert not half_written.exists(), "what older attempts left half written is removed"
    with pytest.raises(FileNotFoundError):
        checkpoint.write_tensors(half_written / "weights-00002-of-00002.safetensors", WEIGHTS)
    with pytest.raises(Superseded, match=r"^.*attempt 1 may not commit, attempt 2 has taken over$"):
        save(old, 20)
    assert checkpoint.latest(run) == first
    assert checkpoint.latest(run) != save(new, 20)


def test_attempts_begun_at_once_get_different_numbers(run: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: Attempt.begin(run).number, range(40)))
    assert sorted(numbers) == list(range(1, 41))


def test_commit_needs_a_living_driver(run: Path) -> None:
    with Lease(run, interval=0.05):
        attempt = Attempt.begin(run, SOON)
        time.sleep(2 * SOON)
        alive = save(attempt, 10)
    started = time.monotonic()
    with pytest.raises(Superseded, match=r"^.*its driver is gone; start the same command again to go on$"):
        save(attempt, 20)
    assert time.monotonic() - started >= SOON, "it has to wait for a renewal first"
    with pytest.raises(Superseded, match="its driver is gone"):
        Attempt.begin(run, SOON)
    (run / "lease").unlink()
    with pytest.raises(Superseded, match="its driver is gone"):
        save(attempt, 20)
    assert checkpoint.latest(run) == alive


@pytest.mark.slow
def test_a_driver_that_was_killed(run: Path) -> None:
    """No goodbye: the lease just stops being renewed. The next driver takes over."""
    code = "import sys, time; from pathlib import Path; from pipeline.lease import Lease\n"
    code += "with Lease(Path(sys.argv[1]), 0.05): print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        orphan = Attempt.begin(run, SOON)
        save(orphan, 10)
        driver.kill()
    time.sleep(1.2 * SOON)
    with pytest.raises(Superseded, match="its driver is gone"):
        save(orphan, 20)
    with Lease(run, interval=0.05):
        successor = Attempt.begin(run, SOON)
        save(successor, 20)
        with pytest.raises(Superseded, match="attempt 2 has taken over"):
            save(orphan, 30)


def test_a_machine_that_was_suspended_goes_on(run: Path) -> None:
    """Old when the worker wakes up, renewed a moment later."""
    with Lease(run, interval=SOON / 3) as lease:
        attempt = Attempt.begin(run, SOON)
        os.utime(run / "lease", (1, 1))
        save(attempt, 10)
        assert lease._thread.is_alive()
    assert checkpoint.latest(run) == checkpoint.path_of(run, 10)


def test_an_attempt_without_a_lease_answers_to_no_driver(run: Path) -> None:
    started = time.monotonic()
    save(Attempt.begin(run), 10)
    assert time.monotonic() - started < 5


# ----------------------------------------------------------------------------------------- who gets the run

ENTER = """
import sys, time; from pathlib import Path; from pipeline.lease import Lease, Superseded
sys.stdin.readline()
try:
    with Lease(Path(sys.argv[1]), 0.05):
        print("mine", flush=True); sys.stdin.read()
except Superseded as error:
    print(error, flush=True)
"""


def test_of_drivers_that_start_at_once_exactly_one_gets_the_run(run: Path) -> None:
    """After a driver that was killed a moment ago, whose lease still looks alive, and after one that ended."""
    run.mkdir()
    command = [sys.executable, "-c", ENTER, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    for owner, age in (("killed", 0.0), ("ended", 1e9), (None, 0.0)):
        if owner is None:
            (run / "lease").unlink()
        drivers = [subprocess.Popen(command, **pipes) for _ in range(4)]
        if owner is not None:
            (run / "lease").write_text(owner)
            os.utime(run / "lease", (time.time() - age,) * 2)
        for driver in drivers:
            driver.stdin.write("go\n")
            driver.stdin.flush()
        told = [driver.stdout.readline().strip() for driver in drivers]
        assert told.count("mine") == 1, told
        assert (
            sum(line.endswith("another driver is training this run; wait for it or stop it first") for line in told)
            == 3
        )
        for driver in drivers:
            driver.stdin.close()
            driver.wait()
            driver.stdout.close()


def test_a_driver_that_lost_the_run_may_do_nothing_more(run: Path) -> None:
    """It was suspended for longer than its lease; the next driver's lease is not renewed by it."""
    with Lease(run, interval=0.02) as old:
        attempt = Attempt.begin(run, owner=old.owner)
        save(attempt, 10)
        os.utime(run / "lease", (1, 1))
        (run / "lease").write_text("next")
        os.utime(run / "lease", (5, 5))
        time.sleep(0.1)
        assert old.lost
        assert (run / "lease").stat().st_mtime == 5, "it renews what is not its own"
        with pytest.raises(Superseded, match="another driver has taken over"):
            old.confirm()
    assert (run / "lease").read_text() == "next"
    os.utime(run / "lease")
    with pytest.raises(Superseded, match="another driver has taken over"):
        save(attempt, 20)
    with pytest.raises(Superseded, match="another driver has taken over"), attempt.current():
        pass
    with pytest.raises(Superseded, match="another driver has taken over"):
        Attempt.begin(run, owner=old.owner)
    assert next_attempt(run) == 2, "what may not begin takes no number"


def test_storage_that_is_away_takes_no_run_over(run: Path) -> None:
    with Lease(run, interval=0.02) as lease:
        run.rename(run.with_name("away"))
        time.sleep(0.1)
        assert not lease.lost
        run.with_name("away").rename(run)
        lease.confirm()
        os.utime(run / "lease", (1, 1))
        time.sleep(0.1)
        assert (run / "lease").stat().st_mtime > 1


def test_a_new_driver_clears_what_a_killed_one_was_writing(run: Path) -> None:
    run.mkdir()
    left = run / f".metrics.jsonl.{'a' * 12}.tmp"
    left.touch()
    os.utime(left, (1, 1))
    with Lease(run):
        assert not left.exists()
