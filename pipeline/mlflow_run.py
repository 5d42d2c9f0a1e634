"""The only importer of MLflow: one MLflow run per job, however often the job is restarted.

Everything goes through a backlog, so that a server that is down delays nothing and loses nothing that comes back in
time: training never fails because of tracking. The run's id, the newest step sent and the end are kept in
`<run>/tracking.json`, which is how a restarted driver finds its run, logs no step twice and ends what was left open.

Left out: which URI and whether at all (`tracking`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backlog import Backlog
from pipeline.durable import recall_json, write_json
from pipeline.redaction import redact, redacted
from pipeline.tracking import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

STATE_FILE = "tracking.json"
ELSEWHERE = "elsewhere"
"""In place of how a run ended: another server was told, or an earlier version of this file, which did not note it."""
FINAL = {  # errors that another attempt won't mend; all others (no connection, a locked database, …) are retried
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
}
logger = logging.getLogger(__name__)


class MlflowTracker(Tracker):
    """One MLflow run, behind a backlog. Thread-safe.

    Args:
        uri: tracking server or database.
        experiment: its name; created when missing.
        run: the job's folder, holds `tracking.json`.
        tags: set when the run is created or continued.
        name: of the run; default: the folder's.
        parent: the tracker whose run this one is nested in.
        interval, retry: see `Backlog`.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run: Path,
        tags: Mapping[str, str],
        name: str | None = None,
        parent: MlflowTracker | None = None,
        interval: float = 1.0,
        retry: float = 15.0,
    ) -> None:
        self._uri, self._experiment, self._run = uri, redact(experiment), run
        self._shown = redact(uri)
        self._name, self._parent = redact(name or run.name), parent
        self._state = self._read_state()
        self._steps: list[tuple[int, list[Metric]]] = []
        self._backlog = Backlog(f"MLflow ({self._shown})", self._open, _is_final, interval, retry)
        # Not sent before the first real entry: looking at a finished run must not make it a running one.
        self._backlog.add("tags", lambda client: self._set_tags(client, tags), flush=False)

    @property
    def location(self) -> str:
        run_id = self._state["run_id"]
        return f"{self._shown} (experiment {self._experiment}, run {run_id})" if run_id else ""

    def owes(self, status: Status) -> bool:
        return self._state["ended"] not in (status, ELSEWHERE)

    def last_step(self) -> int:
        self._backlog.flush()  # finds out whether the run of tracking.json still exists
        return self._state["last_step"]

    def log_config(self, config: Mapping[str, Any]) -> None:
        params = flatten(redacted(config))
        self._backlog.add("configuration", lambda client: _log_params(client, self._state["run_id"], params))
        self.log_dict(config, "config.json")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._steps.append((step, [Metric(_key(name), value, now, step) for name, value in finite.items()]))
        if dropped := metrics.keys() - finite.keys():
            counts = self._state["not_finite"]
            counts |= {name: counts.get(name, 0) + 1 for name in dropped}
            self.set_tags({f"not_finite.{name}": f"{counts[name]} (last: step {step})" for name in dropped})
        self._backlog.add(f"step {step}", self._send_steps)

    def log_summary(self, summary: Mapping[str, float | int | str]) -> None:
        numbers = {k: float(v) for k, v in summary.items() if not isinstance(v, str) and math.isfinite(v)}
        self.set_tags({k: str(v) for k, v in summary.items() if k not in numbers})

        def send(client: MlflowClient) -> None:
            for name, value in numbers.items():
                client.log_metric(self._state["run_id"], _key(name), value)

        self._backlog.add("summary", send)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; one that exists is replaced."""
        if tags:
            self._backlog.add("tags", lambda client: self._set_tags(client, tags))

    def log_text(self, text: str, name: str) -> None:
        self._backlog.add(name, lambda client: client.log_text(self._state["run_id"], redact(text), name))

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        self._backlog.add(name, lambda client: client.log_dict(self._state["run_id"], redacted(content), name))

    def log_artifact(self, file: Path) -> None:
        self._backlog.add(file.name, lambda client: client.log_artifact(self._state["run_id"], str(file)))

    def log_model_reference(self, path: Path, copy: bool = False, register_as: str | None = None) -> None:
        self.set_tags({"model.path": str(path.resolve())})
        if copy or register_as:
            self._backlog.add("model", lambda client: client.log_artifacts(self._state["run_id"], str(path), "model"))
        if register_as:
            name = f"registered model {register_as}"
            self._backlog.add(name, lambda client: _register(client, self._state["run_id"], register_as))

    def open(self) -> str:
        """Id of the run, which is created now if need be. Raises ConnectionError while MLflow cannot be reached."""
        self._backlog.flush()
        if not self._state["run_id"]:
            raise ConnectionError("the parent run could not be created yet")
        return self._state["run_id"]

    def finish(self, status: Status) -> None:
        self._backlog.add(f"status {status}", lambda client: client.set_terminated(self._state["run_id"], status))
        if self._backlog.close():
            self._write_state(ended=status)

    # -------------------------------------------------------------------------------------- the run and its state

    def _set_tags(self, client: MlflowClient, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        client.log_batch(self._state["run_id"], tags=[RunTag(_key(k), _cut(redact(v))) for k, v in tags.items()])

    def _send_steps(self, client: MlflowClient) -> None:
        """All waiting step metrics at once. Sending them again does no harm: MLflow drops exact repetitions."""
        sent = list(self._steps)
        if not sent:
            return
        metrics = [metric for _, found in sent for metric in found]
        client.log_batch(self._state["run_id"], metrics=metrics, synchronous=True)
        self._write_state(last_step=max(self._state["last_step"], sent[-1][0]))
        del self._steps[: len(sent)]

    def _open(self) -> MlflowClient:
        """Connect, and continue or create the run. Raises what MLflow raises."""
        client = _connect(self._uri)
        if self._state["run_id"] and not _is_there(client, self._state["run_id"]):
            logger.warning("MLflow (%s) has lost run %s; a new one replaces it", self._shown, self._state["run_id"])
            self._state = self._new_state()
        if self._state["run_id"]:
            self._write_state(ended=None)
            client.update_run(self._state["run_id"], status="RUNNING")
        else:
            # The token is on disk before the run exists: a driver that dies in between finds the run by it.
            self._write_state()
            self._state["ended"] = None
            tags = {"qalign.token": self._state["token"]}
            if self._parent is not None:
                tags["mlflow.parentRunId"] = self._parent.open()
            run_id = _create(client, self._uri, self._experiment, self._name, tags)
            self._write_state(run_id=run_id)
        return client

    def _new_state(self) -> dict[str, Any]:
        token = uuid.uuid4().hex
        return {"uri": self._shown, "token": token, "run_id": None, "last_step": 0, "not_finite": {}, "ended": None}

    def _read_state(self) -> dict[str, Any]:
        state = recall_json(self._run / STATE_FILE, _checked_state, "a new MLflow run begins")
        if state is None:
            return self._new_state()
        return state if state["uri"] == self._shown else self._new_state() | {"ended": ELSEWHERE}

    def _write_state(self, **changes: Any) -> None:
        self._state |= changes
        write_json(self._run / STATE_FILE, self._state)


def _checked_state(found: Any) -> dict[str, Any]:
    """A tracker's state as it was written; raises what `durable.read_json` takes for damage."""
    run_id, ended = found["run_id"], found.get("ended", ELSEWHERE)
    if not (run_id is None or isinstance(run_id, str)) or not (ended is None or isinstance(ended, str)):
        raise TypeError("run_id and ended are texts")
    known = {"uri": str(found["uri"]), "token": str(found["token"]), "run_id": run_id, "ended": ended}
    return known | {"last_step": int(found["last_step"]), "not_finite": dict(found["not_finite"])}


