"""The fault drills: their bookkeeping by worked examples, and (slow) the drills themselves, in their short form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import broken, saving
from benchmarks.faults.__main__ import DRILLS, page
from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.errors import DrillError
from benchmarks.faults.history import check_epochs, history, order_of
from benchmarks.faults.runs import Seen
from pipeline.config import DataConfig, Source
from pipeline.data import make_rows
from pipeline.rendering import Renderer
from pipeline.sources import plan
from tests.conftest import tiny_tokenizer

# -------------------------------------------------------------------------------------------------- history

ROWS = [[(0, 1), (2, 3)], [(4, 5), (6, 7)], [(0, 2), (1, 3)], [(4, 6), (5, 7)]]
"""Rows of each step (two epochs of two steps), by rank."""


def process(rank: int, start: int, stop: int, time: float) -> list[Seen]:
    """What one rank saw from step `start` on, a second a step."""
    return [Seen(time + i, rank, ROWS[start + i][rank]) for i in range(stop - start)]


def group(start: int, stop: int, time: float) -> list[list[Seen]]:
    return [process(rank, start, stop, time + 0.1 * rank) for rank in (0, 1)]


ORDER = order_of(group(0, 4, 0.0), 2)


def test_an_undisturbed_run_repeats_nothing() -> None:
    found = history(group(0, 4, 0.0), ORDER)
    assert (found.starts, found.repeated, found.recovered, found.steps) == ((0,), (), (), 4)


def test_a_group_that_begins_again_repeats_finished_steps() -> None:
    """Killed in step 2 (from 0), so 0 and 1 were finished; it goes on from the checkpoint of one step."""
    found = history([*group(0, 3, 0.0), *group(1, 4, 20.0)], ORDER)
    assert found.starts == (0, 1)
    assert found.repeated == (1,)
    assert found.recovered == (pytest.approx(20.0 - 2.1),)
    one_rank_was_late = [process(0, 0, 3, 0.0), process(1, 0, 2, 0.1), *group(2, 4, 20.0)]
    assert history(one_rank_was_late, ORDER).repeated == (0,)


def test_lost_and_misplaced_steps_are_noticed() -> None:
    with pytest.raises(DrillError, match="the steps between 0 and 2 are missing"):
        history([*group(0, 1, 0.0), *group(2, 4, 9.0)], ORDER)
    with pytest.raises(DrillError, match="the steps 0 to 2 of 4 were seen"):
        history(group(0, 3, 0.0), ORDER)
    with pytest.raises(DrillError, match=r"rank 0 went through the steps \[0, 2\]"):
        history([[Seen(0, 0, ROWS[0][0]), Seen(1, 0, ROWS[2][0])]], ORDER)
    with pytest.raises(DrillError, match=r"used the rows \(0, 7\) together"):
        history([[Seen(0, 0, (0, 7))]], ORDER)


def test_rows_that_are_used_twice_are_noticed() -> None:
    check_epochs([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]])
    with pytest.raises(DrillError, match=r"rows \[1\] were used twice"):
        check_epochs([[0, 1], [1, 3], [2, 0]])
    with pytest.raises(DrillError, match=r"rows \[3\] were used twice"):
        check_epochs([[0, 1], [2, 3], [0, 3], [3, 2]])
    with pytest.raises(DrillError, match="3 processes"):
        order_of([*group(0, 4, 0.0), process(0, 0, 4, 9.0)], 2)


def test_the_table_says_what_failed() -> None:
    found = {"a": Outcome("did", "happened", True, 12.34, 3, True), "b": Outcome("did", "lost", False, equal=False)}
    first, second = page(found).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "a",
        "did",
        "happened",
        "12.3",
        "3",
        "to the last bit",
        "ok",
    ]
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["b", "did", "lost", "–", "–", "NO", "FAILED"]


# ------------------------------------------------------------------------------------------- broken records


def test_broken_records_are_quarantined_for_what_they_were_broken_for(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    count = broken.write_broken(path, 400)
    assert count == 400 // broken.EVERY
    made = plan([Source(path=str(path))], tmp_path / "work", chunk_bytes=20_000)
    render = Renderer(tiny_tokenizer(), DataConfig(kind="preference", sources=(Source(path="x"),), max_length=4096))
    parts = [make_rows(chunk, render, mismatched=False) for chunk in made.chunks]
    rows, bad = sum(len(part.rows) for part in parts), [entry["reason"] for part in parts for entry in part.bad]
    whole = {"records": 400, "rows": rows, "on_disk": rows, "quarantined": len(bad), "in_quarantine": len(bad)}
    broken.check(whole | {"reasons": Counter(bad)}, 400, count)
    assert len(set(bad)) == len(broken.BREAKS)
    with pytest.raises(DrillError, match="other reasons"):
        broken.check(whole | {"reasons": Counter(["bad UTF-8"] * count)}, 400, count)
    with pytest.raises(DrillError, match="400 records of which 20 are broken became"):
        broken.check(whole | {"in_quarantine": count - 1, "reasons": Counter(bad)}, 400, count)


def test_growth_is_told() -> None:
    found = {
        n: {"rows": n, "quarantined": 1, "reasons": {}, "seconds": 1.0, "peak": peak}
        for n, peak in ((10, 2**30), (100, 2**31))
    }
    assert broken.growth(found) == 2.0
    assert "Memory from 10 to 100 records: 2.00 × (at most 1.25 ×)" in broken.page(found)


# -------------------------------------------------------------------------------------- cost of a checkpoint


def test_the_cost_of_a_checkpoint_is_that_of_the_steps_it_touches() -> None:
    def block(mode: str, first: float, second: float, rest: float = 1.0) -> saving.Block:
        busy = [mode != "none", mode == "background", *[False] * 18]
        return saving.Block(mode, [first, second, *[rest] * 18], busy, 0.1, 100)

    blocks = [block("none", 1.0, 1.0), block("in step", 2.0, 1.0), block("background", 1.2, 1.4, rest=1.5)]
    found = saving.costs(blocks)
    assert found["none"]["extra"] == 0
    assert found["in step"]["extra"] == pytest.approx(1.0)
    assert found["background"]["extra"] == pytest.approx(0.6), "steps after it was written are chance"
    assert found["background"]["share"] == pytest.approx(0.03)
    assert "3.0%, met" in saving.page(blocks, found)


# --------------------------------------------------------------------------------------------------- drills


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One cluster for all drills of this module."""
    with Bench(tmp_path_factory.mktemp("drills"), quick=True) as made:
        yield made


def succeeds(bench: Bench, name: str) -> None:
    found = DRILLS[name](bench)
    assert found.ok, json.dumps([found.did, found.happened, found.repeated, found.equal])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_disk_for_a_while", "unreachable"])
def test_storage(bench: Bench, name: str) -> None:
    succeeds(bench, name)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ["hung_worker", "random_kills", "killed_data_actor", "killed_node"])
def test_processes(bench: Bench, name: str) -> None:
    succeeds(bench, name)
