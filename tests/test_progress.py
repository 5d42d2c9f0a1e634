"""Who follows a run's metrics sees whole lines, also of a run that a new worker took up in between."""

from __future__ import annotations

import json
from pathlib import Path

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
