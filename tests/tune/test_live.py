"""The sweep's table on the terminal: which trials a low screen shows, and what the last table adds."""

from __future__ import annotations

import io

from rich.console import Console

from tune.live import chosen, counts, grid
from tune.table import Trial


def trials() -> list[Trial]:
    """Twenty: trial 3 is the best finished one, 4 diverged, 5 and 6 run, the rest is ever worse."""
    found = [
        Trial(n, {}, {"objective.beta": n / 10}, "run", "finished", metrics={"m": -float(n)}) for n in range(7, 21)
    ]
    found += [
        Trial(3, {}, {}, "run", "finished", metrics={"m": 9.0}),
        Trial(1, {}, {}, "run", "finished", metrics={"m": -50.0}),
    ]
    found += [
        Trial(4, {}, {}, "run", "diverged", metrics={"m": 99.0}),
        Trial(2, {}, {}, "run", "stopped", metrics={"m": -60.0}),
    ]
    return [*found, Trial(5, {}, {}, "run"), Trial(6, {}, {}, "run", metrics={"m": 0.0})]


def test_a_low_screen_shows_those_that_run_the_best_and_the_newest() -> None:
    assert [t.number for t in chosen(trials(), 8, "m", True)] == [3, 5, 6, 7, 17, 18, 19, 20]  # 3 and 7 are the best
    assert [t.number for t in chosen(trials(), 4, "m", False)] == [
        2,
        5,
        6,
        20,
    ]  # least is best: 2, where it was stopped
    assert [t.number for t in chosen(trials(), 30, "m", True)] == list(range(1, 21))


def test_the_caption_counts_states_and_tells_of_hidden_rows() -> None:
    assert counts(trials(), 8) == "2 running, 16 finished, 1 stopped, 1 diverged; 8 of 20 shown"
    assert counts(trials()[:2], 2) == "2 finished"


def test_evaluated_trials_have_columns_for_reward_and_kl() -> None:
    measured = Trial(1, {}, {}, "run", "finished", evaluation={"samples/reward": 0.25, "samples/kl": 3.5})

    def shown(*rows: Trial) -> str:
        console = Console(file=io.StringIO(), width=160)
        console.print(grid(rows, "m", "t"))
        return console.file.getvalue()

    text = shown(measured, Trial(2, {}, {}, "run", "failed", reason="no [bold]markup[/]"))
    assert "samples/reward" in text and "0.2500" in text and "3.5000" in text
    assert "no [bold]markup[/]" in text
    assert "samples/reward" not in shown(Trial(2, {}, {}, "run"))
