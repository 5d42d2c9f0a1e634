"""Planted secrets: not one of them is in anything that a job writes or prints."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.config import RunConfig
from pipeline.loop import Job
from pipeline.redaction import unsealed
from tests.conftest import write_pairs

ENVIRONMENT = {
    "HF_TOKEN": "hf_PLANTEDplantedPLANTED1",
    "MLFLOW_TRACKING_PASSWORD": "PLANTED-mlflow-password",
    "MLFLOW_TRACKING_TOKEN": "PLANTED-mlflow-token",
    "RAY_AUTH_TOKEN": "PLANTED0123456789abcdef0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "PLANTED/aws+secret",
    "QALIGN_TEST_SECRET": "PLANTED\\back\\slash \"quoted\" 'twice' <é😀>\\",
    "QALIGN_TEST_KEY": "-----BEGIN-----\nPLANTEDlineONE0123456789\nPLANTEDlineTWO0123456789\n-----END-----\n",
}
IN_DATA, IN_TRACKING = "PLANTED-in-data-url", "PLANTED-in-tracking-uri"
SECRETS = [*ENVIRONMENT.values(), IN_DATA, IN_TRACKING]
MARK = b"PLANTED"
"""In all secrets, in letters that no program escapes."""


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Gives files to those who know the password."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Basic {base64.b64encode(f'user:{IN_DATA}'.encode()).decode()}":
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """URL of a file of pairs, with the password in it."""
    (tmp_path / "served").mkdir()
    write_pairs(tmp_path / "served" / "pairs.jsonl", 12)

    def handle(*arguments: object) -> Guarded:
        return Guarded(*arguments, directory=str(tmp_path / "served"))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:{IN_DATA}@127.0.0.1:{server.server_port}/pairs.jsonl"
        server.shutdown()


def holding_a_secret(folder: Path) -> list[str]:
    """Files in which a planted secret stands, in whatever form."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if MARK in path.read_bytes()] + [
        f"{path}: {form}" for path in files for form in FORMS if form in path.read_bytes()
    ]


FORMS = [base64.b64encode(secret.encode())[:-4] for secret in SECRETS]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_no_secret_is_written_or_printed(
    make_config, guarded: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluation and a sweep, with MLflow that works, that is away, and that is no MLflow; and errors."""
    make_config()
    told = ""

    def qalign(job: str, *overrides: str, status: int = 0) -> str:
        nonlocal told
        data = f"data.sources=[{{path: '{guarded}'}}]"
        template = "data.prompt_template='${oc.env:QALIGN_TEST_SECRET} ${oc.env:QALIGN_TEST_KEY} {prompt}'"
        experiment = "tracking.experiment='of ${oc.env:HF_TOKEN}'"
        arguments = [data, "data.eval_fraction=0.3", "tracking.enabled=true", "train.max_steps=1", template, experiment]
        arguments += ["data.max_length=400", *overrides]
        monkeypatch.setattr(
            logging.getLogger(), "handlers", []
        )  # pytest's: with them the terminal's would not be added
        assert main([job, str(tmp_path / "config.yaml"), "--local", *arguments]) == status, capfd.readouterr()
        said = "".join(capfd.readouterr())
        told += said
        return said

    away = f"tracking.uri=http://mlflow:{IN_TRACKING}@127.0.0.1:9"
    own = "objective={name: dpo, beta: 0.5}"
    qalign("train", own, "--dry-run")
    assert "run                " in qalign("train", own)
    assert "evaluation.json" in qalign("eval", own, "sampling.max_new_tokens=2", "--sample")
    assert "MLflow (http://***@127.0.0.1:9) was not told" in qalign("train", "objective={name: dpo, beta: 0.4}", away)
    qalign("sweep", "sweep={space: {objective.beta: [0.1, 0.2]}, metric: eval/loss}")
    qalign("decode", own, "sampling.max_new_tokens=2", "sampling.limit=2")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": ENVIRONMENT["QALIGN_TEST_SECRET"], "chosen": "x"}) + "\n")
    bad = f"data.sources=[{{path: {tmp_path / 'bad.jsonl'}}}]"
    assert "no usable record" in qalign("train", bad, status=2)
    assert "holds a secret" in qalign("train", "name=run-${oc.env:HF_TOKEN}", status=2)
    for key in ("model.path", "checkpoint_from", "sampling.scorer", "objective.name", "train.max_steps", "nothing"):
        assert "error: " in qalign("eval", f"{key}=${{oc.env:QALIGN_TEST_SECRET}}", status=2)
    wrong = guarded.replace("pairs", "nowhere")
    assert "http://***@127.0.0.1" in qalign("train", f"data.sources=[{{path: '{wrong}'}}]", status=2)
    assert "tracking.uri: ftp://***@h" in qalign("train", f"tracking.uri=ftp://u:{IN_TRACKING}@h", status=2)
    assert MARK.decode() not in told, told

    outputs = tmp_path / "outputs"
    assert holding_a_secret(outputs) == []
    runs = [json.loads(path.read_text())["config"] for path in outputs.glob("runs/*/run.json")]
    assert {run["data"]["sources"][0]["path"].partition("@")[0] for run in runs} == {"http://***"}
    assert next(outputs.glob("sweeps/*/sweep.html")).is_file()
    for job in outputs.glob("sweeps/*/trials/*/job.json"):
        config = json.loads(job.read_text())["plain"]["config"]
        assert config["data"]["prompt_template"] == "${oc.env:QALIGN_TEST_SECRET} ${oc.env:QALIGN_TEST_KEY} {prompt}"
        assert Job.parse(unsealed(json.loads(job.read_text())["plain"])).config.data.prompt_template == (
            f"{ENVIRONMENT['QALIGN_TEST_SECRET']} {ENVIRONMENT['QALIGN_TEST_KEY']} {{prompt}}"
        )
    assert {line.split(",")[1] for line in next(outputs.glob("sweeps/*/summary.csv")).read_text().splitlines()[1:]} == {
        "finished"
    }
    with sqlite3.connect(outputs / "mlflow.db") as database:
        params = dict(database.execute("select key, value from params").fetchall())
    assert params["data.sources.0.path"].startswith("http://***@127.0.0.1:")
    planted_file = outputs / "x.txt"
    planted_file.write_text(f"{IN_DATA} {FORMS[0].decode()}")
    assert len(holding_a_secret(outputs)) == 2, "the search finds what is there"


def test_workers_are_not_told_what_they_do_not_need(make_config, tmp_path: Path) -> None:
    config: RunConfig = make_config(
        f"data.sources=[{{path: 's3://key:{IN_DATA}@bucket/x.jsonl'}}]", f"tracking.uri=http://u:{IN_TRACKING}@h"
    )
    plain = Job(config, tmp_path, tmp_path, None, "m").plain()
    assert not [secret for secret in SECRETS if secret in json.dumps(plain)]
    again = Job.parse(plain).config
    assert again.data.sources[0].path == "s3://***@bucket/x.jsonl"
    assert again.model_copy(update={"data": config.data, "tracking": config.tracking}) == config


def test_the_environment_has_no_names_that_we_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers get their own environment: what we hand them by name holds no secret."""
    from pipeline.cluster import WORKER_ENVIRONMENT as HANDED

    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    assert not [name for name in HANDED if name.endswith(("TOKEN", "PASSWORD", "KEY", "SECRET"))]
    assert os.environ["HF_TOKEN"] not in HANDED.values()
