"""Align a model: prepare, train, export, track. The same command again continues a killed run."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipeline.report.falling import FALLING, chosen_falls

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HELP = "Prepare data, train the objective, export the model, track in MLflow. Run it again to continue a killed run."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would happen, train nothing")
    parser.add_argument(
        "--status", action="store_true", help="show what this run is doing and why it waits, change nothing"
    )


def needs_ray(options: argparse.Namespace) -> bool:
    return not (options.dry_run or options.status)


def run(config: RunConfig, options: argparse.Namespace) -> None:
    if options.status:
        from pipeline.status import describe as describe_status

        print(describe_status(config))
        return
    if options.dry_run:
        from jobs.preview import preview

        print(preview(config))
        return
    from pipeline.driver import fit

    result = fit(config, options.local)
    if result.already_finished:
        print("this run is already finished; change the configuration for another, or delete its folder to repeat it")
    needs = config.objective.needed()
    print(describe(result, needs.reference != "none", "eval" if needs.model == "reward" else "decode"))


SHOWN = (
    *("loss", "reward/margin", "accuracy", "return", "value_error", "sequence_log_ratio"),
    *("reward/desirable", "reward/undesirable", "eval/loss", "eval/reward/margin", "eval/accuracy"),
)
"""Metrics of the last step that the end of a run shows, where the objective has them."""


def describe(result, explained: bool, job: str = "decode") -> str:
    """The end of a run, for people: the numbers, where everything is, what to do next.

    job: what to try next.
    explained: rewards are log-ratios to a reference, so that `FALLING` is about them.
    """
    lines = [f"{name:21} {result.metrics[name]:.4f}" for name in SHOWN if name in result.metrics]
    if explained and chosen_falls(result.metrics):
        lines.append(FALLING)
    lines += [f"run                {result.run}", f"model              {result.export}"]
    if result.tracking:
        lines.append(f"mlflow             {result.tracking}")
    return "\n".join([*lines, f"next               qalign {job} CONFIG.yaml checkpoint_from={result.run}"])


if __name__ == "__main__":
    from jobs import train
    from jobs.cli import run_job

    sys.exit(run_job(train))
