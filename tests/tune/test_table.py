"""The durable table: what is done is never forgotten, and what was cut off never counts."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tune.table import JOURNAL, Table, Trial


def trial(number: int, state: str = "finished", accuracy: float | None = None, **changes) -> Trial:
    metrics = {} if accuracy is None else {"eval/accuracy": accuracy, "loss": 1.0}
    overrides = {"objective.beta": number / 10}
    return Trial(number, {"objective.beta": number}, overrides, f"/runs/{number}", state, 4, metrics, **changes)


def test_what_was_put_is_there_after_a_restart_and_the_last_line_counts(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.put(trial(1, "running"))
    table.put(trial(2, "running"))
    table.put(trial(1, "finished", 0.7))
    again = Table(tmp_path)
    assert again.trials == table.trials
    assert [t.number for t in again.done()] == [1] and [t.number for t in again.unfinished()] == [2]
    assert again.next_number() == 3


def test_a_line_that_a_crash_cut_off_is_forgotten_and_not_glued_to_the_next(tmp_path: Path) -> None:
    Table(tmp_path).put(trial(1))
    whole = (tmp_path / JOURNAL).read_text()
    (tmp_path / JOURNAL).write_text(whole + whole[:40])
    table = Table(tmp_path)
    assert list(table.trials) == [1]
    table.put(trial(2))
    assert list(Table(tmp_path).trials) == [1, 2]


def test_only_ends_that_another_try_would_not_change_are_done(tmp_path: Path) -> None:
    table = Table(tmp_path)
    for number, state in enumerate(["finished", "stopped", "diverged", "failed", "running"], 1):
        table.put(trial(number, state))
    assert [t.state for t in table.done()] == ["finished", "stopped", "diverged"]
    assert [t.state for t in table.unfinished()] == ["failed", "running"]


@pytest.mark.parametrize(("maximise", "first"), [(True, 3), (False, 2)])
def test_the_best_is_a_finished_trial_with_a_number(tmp_path: Path, maximise: bool, first: int) -> None:
    table = Table(tmp_path)
    table.put(trial(1, "stopped", 0.99 if maximise else 0.01))
    table.put(trial(2, "finished", 0.5))
    table.put(trial(3, "finished", 0.8))
    table.put(trial(4, "finished", float("nan")))
    table.put(trial(5, "diverged", 0.999 if maximise else 0.001))
    table.put(trial(6, "finished"))
    assert table.best("eval/accuracy", maximise).number == first
    assert table.ranked("eval/accuracy", maximise)[0].number == first
    assert table.best("eval/loss", maximise) is None
    assert [t.value("eval/accuracy") for t in (trial(1, "stopped", 0.3), trial(2, "diverged", 0.3))] == [0.3, None]


def test_the_summary_has_a_row_per_trial_best_first(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.put(trial(1, "finished", 0.5))
    table.put(trial(2, "finished", 0.9, evaluation={"samples/kl": 1.5}))
    table.put(trial(3, "failed", reason='a worker died, "killed"'))
    with table.write_summary("eval/accuracy", True).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["002", "001", "003"]
    assert (rows[0]["objective.beta"], rows[0]["eval/accuracy"], rows[0]["evaluation/samples/kl"]) == (
        "0.2",
        "0.9",
        "1.5",
    )
    assert (rows[2]["reason"], rows[2]["eval/accuracy"]) == ('a worker died, "killed"', "")
    assert "loss" not in rows[0], "one training step's loss says little"
