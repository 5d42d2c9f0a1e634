"""The reference scores what a run reads, in its order, and each row with the same others whatever happened before."""

from __future__ import annotations

import errno
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline import data, fencing, loop, reference, reference_pieces
from pipeline.driver import fit, job_for, open_run, prepare
from pipeline.errors import UserError
from pipeline.lease import Superseded
from pipeline.order import Plan
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.reference import Scoring
from pipeline.reference_pieces import Pieces
from pipeline.rows import Rows, manifest


@pytest.fixture
def scored_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the pieces that an actor computes, as it does so."""
    seen: list[int] = []
    compute = reference.ScoreRows.__call__

    def watched(self: reference.ScoreRows, item: dict) -> dict:
        seen.append(item["number"])
        return compute(self, item)

    monkeypatch.setattr(reference.ScoreRows, "__call__", watched)
    return seen


def rows_of(config) -> Rows:
    return Rows(data.prepare(config, config.model.path, local=True))


def logprobs(config, folder: Path) -> dict[int, list]:
    rows = Rows(data.prepare(config, config.model.path, local=True), folder)
    scored = np.setdiff1d(np.arange(len(rows)), rows.unscored(np.arange(len(rows))))
    return {int(i): rows[int(i)].ref_logprobs for i in scored}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("size", [1, 200, 10**6])
def test_pieces_hold_each_row_once_in_the_order_of_reading(
    make_config, monkeypatch: pytest.MonkeyPatch, size: int, epochs: int
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", size)
    config = make_config("data.eval_fraction=0.2", "train.rows_per_step=3", f"train.epochs={epochs}")
    rows = rows_of(config)
    split, pieces = rows.split(config.data, config.seed), Pieces.of(config, rows)
    assert sorted(pieces.positions.tolist()) == list(range(24))
    assert [pieces.numbers[i] for n in range(len(pieces)) for i in pieces.rows_of(n)] == sorted(pieces.numbers)
    assert pieces.tokens.tolist() == [rows.lengths[pieces.rows_of(n)].sum() for n in range(len(pieces))]
    plan = Plan(config, rows.lengths[split.train])
    first_read = np.concatenate([split.train[plan.positions(step)] for step in range(plan.steps_per_epoch)])
    assert pieces.positions[: len(first_read)].tolist() == first_read.tolist()
    steps = [set(pieces.numbers[split.train[plan.positions(step)]]) for step in range(plan.steps_per_epoch)]
    assert all(len(step) == 1 for step in steps), "a step is never cut"
    if size == 10**6:  # one step, two, four, …
        assert [len(pieces.rows_of(n)) for n in range(pieces.in_training)] == [3, 6, 10][: pieces.in_training]
    assert pieces.of_the_run[:1] == [0] and sorted(pieces.of_the_run) == list(range(len(pieces)))


def test_a_run_reads_no_more_than_its_steps_and_evaluations(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)  # a piece is a step
    changes = ("data.eval_fraction=0.2", "train.rows_per_step=2")
    short = make_config(*changes, "train.max_steps=3", "train.eval_every=2")
    pieces = Pieces.of(short, rows_of(short))
    held = list(range(pieces.in_training, len(pieces)))
    assert pieces.of_the_run == [0, 1, *held, 2]
    unevaluated = make_config("train.rows_per_step=2", "train.max_steps=3")
    assert Pieces.of(unevaluated, rows_of(unevaluated)).of_the_run == [0, 1, 2]


def test_training_begins_with_its_first_rows_and_scores_no_others(
    make_config, monkeypatch: pytest.MonkeyPatch, scored_pieces: list[int]
) -> None:
    """Three steps of a large file cost three steps' reference passes, the first one before the first step."""
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    short = make_config("train.rows_per_step=2", "train.max_steps=3")
    result = fit(short, local=True)
    assert scored_pieces == [0, 1, 2]
    assert result.metrics["loss"] > 0
    assert manifest(result.prepared.reference)["rows"] == 6
    # All of it then costs what is left, and each row's numbers are those of a scoring at once.
    whole = make_config("train.rows_per_step=2", "train.max_steps=12")
    continued = fit(whole, local=True)
    assert scored_pieces == list(range(12))
    assert continued.prepared.reference == result.prepared.reference
    at_once = make_config("train.rows_per_step=2", f"storage={Path(short.storage).parent / 'other'}")
    folder = reference.score(at_once, data.prepare(at_once, at_once.model.path, local=True), at_once.model.path, True)
    assert logprobs(whole, continued.prepared.reference) == logprobs(at_once, folder)


