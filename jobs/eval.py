"""What a checkpoint learned and what it cost: held-out loss, accuracy, margins; reward and KL of its own samples."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from pipeline.config import RunConfig

HELP = (
    "Evaluate a checkpoint (checkpoint_from=…; default: this configuration's own run) on the held-out rows, and on its own "
    "samples when sampling.scorer is set or --sample is given."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", action="store_true", help="sample and measure KL even without a scorer")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")


def run(config: RunConfig, options: argparse.Namespace) -> None:
    metrics = evaluate(config, options.local, options.sample)
    width = max(map(len, metrics))
    print("\n".join(f"{name:{width}}  {value:.4f}" for name, value in sorted(metrics.items())))
    if options.json:
        options.json.write_text(json.dumps(metrics, indent=1) + "\n")


def evaluate(config: RunConfig, local: bool, sample: bool) -> dict[str, float]:
    """All metrics by name; they are also logged to the MLflow run of this configuration, if it was trained."""
    from pipeline import driver, tracking
    from pipeline.evaluation.held_out import held_out
    from pipeline.evaluation.samples import draw, kl_to_reference
    from pipeline.evaluation.scorers import resolve
    from pipeline.export import weights_of
    from pipeline.prompts import read_prompts
    from pipeline.rows import Rows

    if config.sampling.scorer:
        resolve(config.sampling.scorer)  # an unknown one fails before any work
    prepared = driver.prepare(config, local)
    own, identity = driver.open_run(config, prepared)
    weights = weights_of(config.checkpoint_from or str(own), Path(config.storage) / "cache")
    rows = Rows(prepared.rows, prepared.reference)
    split = rows.split(config.data, config.seed)
    positions = split.eval
    if not len(positions):
        print(
            "no held-out rows (data.eval_fraction, data.eval_sources): evaluating on the training rows", file=sys.stderr
        )
        positions = split.train
    evaluated = Path(config.checkpoint_from) if config.checkpoint_from else own
    last = driver.last_metrics(evaluated)  # of the run whose weights these are; nothing where they are no run's
    carried = {name: last[name] for name in config.objective.needed().carried if name in last}
    metrics = dict(held_out(config, prepared, weights, np.asarray(positions), local, carried))
    if config.objective.needed().model == "reward":
        if sample or config.sampling.scorer:
            print("a reward model writes nothing: no samples were drawn", file=sys.stderr)
    elif sample or config.sampling.scorer:
        prompts = read_prompts(config, prepared)
        samples = draw(config, weights, prompts.ids, prompts.texts, prompts.stop_ids, local)
        metrics |= samples.metrics() | kl_to_reference(config, weights, prepared.frozen, samples, local)
    if config.checkpoint_from is None:
        tracker = tracking.start(config, own, identity)
        tracker.log_summary({f"evaluation/{name}": value for name, value in metrics.items()})
        tracker.finish("FINISHED")
    return metrics


if __name__ == "__main__":
    from jobs import eval as job
    from jobs.cli import run_job

    sys.exit(run_job(job))
