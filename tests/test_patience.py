"""Storage that comes back is waited for; what waiting cannot mend is not."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import patience
from pipeline.patience import StorageFailed, patiently
from pipeline.progress import MetricsFile, read_metrics


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES", (0.01,))


def failing(number: int, times: int) -> Callable[[], int]:
    """Raises OSError `times` times, then returns how often it was called."""
    calls = []

    def act() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, "said the disk", "file")
        return len(calls)

    return act


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_may_pass_is_tried_again_and_told_once(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert patiently(failing(number, 3), tmp_path, 5) == 4
    first, last = (record.getMessage() for record in caplog.records)
    assert "said the disk" in first and "trying again for 5 s" in first
    assert last.startswith("storage: works again after")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR])
def test_what_cannot_pass_is_raised_at_once(number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OSError, match="said the disk"):
        patiently(failing(number, 1), tmp_path, 5)
    assert not caplog.records


def test_a_folder_that_went_away_comes_back(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    away.mkdir()
    threading.Timer(0.1, lambda: away.rename(run)).start()
    assert patiently((run / "file").touch, run, 5) is None
    assert (run / "file").exists()


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EIO, "mend the storage")])
def test_patience_ends_in_one_line(number: int, remedy: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(StorageFailed, match=rf"^storage: .*said the disk.*, for 0 s; {remedy}, then the same command"):
        patiently(failing(number, 10**6), tmp_path, 0.1)
    assert 0.1 <= time.monotonic() - began < 2


def test_nobody_waits_who_is_in_a_hurry(tmp_path: Path) -> None:
    hurry = threading.Event()
    threading.Timer(0.1, hurry.set).start()
    began = time.monotonic()
    with pytest.raises(StorageFailed):
        patiently(failing(errno.EIO, 10**6), tmp_path, 60, hurry)
    assert time.monotonic() - began < 5


# -------------------------------------------------------------------------------------------------- metrics


def test_lines_wait_for_storage_and_training_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    file = MetricsFile(run / "metrics.jsonl", after=0, patience=60)
    file.append(1, {"loss": 1.0})
    run.rename(away)
    began = time.monotonic()
    file.append(2, {"loss": 2.0})
    file.append(3, {"loss": 3.0})
    assert time.monotonic() - began < 0.1, "training waits"
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    away.rename(run)
    file.append(4, {"loss": 4.0})
    file.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")] == [
        (n, n) for n in range(1, 5)
    ]


def test_lines_that_wait_at_the_end_are_written_when_storage_is_back(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    file = MetricsFile(run / "metrics.jsonl", after=0, patience=60)
    run.rename(away)
    file.append(1, {"loss": 1.0})
    threading.Timer(0.1, lambda: away.rename(run)).start()
    file.close()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1]


def test_lines_do_not_wait_for_ever(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    file = MetricsFile(run / "metrics.jsonl", after=0, patience=0.05)
    run.rename(tmp_path / "away")
    file.append(1, {})
    time.sleep(0.1)
    with pytest.raises(StorageFailed, match=r"metrics\.jsonl'; mend it, then the same command goes on$"):
        file.append(2, {})
