"""Each rank's events are whole JSON lines that say which run, attempt, rank and step they are of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.errors import Leaving
from pipeline.run_log import RunLog, last_start, path_of, read_events


def test_every_line_has_the_place_it_was_written_at(tmp_path: Path) -> None:
    run = tmp_path / "dpo-0123"
    with RunLog(run, rank=1, workers=2) as log:
        log.start(attempt=3, step=20, total_steps=90)
        log.stepped(21, {"loss": 0.5, "accuracy": 1.0})
        log.stepped(22, {"loss": 0.4})  # within ten seconds
        logging.getLogger("some.library").warning("disk %s is slow", "a")
        log.event("checkpoint", seconds=0.25)
    events = [json.loads(line) for line in path_of(run, 1).read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "step", "log", "checkpoint", "end"]
    for event in events:
        assert (event["run"], event["attempt"], event["rank"], event["workers"]) == ("dpo-0123", 3, 1, 2)
    assert [event["step"] for event in events] == [20, 21, 22, 22, 22]
    assert events[0]["total_steps"] == 90
    assert events[1]["loss"] == 0.5
    assert events[2]["message"] == "disk a is slow"
    logging.getLogger("some.library").warning("after the end")
    assert len(list(read_events(path_of(run, 1)))) == 5


def test_a_failure_is_told_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, 0, 1):
        _ = 1 / 0
    (event,) = read_events(path_of(tmp_path, 0))
    assert event["event"] == "failed"
    assert event["error"] == "ZeroDivisionError: division by zero"
    assert "_ = 1 / 0" in event["traceback"]


def test_leaving_when_told_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Leaving), RunLog(tmp_path, 0, 1):
        raise Leaving("SIGTERM: step 3 is saved")
    (event,) = read_events(path_of(tmp_path, 0))
    assert (event["event"], event["reason"]) == ("left", "SIGTERM: step 3 is saved")


def test_storage_that_is_away_stops_nothing_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 1) as log:
        path_of(tmp_path, 0).parent.rename(tmp_path / "away")
        log.event("checkpoint")
        log.event("checkpoint")
        (tmp_path / "away").rename(path_of(tmp_path, 0).parent)
        log.event("checkpoint")
    assert [event.get("lost") for event in read_events(path_of(tmp_path, 0))] == [2, None]


def test_attempts_share_the_file_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert last_start(tmp_path) is None
    for attempt, workers in ((1, 2), (2, 1)):
        with RunLog(tmp_path, 0, workers) as log:
            log.start(attempt, 10 * attempt, 90)
        with path_of(tmp_path, 0).open("a") as file:
            file.write('{"event": "sta\n')
    start = last_start(tmp_path)
    assert start is not None
    assert (start["attempt"], start["workers"], start["step"]) == (2, 1, 20)


def test_no_secret_is_in_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-9")

    def fail() -> None:
        logging.getLogger("some.library").warning("no answer from %s", "http://user:pw-9@host/x")
        raise OSError("swordfish-9 is refused")

    with pytest.raises(OSError, match="swordfish"), RunLog(tmp_path, 0, 1):
        fail()
    log, failed = read_events(path_of(tmp_path, 0))
    assert log["message"] == "no answer from http://***@host/x"
    assert failed["error"] == "OSError: *** is refused"
    assert "swordfish" not in failed["traceback"]


DAMAGES = [
    b'{"event": "sta',
    b"\0" * 40,
    b"\xff\xfe\x80",
    b"null",
    b"[]",
    b"{}",
    b'"start"',
    b"[" * 100_000,
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "step", "rank": "0", "workers": 1, "attempt": 1, "step": 1}',
    b'{"time": "yesterday", "event": "step", "rank": 0, "workers": 1, "attempt": 1, "step": 1}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "start", "rank": 0, "workers": 1, "attempt": null, "step": 1}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "start", "rank": 0, "workers": 1, "attempt": 9, "step": 1}',
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_skipped_and_counted(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path, 0, 2)
    log.start(1, 0, 90)
    with path_of(tmp_path, 0).open("ab") as file:
        file.write(damage + b"\n" + damage)  # the second one has no end: the next event must not be lost with it
    log.event("end")
    assert [event["event"] for event in read_events(path_of(tmp_path, 0))] == ["start", "end"]
    assert last_start(tmp_path)["attempt"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{path_of(tmp_path, 0)}:2: 2 damaged lines are skipped"
    ]


def test_a_superseded_driver_s_workers_write_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text("mine")
    log = RunLog(tmp_path, 0, 1, owner="mine")
    log.start(1, 0, 90)
    (tmp_path / "lease").write_text("another's")
    log.event("end")
    assert [event["event"] for event in read_events(path_of(tmp_path, 0))] == ["start"]
