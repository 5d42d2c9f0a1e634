"""Tracking against a real sqlite MLflow: one run per job, no step twice, nothing lost in an outage, never an exception."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.mlflow_run import STATE_FILE, MlflowTracker, flatten
from pipeline.tracking import Tracker, start, tracking_uri


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """One database for the module: MLflow takes seconds to create one. Tests differ in experiment and run."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(storage: Path, **tracking: object) -> RunConfig:
    return validate(
        {
            "storage": str(storage),
            "data": {"kind": "preference", "sources": [{"path": "pairs.jsonl"}]},
            "model": {"path": "some/model"},
            "objective": {"name": "dpo", "beta": 0.2},
            "tracking": tracking,
        }
    )


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "dpo-0123"
    folder.mkdir()
    return folder


@pytest.fixture
def settings(storage, request) -> RunConfig:
    return config(storage, experiment=request.node.name)


def client(storage: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")


def stored(storage: Path, run: Path):
    """The MLflow run of a job's folder."""
    return client(storage).get_run(json.loads((run / STATE_FILE).read_text())["run_id"])


def history(storage: Path, run: Path, metric: str) -> list[tuple[int, float]]:
    found = client(storage).get_metric_history(stored(storage, run).info.run_id, metric)
    return sorted((point.step, point.value) for point in found)


def artifact(storage: Path, run: Path, name: str) -> str:
    from urllib.parse import urlparse

    return (Path(urlparse(stored(storage, run).info.artifact_uri).path) / name).read_text()


# --------------------------------------------------------------------------------------------- the usual way


@pytest.mark.slow
def test_everything_a_driver_tells_arrives(storage, settings, run, tmp_path):
    tracker = start(settings, run, "0123")
    tracker.log_config(settings.dump())
    for step in (1, 2, 3):
        tracker.log_metrics(step, {"loss": 1 / step, "reward/margin": step})
    tracker.log_summary({"data/rows": 48, "note": "chosen reward falls: expected"})
    tracker.log_text("hello", "completions/before.txt")
    (tmp_path / "quarantine.jsonl").write_text("bad\n")
    tracker.log_artifact(tmp_path / "quarantine.jsonl")
    tracker.finish("FINISHED")

    found = stored(storage, run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert found.data.params["objective.beta"] == "0.2"
    assert found.data.params["objective.name"] == "dpo"
    assert found.data.params["optimizer.betas.1"] == "0.95"
    assert found.data.metrics["data/rows"] == 48
    tags = found.data.tags
    assert tags["qalign.identity"] == "0123"
    assert tags["note"] == "chosen reward falls: expected"
    assert tags["version.torch"].startswith("2.")
    assert history(storage, run, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(storage, run, "reward/margin") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert artifact(storage, run, "completions/before.txt") == "hello"
    assert artifact(storage, run, "quarantine.jsonl") == "bad\n"
    assert validate(json.loads(artifact(storage, run, "config.json"))) == settings
    assert found.info.run_id in tracker.location


def test_artifacts_lie_beside_the_database(storage, settings, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = start(settings, run, "0123")
    tracker.log_text("x", "x.txt")
    tracker.finish("FINISHED")
    assert str(storage) in stored(storage, run).info.artifact_uri
    assert not Path("mlruns").exists()


def test_long_values_are_cut_visibly(storage, settings, run):
    tracker = start(settings, run, "0123")
    tracker.log_config({"data": {"chat_template": "t" * 10_000}})
    tracker.finish("FINISHED")
    value = stored(storage, run).data.params["data.chat_template"]
    assert value.startswith("ttt")
    assert value.endswith("(cut; whole in config.json)")
    assert json.loads(artifact(storage, run, "config.json"))["data"]["chat_template"] == "t" * 10_000


def test_many_parameters_and_metrics_fit_into_limited_calls(storage, settings, run):
    """MLflow's server takes 100 parameters and 1000 metrics a call."""
    tracker = MlflowTracker(tracking_uri(settings), "limits", run, {}, interval=1e6)
    tracker.log_config({f"p{i}": i for i in range(250)})
    for step in range(1, 8):
        tracker.log_metrics(step, {f"m{i}": step for i in range(300)})
    tracker.finish("FINISHED")
    found = stored(storage, run)
    assert sum(name.startswith("p") for name in found.data.params) == 250
    assert history(storage, run, "m299") == [(step, step) for step in range(1, 8)]


def test_values_that_are_not_finite_are_counted_not_lost(storage, settings, run):
    tracker = start(settings, run, "0123")
    tracker.log_metrics(1, {"loss": math.nan, "lr": 1.0})
    tracker.log_metrics(2, {"loss": math.inf, "lr": 1.0})
    tracker.log_summary({"final/loss": math.nan})
    tracker.finish("FAILED")
    found = stored(storage, run)
    assert "loss" not in found.data.metrics
    assert found.data.tags["not_finite.loss"] == "2 (last: step 2)"
    assert found.data.tags["final/loss"] == "nan"
    assert history(storage, run, "lr") == [(1, 1.0), (2, 1.0)]
    assert found.info.status == "FAILED"


def test_odd_names_become_legal_ones(storage, settings, run):
    tracker = start(settings, run, "0123")
    tracker.log_config({"columns": {"prompt (raw)": "q?", "": "empty"}})
    tracker.log_metrics(1, {"p@1": 0.5})
    tracker.finish("FINISHED")
    assert stored(storage, run).data.params["columns.prompt _raw_"] == "q?"
    assert stored(storage, run).data.metrics["p_1"] == 0.5


# --------------------------------------------------------------------------------------------------- restarts


def test_a_restarted_job_continues_its_run_and_logs_no_step_twice(storage, settings, run):
    first = start(settings, run, "0123")
    first.log_config(settings.dump())
    assert first.last_step() == 0
    for step in (1, 2, 3):
        first.log_metrics(step, {"loss": float(step)})
    assert first.last_step() == 3
    first.finish("KILLED")
    assert first.owes("FINISHED") and not first.owes("KILLED")
    assert stored(storage, run).info.status == "KILLED"

    second = start(settings, run, "0123")
    assert second.last_step() == 3
    second.log_config(settings.dump())
    for step in range(second.last_step() + 1, 6):
        second.log_metrics(step, {"loss": float(step)})
    assert stored(storage, run).info.status == "RUNNING"
    assert second.owes("KILLED")
    second.finish("FINISHED")
    assert not second.owes("FINISHED")
    assert history(storage, run, "loss") == [(step, float(step)) for step in range(1, 6)]
    experiment = client(storage).get_experiment_by_name(settings.tracking.experiment)
    assert len(client(storage).search_runs([experiment.experiment_id])) == 1


def test_what_a_restart_changes_is_told_in_tags(storage, settings, run):
    for workers in (1, 2):
        tracker = start(settings, run, "0123")
        tracker.log_config({"scaling": {"workers": workers, "zero_stage": 2}})
        tracker.finish("FINISHED")
    found = stored(storage, run)
    assert found.data.params["scaling.workers"] == "1"
    assert found.data.tags["changed.scaling.workers"] == "2"
    assert "changed.scaling.zero_stage" not in found.data.tags


def test_looking_at_a_finished_run_leaves_it_finished(storage, settings, run):
    tracker = start(settings, run, "0123")
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    looked = start(settings, run, "0123")
    assert looked.location == tracker.location
    assert stored(storage, run).info.status == "FINISHED"


def test_a_run_that_was_deleted_is_replaced(storage, settings, run, caplog):
    tracker = start(settings, run, "0123")
    tracker.log_metrics(5, {"loss": 1.0})
    tracker.finish("KILLED")
    old = stored(storage, run).info.run_id
    client(storage).delete_run(old)
    again = start(settings, run, "0123")
    assert again.last_step() == 0, "the new run has no steps yet"
    again.log_metrics(5, {"loss": 2.0})
    again.finish("FINISHED")
    assert stored(storage, run).info.run_id != old
    assert history(storage, run, "loss") == [(5, 2.0)]
    assert "has lost run" in caplog.text


def test_a_driver_that_died_while_creating_the_run_finds_it(storage, settings, run):
    tracker = start(settings, run, "0123")
    tracker.log_metrics(1, {"loss": 1.0})
    state = json.loads((run / STATE_FILE).read_text())
    (run / STATE_FILE).write_text(json.dumps({**state, "run_id": None, "last_step": 0}))
    again = start(settings, run, "0123")
    again.log_text("x", "x.txt")
    assert state["run_id"] in again.location


def test_another_database_gets_another_run(storage, settings, run, monkeypatch, tmp_path):
    tracker = start(settings, run, "0123")
    tracker.log_metrics(4, {"loss": 1.0})
    tracker.finish("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert start(settings, run, "0123").location == ""


# ---------------------------------------------------------------------------------------------------- outages


def test_an_outage_is_told_once_and_made_up_for(storage, settings, run, caplog):
    """The database file is made unusable, as a server that goes away in the middle, and restored."""
    tracker = MlflowTracker(tracking_uri(settings), settings.tracking.experiment, run, {}, interval=0, retry=0)
    tracker.log_metrics(1, {"loss": 1.0})
    database = storage / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE metrics RENAME TO metrics_away")
    try:
        tracker.log_metrics(2, {"loss": 2.0})
        tracker.log_metrics(3, {"loss": 3.0})
        assert tracker.last_step() == 1
    finally:
        with sqlite3.connect(database) as connection:
            connection.execute("ALTER TABLE metrics_away RENAME TO metrics")
        connection.close()
    tracker.log_metrics(4, {"loss": 4.0})
    assert tracker.last_step() == 4
    tracker.finish("FINISHED")
    assert history(storage, run, "loss") == [(step, float(step)) for step in (1, 2, 3, 4)]
    warnings = [record for record in caplog.records if record.name.startswith("pipeline")]
    assert len(warnings) == 1
    assert "training goes on" in warnings[0].getMessage()
    assert "\n" not in warnings[0].getMessage()


def test_metrics_sent_twice_are_there_once(storage, settings, run):
    """The note of what was sent cannot be written (a folder is in its way), so the same metrics go out again."""
    tracker = MlflowTracker(tracking_uri(settings), settings.tracking.experiment, run, {}, interval=0, retry=0)
    tracker.log_metrics(1, {"loss": 1.0})
    (run / STATE_FILE).rename(run / "aside")
    (run / STATE_FILE).mkdir()
    tracker.log_metrics(2, {"loss": 2.0})
    assert tracker.last_step() == 2, "known in memory"
    (run / STATE_FILE).rmdir()
    (run / "aside").rename(run / STATE_FILE)
    assert json.loads((run / STATE_FILE).read_text())["last_step"] == 1
    assert history(storage, run, "loss") == [(1, 1.0), (2, 2.0)]
    tracker.log_metrics(3, {"loss": 3.0})
    tracker.finish("FINISHED")
    assert json.loads((run / STATE_FILE).read_text())["last_step"] == 3
    assert history(storage, run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_server_that_never_answers_costs_no_exception_and_finish_says_what_is_missing(run, caplog):
    settings = config(run, uri="http://127.0.0.1:9")
    tracker = start(settings, run, "0123")
    tracker.log_config(settings.dump())
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert tracker.location == ""
    last = caplog.records[-1].getMessage()
    assert last.startswith("MLflow (http://127.0.0.1:9) was not told: ")
    assert "step 1" in last
    assert "configuration" in last
    assert sum("training goes on" in record.getMessage() for record in caplog.records) == 1


def test_an_entry_that_can_never_succeed_blocks_no_other(storage, settings, run, caplog, tmp_path):
    tracker = start(settings, run, "0123")
    tracker.log_artifact(tmp_path / "gone.txt")
    tracker.log_text("x", "../outside.txt")
    tracker.log_summary({"../loss": 1.0})
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert history(storage, run, "loss") == [(1, 1.0)]
    assert "refused gone.txt: FileNotFoundError" in caplog.text
    assert "summary: MlflowException: Invalid" in caplog.text
    assert "was not told: ../outside.txt (MlflowException: Invalid artifact path" in caplog.text
    assert stored(storage, run).info.status == "FINISHED"


# ------------------------------------------------------------------------------------------------------ models


def test_exported_model_is_a_reference_unless_asked_for(storage, settings, run, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    tracker = start(settings, run, "0123")
    tracker.log_model_reference(export)
    tracker.finish("FINISHED")
    found = stored(storage, run)
    assert found.data.tags["model.path"] == str(export)
    assert client(storage).list_artifacts(found.info.run_id) == []


def test_registering_copies_the_model_once_per_run(storage, settings, run, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    for _ in range(2):
        tracker = start(settings, run, "0123")
        tracker.log_model_reference(export, register_as="polite")
        tracker.finish("FINISHED")
    run_id = stored(storage, run).info.run_id
    versions = client(storage).search_model_versions("name = 'polite'")
    assert [version.run_id for version in versions] == [run_id]
    assert [file.path for file in client(storage).list_artifacts(run_id, "model")] == ["model/config.json"]


# ------------------------------------------------------------------------------------------------- small parts


def test_uri_comes_from_config_then_environment_then_storage(storage, monkeypatch):
    assert tracking_uri(config(storage)) == f"sqlite:///{storage}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(config(storage)) == "http://tracking:5000"
    assert tracking_uri(config(storage, uri="sqlite:////a/b.db")) == "sqlite:////a/b.db"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "tracking:5000"])
def test_a_uri_that_mlflow_cannot_use_is_one_line(storage, uri):
    with pytest.raises(ConfigError, match=r"^tracking\.uri: .* is no MLflow server or database; use sqlite"):
        tracking_uri(config(storage, uri=uri))


def test_tracking_can_be_switched_off(run, storage):
    tracker = start(config(storage, enabled=False), run, "0123")
    assert type(tracker) is Tracker
    tracker.log_config({"a": 1})
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert (tracker.location, tracker.last_step()) == ("", 0)
    assert list(run.iterdir()) == []


def test_the_tracker_that_tells_nobody_has_every_method():
    public = {name for name in vars(Tracker) if not name.startswith("_")}
    assert public <= {name for name in vars(MlflowTracker) if not name.startswith("_")}


def test_flatten_names_each_leaf():
    tree = {"a": {"b": [1, None, {"c": True}]}, "d": "text", "e": {}, "f": []}
    assert flatten(tree) == {"a.b.0": "1", "a.b.1": "null", "a.b.2.c": "true", "d": "text", "e": "{}", "f": "[]"}


@pytest.mark.slow
def test_mlflow_is_imported_only_when_something_is_tracked():
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.mark.parametrize("content", ["", '{"uri": "x"', "null", "[]", '{"run_id": 3}', "\0\0\0"])
def test_a_damaged_state_is_told_and_a_new_run_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "tracking.json").write_text(content)
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", "e", tmp_path, {})
    assert tracker.last_step() == 0 and tracker.owes("FINISHED")
    assert f"{tmp_path / 'tracking.json'}: damaged; a new MLflow run begins" in caplog.text
