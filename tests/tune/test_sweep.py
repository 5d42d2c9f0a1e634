"""Whole sweeps in this process: what is shared, recorded, repeated or not. With Ray: `test_sweep_on_ray`."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import pytest

from pipeline.config import ConfigError, RunConfig
from pipeline.progress import METRICS_FILE, read_metrics
from tune import sweep
from tune.plan import Sweep
from tune.table import Table, Trial

LOCAL = argparse.Namespace(local=True)
HELD_OUT = ("data.eval_fraction=0.25", "train.max_steps=2", "checkpoint.every=1")


def table_of(config: RunConfig) -> Table:
    (folder,) = (Path(config.storage) / "sweeps").iterdir()
    return Table(folder)


@pytest.fixture
def three(make_config):
    """three(…) → the configuration of a grid of three learning rates, of which one makes the loss overflow."""

    def make(*overrides: str) -> RunConfig:
        space = "sweep.space.optimizer.lr=[1e-3,1e30,1e-2]"
        return make_config(space, "optimizer.clip=null", "sweep.metric=eval/loss", *HELD_OUT, *overrides)

    return make


def test_a_metric_that_needs_held_out_rows_is_refused_before_any_trial(make_config) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.metric: eval/accuracy needs held-out rows; set data\.eval_fraction"):
        sweep.run(make_config("sweep.space.objective.beta=[0.1]"), LOCAL)


def test_a_configuration_without_a_sweep_early_stopping_in_one_process_and_elastic_workers_are_refused(
    make_config,
) -> None:
    with pytest.raises(ConfigError, match=r"^sweep: missing; add a section sweep"):
        sweep.run(make_config(), LOCAL)
    with pytest.raises(ConfigError, match=r"^sweep\.scheduler: --local runs one trial after the other"):
        sweep.run(make_config("sweep.space.objective.beta=[0.1]", "sweep.scheduler=asha"), LOCAL)
    with pytest.raises(ConfigError, match=r"^scaling\.workers: a sweep's trials share workers .*give one number$"):
        sweep.run(make_config("sweep.space.objective.beta=[0.1]", "scaling.workers=[1,2]"), LOCAL)


@pytest.mark.parametrize(
    ("metric", "key", "refused"),
    [
        ("eval/reward/margin", "objective.beta=[0.1,0.5]", True),
        ("reward/chosen", "objective=[{name: dpo},{name: ipo}]", True),
        ("eval/loss", "objective.name=[dpo,ipo]", True),
        ("eval/loss", "objective.label_smoothing=[0.1,0.2]", True),
        ("eval/loss", "objective.beta=[0.1,0.5]", False),  # DPO's is a negative log-likelihood, whatever β is
        ("eval/reward/margin", "optimizer.lr=[1e-3,1e-2]", False),
        ("eval/accuracy", "objective.beta=[0.1,0.5]", False),
    ],
)
def test_a_metric_whose_unit_a_swept_key_changes_ranks_nothing(
    make_config, metric: str, key: str, refused: bool
) -> None:
    config = make_config(f"sweep.space.{key}", f"sweep.metric={metric}", *HELD_OUT)
    if not refused:
        assert Sweep(config, local=True).settings.metric == metric
        return
    swept = key.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^sweep\.metric: {metric} is measured in units that {swept} changes"):
        Sweep(config, local=True)
    assert not (Path(config.storage) / "cache" / "rows").exists()


def test_the_identity_is_what_changes_trials(make_config) -> None:
    def identity(*overrides: str) -> str:
        return Sweep(make_config("sweep.space.objective.beta=[0.1,0.2]", *HELD_OUT, *overrides), True).identity

    first = identity()
    assert identity("sweep.trials=99", "sweep.register_as=x", "scaling.workers=2", "sweep.max_failures=0") == first
    others = ["sweep.scheduler=asha", "sweep.metric=eval/loss", "train.epochs=2", "sweep.space.objective.beta=[0.1]"]
    assert len({first, *map(identity, others)}) == 5


def test_trials_share_what_is_prepared_and_equal_runs_are_one_trial(make_config) -> None:
    space = "sweep.space={objective.name: [dpo, sft, ipo], objective.label_smoothing: [0.1, 0.2]}"
    found = Sweep(make_config(space, *HELD_OUT), local=True)
    trials = list(found.todo())
    assert [t.overrides for t in trials] == [
        {"objective.name": "dpo", "objective.label_smoothing": 0.1},
        {"objective.name": "dpo", "objective.label_smoothing": 0.2},
        {"objective.name": "sft"},
        {"objective.name": "ipo"},
    ]
    jobs = [json.loads((found.trial_folder(t) / "job.json").read_text())["plain"] for t in trials]
    assert len({job["rows"] for job in jobs}) == 1
    assert jobs[0]["reference"] and jobs[0]["reference"] == jobs[1]["reference"] == jobs[3]["reference"]
    assert jobs[2]["reference"] is None, "SFT has no reference"


@pytest.mark.slow
def test_a_diverging_trial_is_recorded_and_nothing_finished_is_repeated(
    three, capsys: pytest.CaptureFixture[str]
) -> None:
    config = three()
    sweep.run(config, LOCAL)
    table = table_of(config)
    assert [t.state for t in table.trials.values()] == ["finished", "diverged", "finished"]
    assert table.trials[2].reason.startswith("step 2: the loss is")
    assert "best               trial 003: optimizer.lr=0.01" in capsys.readouterr().out
    assert (Path(table.trials[3].run) / "export" / "model.safetensors").is_file()
    assert not (Path(table.trials[1].run) / "export").exists()
    with (table.folder / "summary.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["003", "001", "002"]
    page = (table.folder / "sweep.html").read_text()
    assert "optimizer.lr" in page
    assert page.count("<svg") >= 1

    attempts = [Path(t.run, "attempt").read_text() for t in table.trials.values()]
    sweep.run(config, LOCAL)
    again = table_of(config)
    assert again.trials == table.trials
    assert [Path(t.run, "attempt").read_text() for t in again.trials.values()] == attempts


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_from_its_checkpoint(three, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import loop

    config, saved = three(), loop.Saver.save

    def interrupted(self, *arguments, wait: bool) -> None:
        saved(self, *arguments, wait=True)  # committed, not only begun
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Saver, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, LOCAL)
    monkeypatch.undo()
    assert [t.state for t in table_of(config).trials.values()] == ["running"]
    sweep.run(config, LOCAL)
    table = table_of(config)
    assert [t.state for t in table.trials.values()] == ["finished", "diverged", "finished"]
    assert [line["step"] for line in read_metrics(Path(table.trials[1].run) / METRICS_FILE)] == [1, 2]
    assert Path(table.trials[1].run, "attempt").read_text().strip() == "2", "it went on, in a second attempt"


@pytest.mark.slow
def test_a_metric_that_no_trial_reports_names_those_there_are(make_config) -> None:
    config = make_config("sweep.space.objective.beta=[0.1]", "sweep.metric=eval/acuracy", *HELD_OUT)
    with pytest.raises(ConfigError, match=r"no trial reports eval/acuracy; known here: .*eval/accuracy") as error:
        sweep.run(config, LOCAL)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_one_parent_run_and_one_nested_run_per_trial_also_after_a_restart(three, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = three("tracking.enabled=true", "sweep.register_as=best-of-three")
    sweep.run(config, LOCAL)
    client = MlflowClient(tracking_uri=f"sqlite:///{config.storage}/mlflow.db")
    # As a driver leaves it that is killed between the table's line and MLflow's.
    state = Sweep(config, local=True).folder / "trials" / "003" / "tracking.json"
    left = json.loads(state.read_text())
    assert left["ended"] == "FINISHED"
    client.update_run(left["run_id"], status="RUNNING")
    state.write_text(json.dumps(left | {"ended": None}))
    sweep.run(config, LOCAL)
    assert json.loads(state.read_text()) == left
    experiment = client.get_experiment_by_name("qalign")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.info.status for run in [parent, *children]) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    by_rate = {run.data.params["optimizer.lr"]: run for run in children}
    assert set(by_rate) == {"0.001", "1e+30", "0.01"}
    steps = client.get_metric_history(by_rate["0.01"].info.run_id, "loss")
    assert [metric.step for metric in steps] == [1, 2]
    assert by_rate["1e+30"].data.tags["trial.state"] == "diverged"
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"summary.csv", "summary.json", "sweep.html", "config.json", "model"} <= names
    assert parent.data.tags["best.trial"] == "003"
    assert parent.data.metrics["best/eval/loss"] == pytest.approx(table_of(config).trials[3].metrics["eval/loss"])
    assert [version.run_id for version in client.search_model_versions("name = 'best-of-three'")] == [
        parent.info.run_id
    ]


@pytest.mark.slow
def test_workers_return_after_the_step_in_which_they_are_told_to_stop(make_config) -> None:
    from tune.group import STOP_FILE, attempt

    found = Sweep(make_config("sweep.space.objective.beta=[0.1]", *HELD_OUT, "train.max_steps=3"), local=True)
    (trial,) = found.todo()
    plain = json.loads((found.trial_folder(trial) / "job.json").read_text())["plain"]
    (Path(trial.run) / STOP_FILE).touch()
    assert attempt(plain).state == "finished"
    assert [line["step"] for line in read_metrics(Path(trial.run) / METRICS_FILE)] == [1]
    (Path(trial.run) / STOP_FILE).unlink()
    assert attempt(plain).state == "finished"
    assert [line["step"] for line in read_metrics(Path(trial.run) / METRICS_FILE)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "decision"), [(0.9, "STOP"), (0.1, "CONTINUE")])
def test_asha_remembers_the_trials_of_an_earlier_call(make_config, tmp_path: Path, loss: float, decision: str) -> None:
    from types import SimpleNamespace

    from tune.tuning import scheduler

    space = ("sweep.space.objective.beta=[0.1]", "sweep.scheduler=asha", "sweep.metric=eval/loss")
    found = Sweep(make_config(*space, *HELD_OUT, "train.max_steps=9", "train.eval_every=1"), local=True)
    for number in range(1, 4):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / METRICS_FILE).write_text(json.dumps({"step": 1, "eval/loss": 0.2 * number}) + "\n")
        found.table.put(Trial(number, {}, {}, str(tmp_path / f"{number}"), "finished", 1))
    asha, new = scheduler(found), SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, new)
    assert asha.on_trial_result(None, new, {"step": 1, "eval/loss": loss}) == decision
