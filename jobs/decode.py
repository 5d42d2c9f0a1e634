"""Decode from a checkpoint: prompts in, one line per completion out (jsonl or parquet). A second call does what is missing."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.decoding.pieces import Piece
    from pipeline.decoding.task import DecodingTask

HELP = (
    "Complete prompts (sampling.*) by sampling, search or value-guided decoding (decoding.*) from a checkpoint, run or model "
    "(checkpoint_from=…) into a jsonl or parquet file, or a folder that datasets reads."
)


def run(config: RunConfig, options: argparse.Namespace) -> None:
    from pipeline.decoding.task import describe

    task, done_before = decoded(config, options.local)
    if done_before:
        print(f"already decoded; delete it to decode again\nwritten            {task.output}")
        return
    facts = task.facts()
    for name, value in describe(facts).items():
        print(f"{name:18} {value}")
    if facts["refused"]:
        print(f"quarantined        {facts['refused']:.0f}: see {task.quarantine}")
    print(f"written            {task.output}")


def decoded(config: RunConfig, local: bool) -> tuple[DecodingTask, bool]:
    """The task with its output written, and whether it was there already.

    Raises ConfigError for what cannot work, mostly before any work, and where no prompt was usable.
    """
    from pipeline.decoding.pieces import DecodePiece
    from pipeline.decoding.task import plan_task
    from pipeline.evaluation.held_out import resources
    from pipeline.stage import run_stage

    task = plan_task(config, local)
    done_before = task.finished()
    if not done_before:
        missing: list[Piece] = [piece for piece in task.pieces if not task.files.is_done(piece.number)]
        if len(missing) < len(task.pieces):
            done = len(task.pieces) - len(missing)
            print(f"continues: {done} of {len(task.pieces)} pieces are done", file=sys.stderr)
        items = [piece.item() for piece in missing]
        label, shares = config.decoding.method, resources(config)
        stage = run_stage(
            DecodePiece, task.arguments(), items, label=label, resources=shares, local=local, unit="piece"
        )
        for _ in stage:
            pass
        task.finish()
    facts = task.facts()
    if facts["unscored"]:
        told = f"failed on {facts['unscored']:.0f} completions (first {task.first_unscored()})"
        again = "mend it, then the same command decodes them again"
        if not facts["rows"]:
            raise ConfigError(f"sampling.scorer: {told}; {again}")
        print(f"warning: sampling.scorer {told}; {again}", file=sys.stderr)
    if not facts["rows"]:
        raise ConfigError(f"sampling.prompts: no usable prompt; see {task.quarantine}")
    return task, done_before


if __name__ == "__main__":
    from jobs import decode
    from jobs.cli import run_job

    sys.exit(run_job(decode))
