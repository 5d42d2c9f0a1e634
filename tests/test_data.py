"""prepare: what goes in comes out, bad records are quarantined and counted, caches are found only by what they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import data, reference
from pipeline.collate import collate
from pipeline.data import DataError
from pipeline.model import load_policy
from pipeline.rows import MANIFEST, Rows, StaleCache


def prepare(config) -> Path:
    return data.prepare(config, config.model.path, local=True)


def test_rows_are_the_records_in_order(make_config, pairs_file: Path) -> None:
    folder = prepare(make_config())
    rows = Rows(folder)
    records = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert len(rows) == len(records) == 24
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    for i, record in enumerate(records):
        assert tokenizer.decode(rows[i].prompt_ids) == record["prompt"]
        texts = [tokenizer.decode(ids) for ids in rows[i].response_ids]
        assert texts == [record["chosen"] + "<|im_end|>", record["rejected"] + "<|im_end|>"]
        assert rows.source(i) == f"pairs.jsonl:{i + 1}"


def test_bad_records_are_quarantined_and_all_good_ones_kept(make_config, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    good = [json.dumps({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"}) for i in range(20)]
    bad = [
        b'{"prompt": "x", "chosen": "a"',
        b'{"prompt": "x", "chosen": "a", "rejected": "a"}',
        b'{"prompt": "\xff"}',
        b"[1]",
    ]
    path.write_bytes(b"\n".join([*(g.encode() for g in good), *bad]) + b"\n")
    config = make_config(f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=0.2")
    folder = prepare(config)
    found = data.summary(folder)
    assert (found.records, found.rows, found.quarantined) == (24, 20, 4)
    entries = [json.loads(line) for line in (folder / data.QUARANTINE).read_text().splitlines()]
    assert [entry["source"] for entry in entries] == [f"mixed.jsonl:{n}" for n in (21, 22, 23, 24)]
    assert sum(found.reasons.values()) == 4
    assert all(entry["reason"] for entry in entries)

    with pytest.raises(DataError, match=r"data\.max_bad_fraction: 4 of 24 records \(16\.7%\)"):
        prepare(make_config(f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=0.1"))


def test_nothing_usable_is_an_error_that_says_why(make_config, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="no usable record among 1"):
        prepare(make_config(f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=1.0"))


def test_chunks_do_not_change_rows(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rows(prepare(make_config()))
    monkeypatch.setattr(data, "CHUNK_BYTES", 300)
    config = make_config("storage=" + make_config().storage + "-chunked")
    folder = prepare(config)
    assert len(list(folder.glob("part-*.arrow"))) > 3
    assert [Rows(folder)[i] for i in range(24)] == [whole[i] for i in range(24)]


def test_an_interrupted_prepare_is_refused_then_continued(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 300)
    folder = prepare(make_config())
    kept = folder / "part-000000.arrow"
    before = kept.stat().st_mtime_ns
    (folder / MANIFEST).unlink()
    (folder / "counts-000001.json").unlink()
    (folder / "part-000001.arrow").unlink()
    with pytest.raises(StaleCache):
        Rows(folder)
    assert prepare(make_config()) == folder
    assert len(Rows(folder)) == 24
    assert kept.stat().st_mtime_ns == before  # finished parts were not made again


@pytest.mark.parametrize("damage", ["deleted", "cut off", "flipped"])
def test_a_damaged_part_is_made_again(make_config, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 300)
    config = make_config()
    folder = prepare(config)
    scored = reference.score(config, folder, config.model.path, local=True)
    expected = [Rows(folder, scored)[i] for i in range(24)]
    for part in (folder / "part-000001.arrow", scored / "part-000001.arrow"):
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.unlink()
        if damage != "deleted":
            part.write_bytes(bytes(content[: -9 if damage == "cut off" else None]))
    assert prepare(config) == folder
    assert reference.score(config, folder, config.model.path, local=True) == scored
    assert [Rows(folder, scored)[i] for i in range(24)] == expected


@pytest.mark.parametrize("change", ["data.max_length=64", "data.append_eos=false", "data.max_prompt_length=9"])
def test_whatever_shapes_rows_changes_the_cache(make_config, change: str) -> None:
    assert prepare(make_config()) != prepare(make_config(change))


@pytest.mark.parametrize("change", ["data.max_bad_fraction=0.5", "data.eval_fraction=0.2", "optimizer.lr=1", "seed=3"])
def test_what_does_not_shape_rows_reuses_the_cache(make_config, change: str) -> None:
    assert prepare(make_config()) == prepare(make_config(change))


def test_a_changed_file_is_never_served_from_the_cache(make_config, tmp_path: Path, pairs_file: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(pairs_file.read_text())
    config = make_config(f"data.sources=[{{path: {path}}}]")
    first = prepare(config)
    path.write_text(pairs_file.read_text().replace("good", "fine"))
    assert prepare(config) != first


def test_reference_log_probs_are_the_models_own(make_config) -> None:
    config = make_config()
    rows = prepare(config)
    folder = reference.score(config, rows, config.model.path, local=True)
    policy = load_policy(config.model, config.model.path)
    joined = Rows(rows, folder)
    for i in range(len(joined)):
        batch = collate([joined[i]])
        with torch.no_grad():
            torch.testing.assert_close(policy(batch).logprobs, batch.ref_logprobs, atol=2e-5, rtol=1e-5)


def test_other_weights_or_rows_get_another_reference(make_config, tmp_path: Path) -> None:
    from tests.conftest import save_tiny_llama

    config = make_config()
    rows = prepare(config)
    one = reference.score(config, rows, config.model.path, local=True)
    other = save_tiny_llama(tmp_path / "other", seed=1)
    two = reference.score(config, rows, str(other), local=True)
    assert one != two
    assert Rows(rows, one)[0].ref_logprobs != Rows(rows, two)[0].ref_logprobs
    assert reference.score(config, rows, config.model.path, local=True) == one


@pytest.mark.ray
def test_ray_data_and_this_process_write_the_same_rows(
    make_config, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 300)
    config = make_config()
    here = prepare(config)
    ref_here = reference.score(config, here, config.model.path, local=True)
    elsewhere = make_config("storage=" + config.storage + "-ray")
    there = data.prepare(elsewhere, config.model.path)
    ref_there = reference.score(elsewhere, there, config.model.path)
    assert (here.name, ref_here.name) == (there.name, ref_there.name)
    a, b = Rows(here, ref_here), Rows(there, ref_there)
    assert [a[i] for i in range(24)] == [b[i] for i in range(24)]
