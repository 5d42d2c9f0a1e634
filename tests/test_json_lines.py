"""The bound on a record: what is larger is refused unread, wherever it stands, and memory stays that of the bound."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline import data, sources
from pipeline.config import Source
from pipeline.sources import Plan, RawRecord, plan, read

GOOD, LAST = {"n": 1}, {"n": "é" * 20}
MOST = 64
REASON = "larger than data.max_record_bytes (64 bytes)"


def planned(path: Path, most: int = MOST, chunk_bytes: int = 8 << 20) -> Plan:
    return plan([Source(path=str(path))], path.parent / "work", chunk_bytes=chunk_bytes, max_record_bytes=most)


def records(found: Plan) -> list[RawRecord]:
    return [record for chunk in found.chunks for record in read(chunk)]


@pytest.mark.parametrize("chunk_bytes", [1, 10, 100, 1000, 8 << 20])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_line_that_is_too_large_is_refused_and_the_others_keep_their_places(tmp_path, chunk_bytes, ending) -> None:
    exact = '{"n": "' + "x" * (MOST - 9) + '"}'
    long = '{"n": "' + "y" * 3000 + '"}'
    lines = [json.dumps(GOOD), "", long, " " * 500, exact, json.dumps(LAST, ensure_ascii=False), long]
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join(lines).encode())
    most = MOST + (ending == "\r\n")
    found = planned(path, most, chunk_bytes)
    assert found.records == 5
    first, second, third, fourth, fifth = records(found)
    assert [r.source for r in (first, second, third, fourth, fifth)] == [f"a.jsonl:{n}" for n in (1, 3, 5, 6, 7)]
    assert (first.value, third.value, fourth.value) == (GOOD, json.loads(exact), LAST)
    for refused in (second, fifth):
        assert (refused.value, refused.error) == (None, REASON.replace("64", str(most)))
        assert refused.raw and long.startswith(refused.raw)


def test_the_bound_is_part_of_what_a_file_holds_only_where_it_changes_that(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": "xxxxxxxxxxxxxxxxxxxx"}\n' + " " * 300)
    names = [planned(path, most, size).fingerprint for most in (8, 20, 28, 29, 1000) for size in (1, 9, 1000)]
    assert len(set(names)) == 2
    assert set(names[:9]).isdisjoint(names[9:]), "the lines have 8 and 29 bytes: from 29 on, nothing is refused"


@pytest.mark.parametrize("packed", ["gz", "bz2", "zst"])
def test_what_a_file_unpacks_to_fills_no_memory(tmp_path: Path, packed: str) -> None:
    line = b'{"n": "' + b"z" * (32 << 20) + b'"}\n{"n": 2}\n'
    path = tmp_path / f"a.jsonl.{packed}"
    with (
        pa.CompressedOutputStream(str(path), "zstd")
        if packed == "zst"
        else {"gz": gzip, "bz2": bz2}[packed].open(path, "wb", 1) as out
    ):
        out.write(line)
    tracemalloc.start()
    refused, last = records(planned(path, 1 << 20, 1 << 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.error == "larger than data.max_record_bytes (1,048,576 bytes)"
    assert last.value == {"n": 2}
    assert peak < 12 << 20


# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_elements_of_an_array_are_bounded_and_counted_like_lines(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr("pipeline.json_records._BLOCK", block)
    hostile = {"n": 'a "quoted" \\ [text], {with} \\" marks', "deep": [[{"x": ["]", "}", "\\"]}]] * 3}
    elements = [GOOD, hostile, 5, "x" * 200, LAST, [1, [2]], {"n": -1.5e10}, None]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(elements, indent=2, ensure_ascii=False) + "\n ")
    found = records(planned(path))
    assert [r.source for r in found] == [f"a.json:{i}" for i in range(1, 9)]
    assert [r.value for r in found] == [GOOD, None, None, None, LAST, None, {"n": -1.5e10}, None]
    errors = [r.error for r in found]
    assert errors[1] == errors[3] == REASON
    assert errors[2] == errors[5] == errors[7] == "not a JSON object"
    assert [r.value for r in records(planned(path, 1 << 20))][1] == hostile


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", None),
        (" [ ] ", None),
        ("[1", "Expecting ',' delimiter"),
        ("[1 2]", "Expecting ',' delimiter"),
        ("[1,]", "Expecting value"),
        ("[1] 2", "Extra data"),
        ("[", "Expecting value"),
        ('["abc', "Unterminated string starting at"),
        ('["' + "x" * 200 + '", ["' + "y" * 200, "Unterminated element"),
        ("[NaN]", "NaN or Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "number too long"),
        ('[{"a": tru}]', "Expecting value"),
    ],
)
def test_an_array_that_is_broken_anywhere_is_one_broken_record(tmp_path, monkeypatch, text, reason, block) -> None:
    monkeypatch.setattr("pipeline.json_records._BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(text)
    most = MOST if len(text) < 1000 else 200_000
    found = records(planned(path, most))
    assert [(r.source, r.error) for r in found] == ([("a.json:1", f"broken JSON: {reason}")] if reason else [])
    path.write_bytes(b'[{"n": "\xff"}]')
    assert [r.error for r in records(planned(path))] == ["bad UTF-8"]


# ------------------------------------------------------------------------------------------------ parquet


def test_a_cell_of_a_parquet_file_takes_none_of_its_neighbours_along(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = ["a", "b" * 5000, "c", "d" * 5000, "e"]
    parquet.write_table(pa.table({"n": texts, "chat": [[{"role": "user", "content": t}] for t in texts]}), path)
    found = records(planned(path, 1000))
    assert [r.value and r.value["n"] for r in found] == ["a", None, "c", None, "e"]
    assert {r.error for r in found if r.value is None} == {"larger than data.max_record_bytes (1,000 bytes)"}


def test_rows_that_share_a_large_value_are_not_unpacked_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 32 << 20)
    path = tmp_path / "a.parquet"
    table = pa.table({"n": ["x" * (5 << 20)] * 60})
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=8 << 20)
    del table
    assert path.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for chunk in planned(path, 1 << 20).chunks:
        for record in read(chunk):
            most, count = max(most, pa.total_allocated_bytes() - before), count + (record.error is not None)
    assert count == 60
    assert most < 100 << 20, "300 MB otherwise"


# --------------------------------------------------------------------------------------------------- rows


def test_refused_records_are_quarantined_and_batches_make_the_rows_of_the_whole(
    make_config, tmp_path: Path, monkeypatch
) -> None:
    lines = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    lines[7]["prompt"] *= 300
    lines[9] = {"prompt": "no answers"}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    given = [f"data.sources=[{{path: {tmp_path / 'a.jsonl.gz'}}}]", "data.max_record_bytes=200"]

    def prepared(storage: str) -> tuple[data.Summary, list[dict], list[str]]:
        config = make_config(*given, f"storage={tmp_path / storage}")
        folder = data.prepare(config, config.model.path, local=True)
        table = pa.ipc.open_file(str(next(folder.glob("part-*.arrow")))).read_all().to_pylist()
        return data.summary(folder), table, (folder / data.QUARANTINE).read_text().splitlines()

    whole = prepared("whole")
    monkeypatch.setattr(data, "BATCH_RECORDS", 6)
    assert prepared("batches") == whole
    found, rows, quarantine = whole
    assert (found.records, found.rows, found.quarantined) == (40, 38, 2)
    assert [row["row_id"] for row in rows] == [i for i in range(40) if i not in (7, 9)]
    assert json.loads(quarantine[0])["reason"] == "larger than data.max_record_bytes (200 bytes)"
    assert json.loads(quarantine[0])["source"] == "a.jsonl.gz:8"
