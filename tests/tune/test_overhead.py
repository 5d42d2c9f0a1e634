"""Where a trial's seconds went."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.run_log import path_of
from tune.overhead import describe, spent


def write(run: Path, *events: tuple[str, float]) -> None:
    path = path_of(run, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for event, seconds in events:
            place = {"rank": 0, "workers": 1, "attempt": 1, "step": 0, "total_steps": 9}
            time = datetime.fromtimestamp(seconds, UTC).isoformat()
            file.write(json.dumps({"event": event, "time": time, **place}) + "\n")


def test_parts_of_a_trial(tmp_path: Path) -> None:
    write(tmp_path, ("start", 50.0), ("step", 60.0))  # an attempt that was killed before
    write(tmp_path, ("start", 103.0), ("step", 105.0), ("step", 115.0), ("checkpoint", 119.0), ("end", 120.0))
    parts = spent(tmp_path, began=100.0, ended=120.5)
    assert parts == {"waiting": 3.0, "loading": 2.0, "training": 15.0, "ending": 0.5}


def test_a_trial_without_a_step_tells_nothing(tmp_path: Path) -> None:
    assert spent(tmp_path, 0.0, 1e9) == {}
    write(tmp_path, ("start", 103.0), ("failed", 104.0))
    assert spent(tmp_path, 100.0, 110.0) == {}


def test_the_line_tells_medians() -> None:
    trials = [{"waiting": w, "loading": 1.0, "training": 99.0, "ending": 0.25} for w in (9.0, 0.5, 0.75)]
    assert describe([*trials, {}]) == (
        "2.0 s a trial beside its training (waiting 0.8, loading 1.0, ending 0.2; medians of 3)"
    )
    assert describe([{}]) == ""


def test_a_real_trial_adds_up(make_config, tmp_path: Path) -> None:
    from tune.sweep import conduct

    config = make_config("sweep={space: {objective.beta: [0.1]}, metric: loss}", "train.max_steps=3")
    (trial,) = conduct(config, local=True).sweep.table.trials.values()
    assert set(trial.spent) == {"waiting", "loading", "training", "ending"}
    assert min(trial.spent.values()) >= 0.0
    assert sum(trial.spent.values()) == pytest.approx(trial.seconds, abs=0.05)
