"""Drills: a loss that is not a number."""

from __future__ import annotations

import re

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.runs import Training
from pipeline import checkpoint
from pipeline.progress import METRICS_FILE, read_metrics


def nan_loss(bench: Bench) -> Outcome:
    """One row's loss is NaN: the run stops, in one line that names step and rows."""
    step = bench.every + 1
    with bench.training("nan", local=True) as training:
        last = _stop(bench, training, step)
        newest = checkpoint.latest(training.run)
        intact = newest == checkpoint.path_of(training.run, bench.every)
        named = re.search(rf"step {step + 1}: the loss is nan; .* row ids: \[([\d, ]+)\]", last)
        ok = intact and named is not None and str(_row(bench, step)) in named[1].split(", ")
        happened = f"stopped at step {step + 1} in one line with its row ids; checkpoint of step {bench.every} intact"
        return Outcome("NaN in the loss", happened if ok else last, ok)


def nan_skipped(bench: Bench) -> Outcome:
    """The same command with train.skip_nan goes on from there."""
    step = bench.every + 1
    with bench.training("nan-skipped", local=True) as training:
        _stop(bench, training, step)
        training.start(f"objective.poison={_row(bench, step)}", "train.skip_nan=1")
        training.finish()
        skipped = [line["step"] for line in read_metrics(training.run / METRICS_FILE) if "skipped" in line]
        finite = all(tensor.isfinite().all() for tensor in training.weights().values())
        ok = finite and len(skipped) == 2 and skipped[0] == step + 1 and "is left out" in training.log()
        happened = f"the same command with train.skip_nan=1 left out steps {skipped} and finished"
        return Outcome("NaN in the loss, then train.skip_nan", happened, ok)


DRILLS = [nan_loss, nan_skipped]


def _row(bench: Bench, step: int) -> int:
    """A row of that step (from 0)."""
    return bench.quiet(local=True).processes()[0][step].rows[0]


def _stop(bench: Bench, training: Training, step: int) -> str:
    """Train into the NaN; what the run says last."""
    training.start(f"objective.poison={_row(bench, step)}")
    training.finish(status=2)
    return training.log().strip().splitlines()[-1]
