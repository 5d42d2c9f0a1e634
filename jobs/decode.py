"""Decode from a checkpoint: prompts in, one line per completion out (jsonl or parquet). A second call does what is missing."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from pipeline.decoding.pieces import Piece

HELP = (
    "Complete prompts (sampling.*) by sampling, search or value-guided decoding (decoding.*) from a checkpoint, run or model "
    "(checkpoint_from=…) into a jsonl or parquet file."
)


def run(config: RunConfig, options: argparse.Namespace) -> None:
    from pipeline.decoding.pieces import DecodePiece
    from pipeline.decoding.task import describe, plan_task
    from pipeline.evaluation.held_out import resources
    from pipeline.stage import run_stage

    task = plan_task(config, options.local)
    if task.finished():
        print(f"already decoded; delete it to decode again\nwritten            {task.output}")
        return
    missing: list[Piece] = [piece for piece in task.pieces if not task.files.is_done(piece.number)]
    if len(missing) < len(task.pieces):
        print(f"continues: {len(task.pieces) - len(missing)} of {len(task.pieces)} pieces are done", file=sys.stderr)
    done = run_stage(
        DecodePiece,
        task.arguments(),
        [piece.item() for piece in missing],
        label=config.decoding.method,
        resources=resources(config),
        local=options.local,
        unit="piece",
    )
    for _ in done:
        pass
    facts = task.finish()
    if not facts["rows"]:
        raise ConfigError(f"sampling.prompts: no usable prompt; see {task.quarantine}")
    for name, value in describe(facts).items():
        print(f"{name:18} {value}")
    if facts["refused"]:
        print(f"quarantined        {facts['refused']:.0f}: see {task.quarantine}")
    print(f"written            {task.output}")


if __name__ == "__main__":
    from jobs import decode
    from jobs.cli import run_job

    sys.exit(run_job(decode))
