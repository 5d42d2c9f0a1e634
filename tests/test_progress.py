"""Who follows a run's metrics sees whole lines, also of a run that a new worker took up in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.progress import Follower, MetricsFile, read_metrics


def steps(follower: Follower) -> list[int]:
    return [json.loads(line)["step"] for line in follower.new_lines()]


def test_a_file_that_a_resumed_worker_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, after=0)
    follower = Follower(path)
    for step in range(1, 6):
        first.append(step, {"loss": 0.123456789})
    assert follower.grew
    assert steps(follower) == [1, 2, 3, 4, 5]
    assert not follower.grew
    first.close()
    resumed = MetricsFile(path, after=3)
    for step in range(4, 20):  # past the place where the follower stood, before it looks again
        resumed.append(step, {"loss": 1.0})
    assert follower.grew
    assert steps(follower) == list(range(1, 20))
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 20))
    resumed.append(20, {"loss": 1.0})
    assert steps(follower) == [20]
    resumed.close()


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert not follower.grew
    assert follower.new_lines() == []
    path.write_text('{"step": 1}\n{"st')
    assert steps(follower) == [1]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert steps(follower) == [2]


def test_what_was_there_before_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("old\n")
    follower = Follower(path, from_end=True)
    with path.open("a") as file:
        file.write("new\n")
    assert follower.new_lines() == ["new"]


def test_the_time_left_after_a_resume_counts_its_own_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 of 200 steps are there before; each takes 2 s from then on, behind 60 s in which workers start; again after a restart."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 101)))
    seen: list[int] = []
    monitor = progress.Monitor(tmp_path, 200, lambda step, _: seen.append(step))
    for after, last in ((100, 120), (115, 130)):
        log = MetricsFile(path, after)
        clock[0] += 60
        for step in range(after + 1, last + 1):
            log.append(step, {"loss": 1.0})
            monitor._drain()
            clock[0] += 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train ")]
    times = {int(line.split()[1].split("/")[0]): line.partition(" ETA ")[2] for line in lines}
    timed = {step: left for step, left in times.items() if left}
    assert len(timed) > 3 and min(timed) < 115 < max(timed)
    assert timed == {step: f"{2 * (200 - step)}s" for step in timed}
    assert seen == list(range(1, 131))
