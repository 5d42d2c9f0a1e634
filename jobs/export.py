"""Write a checkpoint of a run as a folder that transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HELP = "Export a checkpoint (default: the newest of this configuration's run) as safetensors with its tokenizer."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="a step-… folder; default: the newest, or the best with --best")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best value of checkpoint.best")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")


def run(config: RunConfig, options: argparse.Namespace) -> None:
    from pipeline import checkpoint, driver
    from pipeline.export import export

    driver.check_trained(config)
    prepared = driver.prepare(config, options.local, work="names")
    folder, _ = driver.trained_run(config, prepared)
    chosen = options.checkpoint or (checkpoint.best(folder) if options.best else checkpoint.latest(folder))
    if options.checkpoint is not None and not (options.checkpoint / checkpoint.STATE).is_file():
        raise ConfigError(
            f"--checkpoint {options.checkpoint}: no checkpoint; name a step-… folder in {folder / 'checkpoints'}"
        )
    if chosen is None:
        raise ConfigError(f"{folder}: has no such checkpoint yet; run `qalign train` with this configuration first")
    print(export(config, chosen, prepared.model, options.to, prepared.rows))


if __name__ == "__main__":
    from jobs import export as job
    from jobs.cli import run_job

    sys.exit(run_job(job))
