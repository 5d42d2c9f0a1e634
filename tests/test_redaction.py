"""What counts as a secret, and that nothing else is changed."""

from __future__ import annotations

import html
import json
import logging
import re
import sys
import warnings
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
import yaml
from markupsafe import Markup

from pipeline.durable import write_json
from pipeline.files import one_line
from pipeline.redaction import HIDDEN, MissingSecret, redact, redacted, sealed, unsealed, urls_without_credentials
from pipeline.terminal import RedactingFormatter, guarded, leaving_without_secrets
from tune.table import Table, Trial


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
    before = sys.stdout, sys.stderr, sys.excepthook, logging.getLogRecordFactory()
    with guarded():
        sys.excepthook(ValueError, ValueError("swordfish-9"), None)
    assert capsys.readouterr().err == "ValueError: ***\n"
    assert (sys.stdout, sys.stderr, sys.excepthook, logging.getLogRecordFactory()) == before


NASTY = {
    "quotes": "p\\a\"ss'w/örd\n&<x>%20 é😀",
    "backslash": "C:\\temp\\new\\",
    "words": "ab c  def\tgh ijk",
    "letters": "日本語のパスワード",
    "key": "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nAbCdEfGhIjKlMnOpQrSt==\n-----END KEY-----\n",
    "plain": "hf_ABCdefGHIjkl",
}
"""Secrets that JSON, YAML, Python, URLs and HTML write in other ways."""


def written(text: str) -> dict[str, str]:
    """The text as programs write it."""
    in_json = json.dumps(text)
    return {
        "as it is": text,
        "json": in_json,
        "json, not ASCII": json.dumps(text, ensure_ascii=False),
        "json in json": json.dumps({"a": json.dumps({"b": text}, ensure_ascii=False)}),
        "repr": repr(text),
        "repr in repr": repr([repr(text)]),
        "ascii": ascii(text),
        "bytes": repr(text.encode()),
        "error": repr(KeyError(text)),
        "yaml": yaml.safe_dump({"a": text}, width=10**6),
        "yaml, quoted": yaml.safe_dump(text, default_style="'", allow_unicode=True, width=10**6),
        "yaml, double": yaml.safe_dump(text, default_style='"', width=10**6),
        "url": quote(text),
        "url, all": quote(text, safe="").lower() if text.islower() else quote(text, safe=""),
        "url, plus": quote_plus(text),
        "url in url": quote(quote(text)),
        "html": html.escape(text),
        "html of html": html.escape(html.escape(text)),
        "json in html": html.escape(in_json),
        "jinja": str(Markup("%s") % text),
        "one line": " ".join(text.split()),
        "base64": b64encode(text.encode()).decode(),
        "password": b64encode(b"user:" + text.encode()).decode(),
        "password of another length": b64encode(b"ab:" + text.encode() + b"x").decode(),
    }


@pytest.mark.parametrize("name", NASTY)
def test_a_secret_is_found_in_whatever_form_it_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = NASTY[name]
    before = written(secret)
    monkeypatch.setenv("MY_SECRET", secret)
    for form, text in before.items():
        shown = redact(f"said {text} there")
        assert shown.startswith("said ") and shown.rstrip().endswith("there"), form
        left = shown.removeprefix("said ").rstrip().removesuffix("there")
        rest = re.sub(r"\W|(?<=\W)[ab](?=\W)|dXNlcj|YWI6|eA|quot|amp|KeyError", "", left.replace(HIDDEN, "", 1))
        assert HIDDEN in left and len(rest) < 5, (form, shown)


@pytest.mark.parametrize("name", NASTY)
def test_what_is_sealed_is_whole_again_where_the_secret_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = NASTY[name]
    monkeypatch.setenv("MY_SECRET", secret)
    monkeypatch.setenv("HOME_OF_SOMEBODY", "/home/somebody")
    tree = {
        "a": [f"<{secret}> and {secret}", 1, None],
        "b": {"c": secret, "d": "${oc.env:HOME_OF_SOMEBODY} https://u:p@h"},
    }
    hidden = sealed(tree)
    assert hidden["b"] == {"c": "${oc.env:MY_SECRET}", "d": "${oc.env:HOME_OF_SOMEBODY} https://***@h"}
    assert hidden["a"] == ["<${oc.env:MY_SECRET}> and ${oc.env:MY_SECRET}", 1, None]
    assert unsealed(hidden)["a"] == tree["a"]
    assert sealed(hidden) == hidden
    monkeypatch.delenv("MY_SECRET")
    with pytest.raises(MissingSecret, match=r"^MY_SECRET: the environment of this process lacks it"):
        unsealed(hidden)


