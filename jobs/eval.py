"""What a checkpoint learned and what it cost: accuracy, calibration, rewards, KL, diversity, credit → a table, JSON and MLflow."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.durable import write_json
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.evaluation.results import Evaluation
    from pipeline.evaluation.study import Study

HELP = (
    "Evaluate a checkpoint (checkpoint_from=…; default: this configuration's own run) on the held-out rows, and on its own "
    "samples when sampling.scorer is set or --sample is given. Writes evaluation.json into the run's folder, or beside the "
    "checkpoint."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample", action="store_true", help="sample and measure KL and diversity even without a scorer"
    )
    parser.add_argument(
        "--json", type=Path, help="also write the numbers alone to this file, {name: value, name_se: standard error}"
    )


def run(config: RunConfig, options: argparse.Namespace) -> None:
    evaluation, path = evaluation_of(config, options.local, options.sample)
    print(table(evaluation))
    for skipped in evaluation.skipped:
        print(f"not measured: {skipped.what} ({skipped.reason})", file=sys.stderr)
    if options.json:
        write_json(options.json, evaluation.numbers())
    print(f"written {path}")


def table(evaluation: Evaluation) -> str:
    """One line a metric: value, standard error and 95 % interval where they are known, and n."""
    width = max(map(len, evaluation.metrics), default=0)
    lines = []
    for name, metric in sorted(evaluation.metrics.items()):
        error = "" if metric.standard_error is None else f"± {metric.standard_error:.4f}"
        interval = "" if metric.low is None or metric.high is None else f"[{metric.low:.4f}, {metric.high:.4f}]"
        lines.append(f"{name:{width}}  {metric.value:9.4f}  {error:9}  {interval:19}  n={metric.n}")
    return "\n".join(lines)


def evaluate(config: RunConfig, local: bool, sample: bool = False) -> dict[str, float]:
    """The numbers of `evaluation_of`: value by name, and standard error as `<name>_se`."""
    return evaluation_of(config, local, sample)[0].numbers()


def evaluation_of(config: RunConfig, local: bool, sample: bool = False) -> tuple[Evaluation, Path]:
    """All that `evaluation.evaluators` names, and where it was written; also logged to the MLflow run, if it is this configuration's.

    Raises ConfigError for what is missing or unknown, before any work starts.
    """
    from pipeline import driver, tracking
    from pipeline.evaluation import measure_all
    from pipeline.evaluation.findings import combine
    from pipeline.report import write_evaluation_report

    check(config)
    prepared = driver.prepare(config, local, work="held_out")
    named = config.checkpoint_from is not None
    own, identity = (driver.run_of if named else driver.trained_run)(config, prepared)
    study = open_study(config, prepared, own, local, sample)
    title = f"{config.name}: {config.objective_name} on {config.checkpoint_from or own.name}"
    found = combine(title, measure_all(study))
    if study.has_second:
        found = found.model_copy(update={"before": "against"})
    path = found.write(result_path(config, own))
    folder = own if config.checkpoint_from is None else Path(config.checkpoint_from).expanduser()
    page = write_evaluation_report(found, folder if folder.is_dir() else None, path.with_suffix(".html"))
    if config.checkpoint_from is None:
        tracker = tracking.start(config, own, identity)
        tracker.log_summary({f"evaluation/{name}": value for name, value in found.numbers().items()})
        tracker.log_artifact(path)
        tracker.log_artifact(page)
        tracker.finish("FINISHED")
    return found, path


def check(config: RunConfig) -> None:
    """What can be known to fail from the configuration and the files it names. Raises ConfigError."""
    from pipeline import driver
    from pipeline.evaluation import EVALUATORS
    from pipeline.evaluation.diversity import check_library
    from pipeline.evaluation.planted import KEY
    from pipeline.evaluation.scorers import judge_for
    from pipeline.preflight import check_model
    from pipeline.sources import plan

    asked = config.evaluation.evaluators
    for name in asked or ():
        if name not in EVALUATORS:
            raise ConfigError(f"evaluation.evaluators: there is no {name!r}; known are {', '.join(EVALUATORS)}")
    if config.sampling.scorer:
        judge_for(config, None)
    elif config.evaluation.against:
        raise ConfigError("evaluation.against: a win rate needs a score; set sampling.scorer")
    if asked is None or "diversity" in asked:
        check_library()
    if config.evaluation.planted is not None:
        work, bound = Path(config.storage) / "cache" / "sources", config.data.max_record_bytes
        plan([config.evaluation.planted], work, key=KEY, max_record_bytes=bound)
    for key, path in (("checkpoint_from", config.checkpoint_from), ("evaluation.against", config.evaluation.against)):
        if path is not None:
            check_model(config, path, key)
    if config.checkpoint_from is None:
        driver.check_trained(config)


def open_study(config: RunConfig, prepared: object, own: Path, local: bool, sample: bool) -> Study:
    """Weights, rows and what was carried over from training, put together."""
    from pipeline import driver
    from pipeline.evaluation.study import Study
    from pipeline.export import weights_of
    from pipeline.rows import Rows
    from pipeline.thinker import check_thoughts

    assert isinstance(prepared, driver.Prepared)
    cache = Path(config.storage) / "cache"
    trust, against = config.model.trust_remote_code, config.evaluation.against
    weights = weights_of(config.checkpoint_from or str(own), cache, trust_remote_code=trust)
    second = weights_of(against, cache, "evaluation.against", trust) if against else None
    check_thoughts(config.sampling, [weights, *([second] if second else [])])
    split = Rows(prepared.rows, prepared.reference).split(config.data, config.seed)
    positions = split.eval
    if not len(positions):
        print(
            "no held-out rows (data.eval_fraction, data.eval_sources): evaluating on the training rows", file=sys.stderr
        )
        positions = split.train
    evaluated = Path(config.checkpoint_from) if config.checkpoint_from else own
    last = driver.last_metrics(evaluated)  # of the run whose weights these are; nothing where they are no run's
    carried = {name: last[name] for name in config.objective.needed().carried if name in last}
    named = bool(config.evaluation.evaluators)
    sampling = sample or config.sampling.scorer is not None or named
    return Study(config, prepared, weights, second, positions, carried, sampling, local)


def result_path(config: RunConfig, own: Path) -> Path:
    """evaluation.json in the run's folder; beside any other model, whose own folder stays as it is."""
    from pipeline.evaluation.results import FILE
    from pipeline.export import RUN_FILE

    if config.checkpoint_from is None:
        return own / FILE
    folder = Path(config.checkpoint_from).expanduser().absolute()
    if (folder / RUN_FILE).is_file():
        return folder / FILE
    if folder.is_dir():
        return folder.with_name(f"{folder.name}-{FILE}")
    return (
        Path(config.storage) / "evaluations" / f"{config.checkpoint_from.replace('/', '--').replace(':', '-')}-{FILE}"
    )


if __name__ == "__main__":
    from jobs import eval as job
    from jobs.cli import run_job

    sys.exit(run_job(job))