# --------------------------------------------------------------------------------------------- calls to MLflow


def _connect(uri: str) -> MlflowClient:
    # MLflow's own patience (minutes a call) would stall the driver; the backlog is the patient one.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # one line for each of MLflow's 60 tables otherwise
        logging.getLogger("mlflow.store.db.utils").setLevel(
            logging.CRITICAL
        )  # and a traceback for what the backlog tells
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _is_there(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _create(client: MlflowClient, uri: str, experiment: str, name: str, tags: dict[str, str]) -> str:
    """Id of the run with the token in `tags`; the experiment's artifacts lie beside a sqlite file, not in the current folder."""
    found = client.get_experiment_by_name(experiment)
    database = _sqlite_file(uri)
    place = (database.parent / "mlartifacts" / _folder_name(experiment)).as_uri() if database else None
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifact_location=place)
    for run in client.search_runs([experiment_id], f"tags.`qalign.token` = '{tags['qalign.token']}'", max_results=1):
        return run.info.run_id
    return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """MLflow's parameters never change: what a restart changed (workers, say) becomes a tag."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    cut = {_key(name): _cut(value) for name, value in params.items()}
    fresh = [Param(name, value) for name, value in cut.items() if name not in known]
    changed = [RunTag(f"changed.{name}", value) for name, value in cut.items() if known.get(name, value) != value]
    client.log_batch(run_id, params=fresh, tags=changed)


def _register(client: MlflowClient, run_id: str, name: str) -> None:
    """One version of the registered model `name` for this run, however often it is asked for."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if not client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        client.create_model_version(name, source=f"runs:/{run_id}/model", run_id=run_id)


def _is_final(error: Exception) -> bool:
    return getattr(error, "error_code", None) in FINAL or isinstance(error, FileNotFoundError)


# ------------------------------------------------------------------------------------------ names and values


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """{"a": {"b": [1, None]}} → {"a.b.0": "1", "a.b.1": "null"}: a configuration as parameters."""

    def leaves(path: str, node: Any) -> Iterator[tuple[str, str]]:
        if not (isinstance(node, Mapping | list) and node):
            yield path, node if isinstance(node, str) else json.dumps(node)
            return
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from leaves(f"{path}.{key}" if path else str(key), value)

    return dict(leaves("", tree))


def _key(name: str) -> str:
    """`name` in the letters and the length that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def _folder_name(name: str) -> str:
    """`name` as one folder: nothing in it leads elsewhere."""
    return re.sub(r"[^\w. -]", "_", name).lstrip(".").encode()[:250].decode(errors="ignore") or "_"


def _cut(value: str) -> str:
    """`value` in the length that MLflow takes; a cut is visible."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH as most

    note = " … (cut; whole in config.json)"
    return value if len(value) <= most else value[: most - len(note)] + note


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None