@pytest.mark.parametrize("value", ["1", "12", "abc", "true", "None", "12345", "token"])
def test_short_values_and_words_are_no_secrets(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", value)
    text = f'{{"step": 1, "a": "{value}", "ok": true, "n": 12345}} {value}'
    assert redact(text) == text


def test_a_short_secret_is_hidden_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "horse")
    text = 'horse "horse" \\"horse\\" pw=horse; /data/horse/x seahorse horses horse-power horse.txt'
    shown = '*** "***" \\"***\\" pw=***; /data/horse/x seahorse horses horse-power horse.txt'
    assert redact(text) == shown
    assert unsealed(sealed([text])) == [text]


def test_where_a_secret_lies_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pem").write_text("x")
    monkeypatch.setenv("TLS_KEY", str(tmp_path / "key.pem"))
    monkeypatch.setenv("PWD", "/some/where/or/other")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/some/where/else")
    text = f"{tmp_path}/key.pem /some/where/or/other /some/where/else"
    assert redact(text) == text


def test_all_that_a_process_says_is_guarded(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MY_SECRET", "sword\\fish-9")
    said = []

    class Handler(logging.Handler):
        """Of another library, with a formatter of its own."""

        def emit(self, record: logging.LogRecord) -> None:
            said.append(self.format(record))

    handler = Handler()
    logging.getLogger("theirs").addHandler(handler)
    with guarded():
        print("out", "sword\\fish-9", repr("sword\\fish-9"))
        print("err", "sword\\fish-9", file=sys.stderr)
        warnings.warn("warned of sword\\fish-9", stacklevel=1)
        try:
            raise ValueError("sword\\fish-9")
        except ValueError:
            logging.getLogger("theirs").exception("failed with %r", "sword\\fish-9")
    logging.getLogger("theirs").removeHandler(handler)
    told = capsys.readouterr()
    assert told.out == "out *** '***'\n"
    assert "err ***" in told.err
    assert "fish" not in told.err + "".join(said)
    assert said[0].startswith("failed with '***'\nTraceback") and said[0].endswith("ValueError: ***")


def test_errors_leave_a_worker_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-9")
    with (
        pytest.raises(RuntimeError, match=r"^OSError: no \*\*\*\n(.*\n)*Traceback") as caught,
        leaving_without_secrets(),
    ):
        raise OSError("no swordfish-9") from ValueError("swordfish-9")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "swordfish" not in str(caught.value)
    with pytest.raises(KeyError), leaving_without_secrets():
        raise KeyError("harmless")


def test_small_files_of_ours_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", NASTY["quotes"])
    write_json(tmp_path / "a.json", {"a": [NASTY["quotes"]], "b": f"s3://k:{NASTY['plain']}@h"})
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert found == {"a": ["${oc.env:MY_SECRET}"], "b": "s3://***@h"}
    table = Table(tmp_path)
    trial = Trial(
        1, {"data.prompt_template": 0}, {"data.prompt_template": NASTY["quotes"]}, "run", reason=NASTY["quotes"]
    )
    table.put(trial)
    assert "/örd" not in "".join(file.read_text(encoding="utf-8") for file in tmp_path.iterdir())
    again = Table(tmp_path).trials[1]
    assert again.overrides == trial.overrides, "a trial that goes on is what it was"
    assert again.label == "prompt_template=***"
    table.write_summary("eval/loss", False)
    assert "/örd" not in "".join(file.read_text(encoding="utf-8") for file in tmp_path.iterdir())


def test_a_message_that_is_cut_ends_with_no_part_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-" * 5)
    error = OSError("x" * 180 + "swordfish-" * 5)
    assert one_line(error) == "x" * 180 + HIDDEN
