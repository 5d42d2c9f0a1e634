"""What counts as a secret, and that nothing else is changed."""

from __future__ import annotations

import logging
import sys

import pytest

from pipeline.redaction import RedactingFormatter, log_to_terminal, redact, redacted, urls_without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("at postgresql+psycopg2://u:p@ss@db/mlflow?sslmode=require.", "at postgresql+psycopg2://***@db/mlflow?sslmode=require."),
        ("s3://AKIA:ab/cd+e@bucket/x.jsonl", "s3://***@bucket/x.jsonl"),
        ("zip://a.jsonl::https://u:p@host/x.zip", "zip://a.jsonl::https://***@host/x.zip"),
        ("https://h/x?a=1&X-Amz-Signature=abc&X-Amz-Credential=d&b=2", "https://h/x?a=1&X-Amz-Signature=***&X-Amz-Credential=***&b=2"),
        ("https://h/x?sv=1&sig=abc%2B", "https://h/x?sv=1&sig=***"),
        ("https://h/x?access_token=abc#part", "https://h/x?access_token=***#part"),
        ("cannot open 'ftp://u:p@h/x' and 'ftp://h/y@z'", "cannot open 'ftp://***@h/x' and 'ftp://h/y@z'"),
    ],
)  # fmt: skip
def test_credentials_of_urls_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8265/api?limit=3&design=x",
        "hf://datasets/owner/name@main/x.parquet",
        "http://host:5000/a/b@c",
        "sqlite:////a/b.db",
        "mail me@home.org about a://b, c@d",
        "data.sources.0.path: nowhere.jsonl does not exist",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_whose_names_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdefgh",
        "MLFLOW_TRACKING_PASSWORD": "hunter2hunter2",
        "AWS_SECRET_ACCESS_KEY": "hf_abcdefgh+more",
    }
    harmless = {"TOKENIZERS_PARALLELISM": "false-ish", "AWS_ACCESS_KEY_ID": "harmless-id", "SHORT_TOKEN": "true"}
    for name, value in (secrets | harmless).items():
        monkeypatch.setenv(name, value)
    assert redact("a hf_abcdefgh b hunter2hunter2 c hf_abcdefgh+more") == "a *** b *** c ***"
    text = " ".join(harmless.values())
    assert redact(text) == text


def test_trees_keep_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-9")
    tree = {"a": ["http://u:p@h/x", 1, None], "b": {"c": "say swordfish-9", "d": 0.5}, "e": ("x: http://u:p@h",)}
    assert redacted(tree) == {
        "a": ["http://***@h/x", 1, None],
        "b": {"c": "say ***", "d": 0.5},
        "e": ["x: http://***@h"],
    }
    kept = urls_without_credentials(tree)
    assert kept["a"][0] == "http://***@h/x"
    assert (kept["b"]["c"], kept["e"]) == ("say swordfish-9", ["x: http://u:p@h"]), "only values that are URLs"


def test_log_records_and_their_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-9")
    try:
        raise ValueError("no swordfish-9 at http://u:p@h")
    except ValueError:
        record = logging.LogRecord("x", logging.WARNING, "f", 1, "said %s", ("swordfish-9",), sys.exc_info())
    text = RedactingFormatter("%(message)s").format(record)
    assert "said ***" in text and "ValueError: no *** at http://***@h" in text
    assert "swordfish" not in text


def test_errors_that_nobody_catches_are_shown_without_secrets(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-9")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("threading.excepthook", None)
    log_to_terminal()
    sys.excepthook(ValueError, ValueError("swordfish-9"), None)
    assert capsys.readouterr().err == "ValueError: ***\n"
