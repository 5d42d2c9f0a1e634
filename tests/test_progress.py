"""Who follows a run's metrics sees whole lines, also of a run that a new worker took up in between."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.durable import write_json
from pipeline.fencing import Attempt
from pipeline.lease import Superseded
from pipeline.progress import Follower, MetricsFile, log_to, read_metrics, tell
from pipeline.run_log import RunLog


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


def test_only_the_newest_attempt_appends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Attempt.begin(run)
    old = MetricsFile(run / "metrics.jsonl", after=0, fence=first.current)
    for step in (1, 2, 3):
        old.append(step, {"loss": 1.0})
    new = MetricsFile(run / "metrics.jsonl", after=2, fence=Attempt.begin(run).current)
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        old.append(4, {"loss": 1.0})
    old.close()
    with pytest.raises(Superseded):
        MetricsFile(run / "metrics.jsonl", after=0, fence=first.current)
    new.append(3, {"loss": 2.0})
    assert read_metrics(run / "metrics.jsonl") == [
        {"step": n, "loss": loss} for n, loss in ((1, 1.0), (2, 1.0), (3, 2.0))
    ]


def test_a_superseded_driver_leaves_the_log_alone(tmp_path: Path) -> None:
    said = logging.getLogger("pipeline.test")
    superseded = [False]
    with log_to(tmp_path / "log.txt", lambda: superseded[0]):
        said.warning("before")
        superseded[0] = True
        said.warning("after")
    text = (tmp_path / "log.txt").read_text()
    assert "before" in text and "after" not in text
    (tmp_path / "log.txt").write_text("cut of")
    tell(tmp_path, "a line")
    assert (tmp_path / "log.txt").read_text() == "cut of\na line\n"


# --------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Steps 1 to 9; the lines of 3, 5, 6 and 8 are damaged. A checkpoint knows step 3, the log some numbers of step 8."""
    lines = [json.dumps({"step": step, "loss": step / 10, "accuracy": 1.0}).encode() for step in range(1, 10)]
    lines[2], lines[4], lines[5], lines[7] = lines[2][:9], b"\0" * 20, b"null", b'{"step": "8", "loss": 1}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    saved = tmp_path / "checkpoints" / "step-00000003"
    saved.mkdir(parents=True)
    write_json(saved / "state.json", {"step": 3, "best": None, "metrics": {"loss": 0.3, "accuracy": 1.0}})
    log = RunLog(tmp_path, 0, 1)
    log.start(1, 0, 9)
    log.stepped(8, {"loss": 0.8, "accuracy": 1.0})
    return tmp_path / "metrics.jsonl"


def test_damaged_lines_are_told_and_their_numbers_are_looked_for(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_metrics(damaged)
    assert [(line["step"], line["loss"]) for line in found] == [(n, n / 10) for n in (1, 2, 3, 4, 7, 8, 9)]
    assert found[2]["accuracy"] == 1.0
    assert "accuracy" not in found[5]
    read_metrics(damaged)
    assert [record.getMessage() for record in caplog.records] == [
        f"{damaged}:3: damaged lines 3, 5–6, 8; steps 3, 8 are taken from checkpoints and logs; steps 5–6 are missing"
    ]


def test_the_next_start_writes_what_was_found_and_what_is_missing_stays_known(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(damaged, after=8)
    file.append(9, {"loss": 0.9})
    caplog.clear()
    (damaged.parent / "checkpoints" / "step-00000003" / "state.json").unlink()
    assert [line["step"] for line in read_metrics(damaged)] == [1, 2, 3, 4, 7, 8, 9]
    assert [record.getMessage() for record in caplog.records] == [f"{damaged}: steps 5–6 are missing"]


def test_a_step_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 1, "loss": 3}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
