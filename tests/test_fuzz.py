"""Malformed input, made by the hundred: refused in one line or quarantined and counted; nothing crashes, nothing is lost."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline import checkpoint
from pipeline.config import ConfigError, DataConfig, RunConfig, Source
from pipeline.config_file import load
from pipeline.contracts import ROW_SCHEMA
from pipeline.data import Made, make_rows
from pipeline.errors import UserError
from pipeline.fencing import Attempt, next_attempt
from pipeline.progress import read_metrics
from pipeline.rendering import Renderer
from pipeline.rows import StaleCache, finish, is_finished, manifest, write_part
from pipeline.sources import plan
from tests.conftest import tiny_tokenizer
from tests.malformed import GOOD, JUNK, TEXTS, broken_bytes, broken_line, broken_record, changed, files

KINDS = sorted(GOOD)
wide = settings(max_examples=200, suppress_health_check=list(HealthCheck))


def refusal(act: Callable[[], Any], error: type[Exception] = UserError) -> str:
    """What `act` says when it refuses: one line; empty when it does not. Other errors are crashes."""
    try:
        act()
    except error as refused:
        return str(refused)
    return ""


# -------------------------------------------------------------------------------------------------- records


@cache
def renderer(kind: str) -> Renderer:
    return Renderer(tiny_tokenizer(), DataConfig(kind=kind, sources=(Source(path="x"),), max_length=128))


def prepared(path: Path, kind: str) -> tuple[int, list[Made]]:
    """Records that were planned, and what became of them."""
    made = plan([Source(path=str(path))], path.parent / "work", chunk_bytes=200)
    return made.records, [make_rows(chunk, renderer(kind), mismatched=False) for chunk in made.chunks]


def check_accounted(records: int, made: list[Made]) -> None:
    rows = [row for one in made for row in one.rows]
    bad = [entry for one in made for entry in one.bad]
    assert len(rows) + len(bad) == records, "a record was lost, or counted twice"
    assert len({row["row_id"] for row in rows}) == len(rows)
    for entry in bad:
        assert 0 < len(entry["reason"]) < 200 and "\n" not in entry["reason"], entry
        json.dumps(entry, ensure_ascii=False).encode()  # as it goes to the quarantine file
    check_rows(rows)


def check_rows(rows: list[dict[str, Any]]) -> None:
    """They fit the schema, and no number of theirs can make a loss infinite."""
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
    table.validate(full=True)
    for row in table.to_pylist():
        numbers = [row["weight"], *(row["behaviour_logprobs"] or []), *chain(*(row["token_rewards"] or []))]
        assert all(math.isfinite(number) for number in numbers if number is not None), row
        assert row["prompt_ids"] and all(row["response_ids"])


def check_lines(kind: str, lines: list[bytes]) -> None:
    good = [json.dumps(value).encode() for value in GOOD[kind]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        path.write_bytes(b"\n".join([*good, *lines, *good]) + b"\n")
        records, made = prepared(path, kind)
    assert records == 2 * len(good) + len(lines)
    check_accounted(records, made)
    kept = {int(row["source"].rpartition(":")[2]) for one in made for row in one.rows}
    assert {1, records} <= kept, "what is good is kept, whatever stands beside it"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=20)
def test_lines_are_rows_or_quarantined(kind: str, data: st.DataObject) -> None:
    check_lines(kind, data.draw(st.lists(broken_line(kind), min_size=1, max_size=4)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@wide
def test_many_lines_are_rows_or_quarantined(kind: str, data: st.DataObject) -> None:
    check_lines(kind, data.draw(st.lists(broken_line(kind), min_size=1, max_size=4)))


def check_array(kind: str, whole: bytes) -> None:
    """A file that is one JSON array, or was one before it was broken."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        path.write_bytes(whole)
        check_accounted(*prepared(path, kind))