def test_rows_scored_while_training_and_before_it_train_the_same_bits(make_config, tmp_path: Path) -> None:
    config = make_config("train.epochs=2", "train.rows_per_step=4", "data.eval_fraction=0.2")
    while_training = fit(config, local=True)
    before = config.model_copy(update={"storage": str(tmp_path / "other")})
    prepare(before, local=True)
    after = fit(before, local=True)
    one, other = (read_metrics(result.run / METRICS_FILE) for result in (while_training, after))
    timed = {"tokens_per_second", "rows_per_second", "step_seconds"}
    kept = [[{k: v for k, v in line.items() if k not in timed} for line in lines] for lines in (one, other)]
    assert kept[0] == kept[1]
    assert (while_training.export / "model.safetensors").read_bytes() == (
        after.export / "model.safetensors"
    ).read_bytes()


def test_each_demand_scores_as_much_again(
    make_config, monkeypatch: pytest.MonkeyPatch, scored_pieces: list[int]
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    config = make_config("train.rows_per_step=2")
    folder = data.prepare(config, config.model.path, local=True)
    scoring = Scoring(config, folder, config.model.path, local=True)
    demands = []
    for number in range(len(scoring.pieces)):
        if number in scoring.missing([number]):
            scoring.for_reading(scoring.pieces.rows_of(number))
            demands.append(len(scored_pieces))
    assert scored_pieces == list(range(12))
    assert demands[0] == 1 and len(demands) <= 5, "the reference is loaded a few times"
    assert Rows(folder, scoring.folder, growing=True).unscored(np.arange(24)).tolist() == []


def test_another_order_of_the_same_rows_is_served_by_a_scoring_of_all(
    make_config, monkeypatch: pytest.MonkeyPatch, scored_pieces: list[int]
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    partly = prepare(make_config("train.max_steps=1"), local=True)
    other = prepare(make_config("seed=3", "train.max_steps=1"), local=True)
    assert other.reference != partly.reference, "a part of the rows serves its own order only"
    whole = prepare(make_config("seed=5"), local=True)
    scored_pieces.clear()
    for config in (make_config("seed=6"), make_config("train.rows_per_step=5")):
        served = prepare(config, local=True)
        assert served.reference == whole.reference
        assert open_run(config, served)[1] == open_run(config, prepare(config, local=True))[1]
    assert scored_pieces == []
    # A run that was begun stays with its own, so that no number changes on the way; its name does not depend on whose it is.
    assert prepare(make_config("train.max_steps=1"), local=True).reference == partly.reference
    assert {p.reference.parent for p in (partly, other, whole)} == {partly.reference.parent}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone"])
def test_a_damaged_piece_is_scored_again_and_no_other(
    make_config, monkeypatch: pytest.MonkeyPatch, scored_pieces: list[int], damage: str, trains: bool
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    config = make_config("train.rows_per_step=4")
    folder = prepare(config, local=True).reference
    expected = logprobs(config, folder)
    part = folder / "part-000002.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.unlink()
    if damage != "gone":
        part.write_bytes(content[: -9 if damage == "cut off" else None])
    scored_pieces.clear()
    if trains:
        fit(config, local=True)
        assert scored_pieces == [2]
    assert logprobs(config, prepare(config, local=True).reference) == expected
    assert scored_pieces == [2]


def waiting(make_config, monkeypatch: pytest.MonkeyPatch) -> partial[None]:
    """A worker's wait for a piece that nobody has scored; the lease is one of 0.3 s."""
    config = make_config("train.rows_per_step=2", "checkpoint.patience=1")
    prepared = prepare(config, local=True, work="later")
    run, _ = open_run(config, prepared)
    job = job_for(config, prepared, run, "first")
    prepared.reference.mkdir(parents=True, exist_ok=True)
    (run / "attempt").write_text("1")
    rows = Rows(job.rows, job.reference, growing=True)
    monkeypatch.setattr(loop, "confirm", partial(fencing.confirm, lease_seconds=0.3))
    wait = partial(loop.await_reference, job, rows, np.arange(2), 1, None, lambda: None)
    wait.job, wait.scoring = job, prepared.scoring
    return wait


@pytest.mark.timeout(30)
def test_a_worker_waits_for_no_piece_that_nobody_scores_for_it(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = waiting(make_config, monkeypatch)
    run = wait.job.run
    (run / "lease").write_text("first")
    with pytest.raises(Superseded, match="its driver is gone"):  # nobody renews it
        wait()
    (run / "lease").unlink()
    (run / "attempt").write_text("2")
    with pytest.raises(Superseded, match="attempt 2 has taken over"):
        wait()
    (run / "attempt").write_text("1")
    (run / "lease").write_text("another")
    with pytest.raises(Superseded, match="another driver has taken over"):
        wait()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("full", [False, True])
def test_a_scoring_that_fails_ends_the_wait_also_where_no_reason_can_be_written(
    make_config, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    wait = waiting(make_config, monkeypatch)
    write = reference.write_text

    def run_out(path: Path, text: str) -> None:
        if full and path.name == reference.REFUSED:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such reference")

    monkeypatch.setattr(reference, "write_text", run_out)
    monkeypatch.setattr(Scoring, "_make", fail)
    said = "reference: scoring ended early" if full else "reference: no such reference$"
    with (
        wait.scoring._beside([0], reference.actor_resources(wait.scoring.config)),
        pytest.raises(UserError, match=said),
    ):
        wait()
    assert [path.name for path in wait.scoring.folder.iterdir()] == [reference.REFUSED]


KILLED = """
import json, os, signal, sys
from pipeline import reference, reference_pieces
from pipeline.config_file import validate
from pipeline.driver import fit

def write(folder, number, table, write=reference.write_part):
    if number == 3:
        reference.part_of(folder, number).write_bytes(b"ARROW1")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, number, table)

reference.write_part, reference_pieces.PIECE_TOKENS = write, 1
fit(validate(json.loads(sys.argv[1])), local=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_scores_goes_on_with_the_same_bits(
    make_config, monkeypatch: pytest.MonkeyPatch, scored_pieces: list[int], tmp_path: Path
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    config = make_config("train.rows_per_step=4", "checkpoint.every=1")
    undisturbed = fit(config.model_copy(update={"storage": str(tmp_path / "other")}), local=True)
    scored_pieces.clear()
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(config.dump())], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    continued = fit(config, local=True)
    assert scored_pieces == [3, 4, 5], "none twice"
    assert (continued.export / "model.safetensors").read_bytes() == (
        undisturbed.export / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.ray
def test_on_a_cluster_with_room_rows_are_scored_beside_training(
    make_config, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reference_pieces, "PIECE_TOKENS", 1)
    config = make_config("train.rows_per_step=2", "train.epochs=2")
    here = fit(config.model_copy(update={"storage": f"{config.storage}-here"}), local=True)
    seen: list[Callable] = []
    beside = Scoring._beside
    monkeypatch.setattr(Scoring, "_beside", lambda *given: seen.append(given) or beside(*given))
    there = fit(config)
    assert seen, "a cluster of two CPUs has one left beside one worker"
    assert (here.export / "model.safetensors").read_bytes() == (there.export / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such reference")

    monkeypatch.setattr(Scoring, "_make", fail)
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="no such reference"):
        fit(config.model_copy(update={"storage": f"{config.storage}-fails", "name": "fails"}))
