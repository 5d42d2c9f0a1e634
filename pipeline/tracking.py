"""What a driver may tell about its run, and to whom: `start` gives the MLflow tracker, or one that tells nobody.

Left out: MLflow itself (`mlflow_run`), what is logged and when (`driver`), and the step metrics' own file (`progress`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline.config import ConfigError, RunConfig
from pipeline.redaction import redact

DATABASE = "mlflow.db"
SCHEMES = {"sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks"}
VERSIONS = ("qalign", "torch", "ray", "deepspeed", "transformers")
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """What a driver may tell about its run. This base tells nobody: it is the tracker of `tracking.enabled: false`."""

    @property
    def location(self) -> str:
        """Where a person finds the run; empty before anything was sent and without tracking."""
        return ""

    def owes(self, status: Status) -> bool:
        """Whether nobody was told yet that the run ended so: its driver was killed before it could, or did not get through."""
        return False

    def last_step(self) -> int:
        """Newest step that is already logged; 0: none."""
        return 0

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The resolved configuration: each leaf as a parameter, the whole as `config.json`."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one optimizer step. Those that aren't finite are counted in tags instead."""

    def log_summary(self, summary: Mapping[str, float | int | str]) -> None:
        """Facts about the whole run: numbers as metrics, texts as tags."""

    def log_text(self, text: str, name: str) -> None:
        """A text artifact."""

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        """A JSON artifact."""

    def log_artifact(self, file: Path) -> None:
        """A copy of `file`, which has to stay where it is until `finish`."""

    def log_model_reference(self, path: Path, copy: bool = False, register_as: str | None = None) -> None:
        """Where the exported model is; with `copy` or `register_as` its files go to the run's artifacts, too."""

    def finish(self, status: Status) -> None:
        """Send what is left, and end the run. Says what could not be sent."""


def start(
    config: RunConfig, run: Path, identity: str, name: str | None = None, parent: Tracker | None = None
) -> Tracker:
    """The tracker of the job in the folder `run`: continues its MLflow run, or begins one at the first entry.

    A new run gets `name` (default: the folder's) and is nested in the run of `parent`.
    Raises ConfigError when the tracking URI is none that MLflow understands.
    """
    if not config.tracking.enabled:
        return Tracker()
    from pipeline.mlflow_run import MlflowTracker

    tags = {"qalign.identity": identity, "qalign.folder": str(run.resolve()), **_versions(), **_commit()}
    assert parent is None or isinstance(parent, MlflowTracker)
    return MlflowTracker(tracking_uri(config), config.tracking.experiment, run, tags, name, parent)


def tracking_uri(config: RunConfig) -> str:
    """config.tracking.uri, else MLFLOW_TRACKING_URI, else a sqlite file in `storage`. Raises ConfigError."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{Path(config.storage).resolve() / DATABASE}"
    if urlsplit(uri).scheme.split("+")[0] not in SCHEMES and uri != "databricks":
        raise ConfigError(
            f"tracking.uri: {redact(uri)} is no MLflow server or database; use sqlite:///FILE or http://HOST:PORT"
        )
    return uri


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            found[f"version.{package}"] = "not installed as a package"
    return found


@cache
def _commit() -> dict[str, str]:
    """The commit of the current folder and whether files differ from it; nothing outside of a git repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode:
        return {}
    return {"git.commit": done.stdout.strip(), "git.dirty": str(bool(changes.stdout.strip())).lower()}
