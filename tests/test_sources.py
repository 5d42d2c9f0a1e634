"""Finding, cutting, hashing and reading files: nothing is lost, nothing is counted twice, nothing raises."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import asdict
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.config import ConfigError, Source
from pipeline.data import prepare
from pipeline.json_records import EXCERPT
from pipeline.rows import Rows
from pipeline.sources import Chunk, plan, read


def records(made) -> list:
    return [record for chunk in made.chunks for record in read(chunk)]


def lines(path: Path, *values, end: str = "\n") -> Path:
    path.write_text("".join(json.dumps(value) + end for value in values), encoding="utf-8")
    return path


def source(path, **more) -> Source:
    return Source(path=str(path), **more)


def values(made) -> list:
    return [record.value for record in records(made)]


ROWS = [{"prompt": f"p{i}", "chosen": "é" * i, "rejected": "r"} for i in range(10)]


# -------------------------------------------------------------------------------------------------- formats


def test_every_format_holds_the_same_records(tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "last.jsonl").write_text(text.rstrip("\n"))
    (tmp_path / "crlf.jsonl").write_text(text.replace("\n", "\r\n"), newline="")
    (tmp_path / "bom.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    for name in sorted(os.listdir(tmp_path)):
        for chunk_bytes in (1, 50, 1 << 20):
            made = plan([source(tmp_path / name)], tmp_path / "work", chunk_bytes=chunk_bytes)
            read_back = records(made)
            assert [record.value for record in read_back] == ROWS, name
            assert [record.row_id for record in read_back] == list(range(10))
            assert [record.source for record in read_back] == [f"{name}:{i}" for i in range(1, 11)]
            assert made.records == 10


def test_chunks_are_plain_and_small(tmp_path):
    path = lines(tmp_path / "a.jsonl", *ROWS)
    made = plan([source(path, columns={"chosen": "rejected"})], tmp_path, chunk_bytes=100)
    assert len(made.chunks) > 3
    assert all(chunk.stop - chunk.start < 200 for chunk in made.chunks)
    assert [chunk.start for chunk in made.chunks[1:]] == [chunk.stop for chunk in made.chunks[:-1]]
    table = pa.Table.from_pylist([asdict(chunk) for chunk in made.chunks])  # as Ray Data carries them
    assert [Chunk(**row) for row in table.to_pylist()] == made.chunks
    assert {type(value) for chunk in made.chunks for value in asdict(chunk).values()} == {int, str, bool}


def test_a_large_parquet_row_group_is_cut_and_small_ones_are_joined(tmp_path):
    table = pa.Table.from_pylist([{"prompt": f"{i:0100d}"} for i in range(5000)])
    for groups in (5000, 7):
        parquet.write_table(
            table, tmp_path / "a.parquet", row_group_size=groups, use_dictionary=False, compression="none"
        )
        made = plan([source(tmp_path / "a.parquet")], tmp_path, chunk_bytes=100_000)
        assert 4 <= len(made.chunks) <= 12
        assert [record.source for record in read(made.chunks[2])][:1] == [f"a.parquet:{made.chunks[2].start + 1}"]
        assert [value["prompt"] for value in values(made)] == [f"{i:0100d}" for i in range(5000)]


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(['{"a": 1}', "", " \t", "\r", "{", '"x"', '{"b": "é"}', "\xa0", "null"]), max_size=30
    ),
    last=st.booleans(),
    chunk_bytes=st.integers(1, 40),
)
def test_any_cut_gives_the_same_records(tmp_path_factory, parts, last, chunk_bytes):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.jsonl").write_text("\n".join(parts) + ("\n" if last else ""), encoding="utf-8", newline="")
    whole = plan([source(folder / "a.jsonl")], folder)
    cut = plan([source(folder / "a.jsonl")], folder, chunk_bytes=chunk_bytes)
    assert records(cut) == records(whole)
    assert cut.fingerprint == whole.fingerprint
    full = [i for i, part in enumerate(parts, start=1) if part.strip(" \t\r")]
    assert [record.source for record in records(cut)] == [f"a.jsonl:{i}" for i in full]
    assert cut.records == len(full)


# -------------------------------------------------------------------------------------------- broken records


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a": 1', "broken JSON: Expecting ',' delimiter"),
        (b"{'a': 1}", "broken JSON: Expecting property name enclosed in double quotes"),
        (b'{"a": 1} {"b": 2}', "broken JSON: Extra data"),
        (b'{"a": "\xff"}', "bad UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "bad UTF-8"),
        (b'{"a": "\\ud800"}', "bad Unicode: half of a surrogate pair"),
        (b'{"a": "\\uDC00"}', "bad Unicode: half of a surrogate pair"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": NaN}', "broken JSON: NaN or Infinity"),
        (b'{"a": -Infinity}', "broken JSON: NaN or Infinity"),
        (b'{"a": ' + b"[" * 100_000, "broken JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "broken JSON: number too long"),
        (b"\x00", "broken JSON: Expecting value"),
    ],
)
def test_a_broken_line_is_a_record_with_an_error(tmp_path, line, error):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n\n' + line + b'\n{"n": 3}\n')
    first, broken, last = records(plan([source(tmp_path / "a.jsonl")], tmp_path))
    assert (first.value, first.error, last.value, last.error) == ({"n": 1}, None, {"n": 3}, None)
    assert (broken.row_id, broken.source, broken.value, broken.error) == (1, "a.jsonl:3", None, error)
    assert broken.raw == line.decode("utf-8", "replace")[:EXCERPT]


def test_whole_surrogate_pairs_are_fine(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}')
    assert values(plan([source(tmp_path / "a.jsonl")], tmp_path)) == [{"a": "😀"}]


def test_broken_arrays(tmp_path):
    (tmp_path / "a.json").write_text('[{"n": 1}, 5, {"n": "\\ud800"}]')
    made = records(plan([source(tmp_path / "a.json")], tmp_path))
    assert [record.error for record in made] == [None, "not a JSON object", "bad Unicode: half of a surrogate pair"]
    assert [record.raw for record in made] == ['{"n": 1}', "5", '{"n": "\\ud800"}']
    (tmp_path / "b.json").write_text('[{"n": 1}, ')
    made = records(plan([source(tmp_path / "b.json")], tmp_path))
    assert [(record.source, record.error, record.raw) for record in made] == [
        ("b.json:1", "broken JSON: Expecting value", '[{"n": 1},')
    ]


def test_a_damaged_page_of_parquet_loses_no_row_uncounted(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"prompt": [f"{i}" * 50 for i in range(3000)]}), path, row_group_size=1000, compression="gzip"
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    found = records(plan([source(path)], tmp_path, chunk_bytes=40_000))
    assert [record.row_id for record in found] == list(range(3000))
    bad = [record for record in found if record.value is None]
    assert {record.error for record in bad} == {"unreadable parquet: the file is damaged"}
    assert [record.row_id for record in bad] == list(range(1000, 2000)), "the groups beside it are read"
    assert all(record.value["prompt"] == f"{record.row_id}" * 50 for record in found if record not in bad)


def test_bad_utf8_in_parquet_takes_one_row(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    made = records(plan([source(tmp_path / "a.parquet")], tmp_path))
    assert [(record.source, record.value, record.error) for record in made] == [
        ("a.parquet:1", {"prompt": "a"}, None),
        ("a.parquet:2", None, "bad UTF-8"),
        ("a.parquet:3", {"prompt": "c"}, None),
    ]


def test_a_file_that_changed_after_the_plan_is_noticed(tmp_path):
    path = lines(tmp_path / "a.jsonl", *ROWS)
    made = plan([source(path)], tmp_path)
    lines(path, *ROWS[:5])
    with pytest.raises(RuntimeError, match=r"5 records where 10 were planned; the file changed, run again$"):
        records(made)


# ----------------------------------------------------------------------------------------------- columns


def test_columns_are_mapped_and_missing_ones_named(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question": "q", "prompt": "other", "best": "b"}, {"best": "b"})
    good, bad = records(plan([source(path, columns={"prompt": "question", "chosen": "best"})], tmp_path))
    assert good.value == {"question": "q", "prompt": "q", "best": "b", "chosen": "b"}
    assert (bad.value, bad.error) == (None, "column 'question' (mapped to prompt) is missing")
    path = lines(tmp_path / "b.jsonl", {"chosen": "x", "rejected": "y"})
    (swapped,) = values(plan([source(path, columns={"chosen": "rejected", "rejected": "chosen"})], tmp_path))
    assert swapped == {"chosen": "y", "rejected": "x"}


# ------------------------------------------------------------------------------------- numbers, fingerprint


def test_numbers_run_on_over_files_and_plans(tmp_path):
    for name in ("b", "a", "c"):
        lines(tmp_path / f"{name}.jsonl", {"n": name}, {"n": name + name})
    train = plan([source(tmp_path / "c.jsonl"), source(tmp_path / "[ab].jsonl")], tmp_path)
    held_out = plan([source(tmp_path / "a.jsonl")], tmp_path, 2, first_record=train.records)
    assert [(r.row_id, r.value["n"]) for r in records(train)] == list(enumerate(["c", "cc", "a", "aa", "b", "bb"]))
    assert [chunk.source_index for chunk in train.chunks] == [0, 1, 1]
    assert [r.row_id for r in records(held_out)] == [6, 7]
    assert [chunk.source_index for chunk in held_out.chunks] == [2]
    assert (train.records, held_out.records) == (6, 2)


def test_the_fingerprint_is_of_contents_order_and_columns(tmp_path):
    def fingerprint(*sources, **more):
        return plan(sources, tmp_path / "work", **more).fingerprint

    a, b = lines(tmp_path / "a.jsonl", *ROWS), lines(tmp_path / "b.jsonl", *ROWS[:3])
    (tmp_path / "else").mkdir()
    moved = lines(tmp_path / "else" / "moved.jsonl", *ROWS)
    base = fingerprint(source(a), source(b))
    assert base == fingerprint(source(moved), source(b)) == fingerprint(source(a), source(b), chunk_bytes=7)
    others = [
        fingerprint(source(b), source(a)),
        fingerprint(source(a)),
        fingerprint(source(tmp_path / "[ab].jsonl")),  # one source of two files mixes in another way
        fingerprint(source(a, columns={"prompt": "chosen"}), source(b)),
    ]
    a.write_text(a.read_text().replace("p9", "p8"))
    others.append(fingerprint(source(a), source(b)))
    for rows in (ROWS, ROWS[::-1]):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        others.append(fingerprint(source(tmp_path / "a.parquet")))
    assert len({base, *others}) == 8


# ---------------------------------------------------------------------------------------- finding files


def test_folders_are_read_sorted_without_what_is_no_data(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "_tmp.jsonl", "dataset_infos.json"):
        lines(tmp_path / "data" / name, {"n": name})
    (tmp_path / "data" / "README.md").write_text("# x")
    made = plan([source(tmp_path / "data")], tmp_path)
    assert [record.source for record in records(made)] == ["a.jsonl:1", "b.jsonl:1", "deep/c.jsonl:1"]
    assert values(plan([source(tmp_path / "data" / "*" / "*.jsonl")], tmp_path)) == [{"n": "deep/c.jsonl"}]
    assert made.chunks[0].path == str(tmp_path / "data" / "a.jsonl")


def test_a_name_with_brackets_is_no_pattern_when_it_exists(tmp_path):
    path = lines(tmp_path / "a[1].jsonl", {"n": 1})
    assert values(plan([source(path)], tmp_path)) == [{"n": 1}]


def test_urls_are_opened_by_fsspec(tmp_path):
    with fsspec.open("memory://bucket/a.jsonl", "wb") as stream:
        stream.write(b'{"n": 1}\n{"n": 2}\n')
    made = plan([source("memory://bucket/*.jsonl")], tmp_path, chunk_bytes=1)
    assert [(record.source, record.value) for record in records(made)] == [
        ("a.jsonl:1", {"n": 1}),
        ("a.jsonl:2", {"n": 2}),
    ]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"path": "nothing.jsonl"}, r"^data\.sources\.0\.path: .*nothing\.jsonl does not exist; check the path$"),
        ({"path": "nothing*.jsonl"}, r"^data\.sources\.0\.path: no file matches .*; check the pattern$"),
        ({"path": "empty"}, r"^data\.sources\.0\.path: .* holds no \.jsonl or .* file; name another folder or a file$"),
        ({"path": "a.txt"}, r"^data\.sources\.0\.format: the ending of .*a\.txt says nothing; set format to jsonl or"),
        ({"path": "a.csv"}, r"^data\.sources\.0\.path: .*a\.csv is a table, .*; write jsonl or parquet with"),
        (
            {"path": "a.parquet"},
            r"^data\.sources\.0\.path: .*a\.parquet is not a readable parquet file \(.*\); replace",
        ),
        (
            {"path": "a.jsonl.gz"},
            r"^data\.sources\.0\.path: .*a\.jsonl\.gz is not a readable jsonl file \(.*\); replace",
        ),
        (
            {"path": "a.txt", "format": "huggingface"},
            r"^data\.sources\.0\.format: .*a\.txt is a file, not what datasets",
        ),
        (
            {"path": "saved", "split": "test"},
            r"^data\.sources\.0\.split: no split test in .*; choose one of train, other$",
        ),
        (
            {"path": "flat", "split": "test"},
            r"^data\.sources\.0\.split: .*flat holds one data set, no split test; remove",
        ),
    ],
)
def test_what_cannot_be_found_is_named_with_its_remedy(tmp_path, what, message):
    from datasets import Dataset, DatasetDict

    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.csv", "a.parquet"):
        (tmp_path / name).write_text('{"n": 1}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n' * 100)[:30])
    if what["path"] in ("saved", "flat"):
        data = Dataset.from_list(ROWS)
        (DatasetDict(train=data, other=data) if what["path"] == "saved" else data).save_to_disk(tmp_path / what["path"])
    with pytest.raises(ConfigError, match=message) as caught:
        plan([Source(**what | {"path": str(tmp_path / what["path"])})], tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_a_key_of_its_own_and_a_forced_format(tmp_path):
    (tmp_path / "a.txt").write_text('{"n": 1}\n')
    assert values(plan([source(tmp_path / "a.txt", format="jsonl")], tmp_path)) == [{"n": 1}]
    with pytest.raises(ConfigError, match=r"^data\.eval_sources\.0\.path: "):
        plan([source(tmp_path / "no.jsonl")], tmp_path, key="data.eval_sources")


# ---------------------------------------------------------------------------------------------- datasets


def test_folders_that_datasets_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:2]))
    splits.save_to_disk(tmp_path / "saved")
    work = tmp_path / "work"
    made = plan([source(tmp_path / "saved", split="test"), source(tmp_path / "saved")], work)
    assert values(made) == ROWS[:2] + ROWS
    assert [record.source for record in records(made)][:3] == ["saved[test]:1", "saved[test]:2", "saved[train]:1"]
    copies = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(copies) == 2
    assert plan([source(tmp_path / "saved")], work).records == 10
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == copies  # not written again
    splits["train"].select([3, 1]).save_to_disk(tmp_path / "flat")
    assert values(plan([source(tmp_path / "flat")], work)) == [ROWS[3], ROWS[1]]
    Dataset.from_list(ROWS[4:6]).save_to_disk(tmp_path / "other")
    arrow = "data-00000-of-00001.arrow"
    (tmp_path / "flat" / arrow).write_bytes((tmp_path / "other" / arrow).read_bytes())  # the description stays
    assert values(plan([source(tmp_path / "flat")], work)) == ROWS[4:6]


def test_names_are_loaded_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    lines(tmp_path / "set" / "train.jsonl", *ROWS)
    lines(tmp_path / "set" / "test.jsonl", *ROWS[:2])
    folder = source(tmp_path / "set", format="huggingface", split="test")
    assert values(plan([folder], tmp_path / "work")) == ROWS[:2]
    for change, message in (
        ({"split": "dev"}, r"\.split: .*dev.*; choose"),
        ({"subset": "x"}, r"\.subset: .*x.*; choose"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan([folder.model_copy(update=change)], tmp_path / "work")


def test_a_name_that_nothing_has_is_refused(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"^data\.sources\.0\.path: nobody/nothing is neither a path here nor a data set"
    ):
        plan([Source(path="nobody/nothing")], tmp_path / "work")


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_a_limit_reads_the_first_records_of_each_source(tmp_path: Path, ending: str) -> None:
    wanted = [{"prompt": f"{i}", "chosen": "a" * 50, "rejected": "b"} for i in range(40)]
    files = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{ending}"
        text = "\n".join(map(json.dumps, wanted)) + "\n"
        if ending == "jsonl":
            path.write_text(text)
        elif ending == "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        elif ending == "json":
            path.write_text(json.dumps(wanted))
        else:
            parquet.write_table(pa.Table.from_pylist(wanted), path)
        files.append(path)
    one, two = (Source(path=str(path)) for path in files)
    for chunk_bytes in (300, 1 << 20):
        for limit in (1, 3, 4, 39):
            found = values(plan([one, two], tmp_path, chunk_bytes=chunk_bytes, limit=limit))
            assert found == wanted[:limit] * 2
        own = plan([one.model_copy(update={"limit": 7}), two], tmp_path, chunk_bytes=chunk_bytes, limit=2)
        assert values(own) == wanted[:7] + wanted[:2]
        assert own.records == 9
        whole = plan([one, two], tmp_path, chunk_bytes=chunk_bytes)
        assert plan([one, two], tmp_path, chunk_bytes=chunk_bytes, limit=40).fingerprint == whole.fingerprint
        limited = {plan([one], tmp_path, chunk_bytes=chunk_bytes, limit=limit).fingerprint for limit in (1, 2, 5, None)}
        assert len(limited) == 4


def test_a_limit_holds_for_a_run(make_config, tmp_path: Path) -> None:
    config = make_config("data.limit=5")
    rows = Rows(prepare(config, config.model.path, local=True))
    assert len(rows) == 5