@pytest.mark.slow
@given(data=st.data())
@wide
def test_arrays_are_rows_or_quarantined(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    whole = json.dumps([data.draw(broken_record(kind)), *GOOD[kind]]).encode()
    check_array(kind, data.draw(st.just(whole) | broken_bytes(whole)))


def check_parquet(kind: str, values: list[dict[str, Any]], breaking: st.DataObject | None) -> None:
    try:
        table = pa.Table.from_pylist(values)
    except (pa.ArrowException, OverflowError, UnicodeError, ValueError):
        return  # no such table can be written
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.parquet"
        try:
            parquet.write_table(table, path)
        except pa.ArrowException:
            return
        if breaking is not None:
            path.write_bytes(breaking.draw(broken_bytes(path.read_bytes())))
        found: list[Any] = []
        said = refusal(lambda: found.extend(prepared(path, kind)), ConfigError)
        assert "\n" not in said and ("data.sources.0.path" in said) == (not found)
        if found:
            check_accounted(*found)


@pytest.mark.slow
@given(data=st.data())
@wide
def test_parquet_columns_of_any_type(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    value = data.draw(broken_record(kind).filter(lambda value: isinstance(value, dict) and value))
    check_parquet(kind, [value, *data.draw(st.lists(st.just(value), max_size=2))], None)


@pytest.mark.slow
@given(data=st.data())
@wide
def test_parquet_files_that_are_damaged(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    check_parquet(kind, [GOOD[kind][0]] * 5, data)


# --------------------------------------------------------------------------------------------------- config

CONFIG: dict[str, Any] = {
    "data": {"kind": "preference", "sources": [{"path": "x.jsonl", "columns": {"prompt": "q"}}], "max_length": 64},
    "model": {"path": "m", "lora": {"r": 4}},
    "objective": {"name": "dpo", "beta": 0.1},
    "optimizer": {"lr": 1e-5, "betas": [0.9, 0.95]},
    "train": {"epochs": 1, "skip_nan": 2},
    "scaling": {"workers": 2},
    "checkpoint": {"every": 5, "patience": 10},
    "sampling": {"temperature": 1.0},
}
KEYS = st.sampled_from(
    ["objective.beta", "data.sources.0.path", "data.sources.9.path", "train", "optimizer.betas.1", "", "a..b", "x"]
)
OVERRIDES = st.tuples(KEYS, st.sampled_from(["=", "", "=="]), st.one_of(TEXTS, JUNK.map(repr))).map("".join)


def check_config(text: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(text)
        found: list[RunConfig] = []
        said = refusal(lambda: found.append(load(path, overrides)), ConfigError)
        assert "\n" not in said and bool(said) == (not found)


@st.composite
def broken_config(draw: st.DrawFn) -> bytes:
    value: Any = CONFIG
    for _ in range(draw(st.integers(1, 3))):
        value = changed(draw, value)
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(st.one_of(st.just(text), st.just(text), broken_bytes(text)))


@given(text=broken_config(), overrides=st.lists(OVERRIDES, max_size=2))
@settings(max_examples=40)
def test_configurations_are_good_or_refused_in_one_line(text: bytes, overrides: list[str]) -> None:
    check_config(text, overrides)


@pytest.mark.slow
@given(text=broken_config(), overrides=st.lists(OVERRIDES, max_size=2))
@wide
def test_many_configurations_are_good_or_refused_in_one_line(text: bytes, overrides: list[str]) -> None:
    check_config(text, overrides)


# -------------------------------------------------------------------------------------------------- storage

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.5)}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    attempt = Attempt.begin(run)
    for step in (10, 20):
        folder = attempt.temporary(step)
        for kind in ("weights", "moments"):
            checkpoint.write_tensors(folder / f"{kind}-00001-of-00001.safetensors", WEIGHTS)
        checkpoint.finish(folder, {"step": step, "best": None, "metrics": {}, "updates": {"policy": step}})
        attempt.commit(folder, step)
    return run


def spoil(data: st.DataObject, path: Path) -> None:
    """Damage one file: bytes, JSON values, or all of it."""
    way = data.draw(st.sampled_from(["bytes", "json", "missing", "empty", "folder"]))
    content = path.read_bytes()
    if way == "bytes":
        path.write_bytes(data.draw(broken_bytes(content)))
    elif way == "json" and path.suffix == ".json":
        path.write_text(json.dumps(changed(data.draw, json.loads(content))))
    elif way == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """As a resumed worker reads it."""
    assert isinstance(checkpoint.read_state(folder)["step"], int)
    mine = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    checkpoint.load_into(mine, folder)
    for _ in checkpoint.read_tensors(folder, "moments"):
        pass
    return mine


def check_checkpoint(data: st.DataObject, original: Path, sealed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(original, run)
        newest = checkpoint.path_of(run, 20)
        for path in data.draw(st.lists(st.sampled_from(files(newest)), min_size=1, max_size=2, unique=True)):
            spoil(data, path)
        if sealed:  # as by somebody who knows the form
            entries = {path.name: checkpoint._entry(path) for path in files(newest) if path.name != "manifest.json"}
            if (newest / "manifest.json").is_file():
                (newest / "manifest.json").write_text(json.dumps({"files": entries}))
        found = checkpoint.latest(run)
        assert found in (newest, checkpoint.path_of(run, 10))
        read: dict[str, torch.Tensor] = {}
        said = refusal(lambda: read.update(read_checkpoint(found)), checkpoint.Corrupt)
        assert "\n" not in said and (str(found) in said) == (not read)
        if not sealed:
            assert read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], WEIGHTS[name]) for name in read)


@given(data=st.data())
@settings(max_examples=25)
def test_a_damaged_checkpoint_is_never_read(two_checkpoints: Path, data: st.DataObject) -> None:
    check_checkpoint(data, two_checkpoints, sealed=False)


@pytest.mark.slow
@given(data=st.data(), sealed=st.booleans())
@wide
def test_many_damaged_checkpoints(two_checkpoints: Path, data: st.DataObject, sealed: bool) -> None:
    check_checkpoint(data, two_checkpoints, sealed)


def check_run_files(data: st.DataObject) -> None:
    """Small files of a run that a crash or a person may leave in any state."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "attempt").write_bytes(data.draw(broken_bytes(b"3\n")))
        said = refusal(partial(next_attempt, run))
        assert "\n" not in said and (not said or "attempt" in said)
        lines = b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(1, 4))
        (run / "metrics.jsonl").write_bytes(data.draw(broken_bytes(lines)))
        assert all(isinstance(line["step"], int) for line in read_metrics(run / "metrics.jsonl"))


def check_cache(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder)
        write_part(rows, 0, pa.table({"x": [1, 2]}))
        finish(rows, range(1), {"summary": {}})
        spoil(data, data.draw(st.sampled_from(files(rows))))
        said = refusal(partial(manifest, rows), StaleCache)
        assert "\n" not in said and (not said or str(rows) in said)
        assert not (said and is_finished(rows))


@given(data=st.data())
@settings(max_examples=25)
def test_files_of_a_run_and_of_a_cache_in_any_state(data: st.DataObject) -> None:
    check_run_files(data)
    check_cache(data)


@pytest.mark.slow
@given(data=st.data())
@wide
def test_many_files_of_a_run_and_of_a_cache_in_any_state(data: st.DataObject) -> None:
    check_run_files(data)
    check_cache(data)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # damage is warned of, hundreds of times
