"""Prepared folders: written once, joined by row id, refused when anything is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import ConfigError, DataConfig
from pipeline.contracts import REFERENCE_SCHEMA, ROW_SCHEMA
from pipeline.order import MicroBatch
from pipeline.rows import Rows, StaleCache, finish, is_finished, write_part


def row(row_id: int, source: int = 0, prompt: int | None = None) -> dict:
    responses = [list(range(row_id % 3 + 1)), [9]]
    return {
        "row_id": row_id,
        "source": f"f:{row_id}",
        "source_index": source,
        "prompt_hash": prompt if prompt is not None else row_id * 7919 % 1000,
        "prompt_ids": [1] * (row_id % 4 + 1),
        "response_ids": responses,
        "weight": 1.0,
        "mismatched": False,
    }


def write(folder: Path, *parts: list[dict]) -> Path:
    folder.mkdir()
    for i, rows in enumerate(parts):
        write_part(folder, i, pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
    finish(folder, range(len(parts)), {})
    return folder


def reference(folder: Path, ids: list[int]) -> Path:
    folder.mkdir()
    table = [{"row_id": i, "ref_logprobs": [[-float(i)] * (i % 3 + 1), [-0.5]]} for i in ids]
    write_part(folder, 0, pa.Table.from_pylist(table, schema=REFERENCE_SCHEMA))
    finish(folder, range(1), {})
    return folder


def data(**changes) -> DataConfig:
    return DataConfig(kind="preference", **({"sources": [{"path": "x"}]} | changes))


def test_rows_come_back_in_row_order_with_their_own_reference(tmp_path: Path) -> None:
    rows = Rows(
        write(tmp_path / "rows", [row(5), row(3)], [row(4), row(0)]), reference(tmp_path / "ref", [4, 0, 9, 5, 3])
    )
    assert [rows[i].row_id for i in range(len(rows))] == [0, 3, 4, 5]
    for i in range(len(rows)):
        found, expected = rows[i], row(rows[i].row_id)
        assert found.prompt_ids == expected["prompt_ids"]
        assert found.response_ids == expected["response_ids"]
        assert found.ref_logprobs == [[-float(found.row_id)] * len(found.response_ids[0]), [-0.5]]
        assert rows.lengths[i] == found.tokens
        assert rows.source(i) == f"f:{found.row_id}"
    expected = [sum(map(len, rows[i].response_ids)) for i in (3, 0)]
    assert rows.trained_tokens(np.array([3, 0])).tolist() == expected


def test_a_filler_has_no_weight(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "rows", [row(0), row(1)]))
    assert [r.weight for r in rows.take(MicroBatch((0, 1)))] == [1.0, 1.0]
    assert [r.weight for r in rows.take(MicroBatch((1,), filler=True))] == [0.0]


def test_rewards_turns_and_behaviour_come_back_and_fillers_keep_them(tmp_path: Path) -> None:
    rewarded = row(1) | {
        "trained": [[True, False], [True]],
        "token_rewards": [[0.25, 0.0], [-1.0]],
        "behaviour_logprobs": [-2.5, None],
        "mismatched": True,
    }
    rows = Rows(write(tmp_path / "rows", [row(0), rewarded]))
    plain, found = rows.take(MicroBatch((0, 1)))
    assert (plain.trained, plain.token_rewards, plain.behaviour_logprobs, plain.mismatched) == (None, None, None, False)
    assert (found.trained, found.token_rewards) == ([[True, False], [True]], [[0.25, 0.0], [-1.0]])
    assert (found.behaviour_logprobs, found.mismatched) == ([-2.5, None], True)
    assert rows.take(MicroBatch((1,), filler=True)) == [replace(found, weight=0.0)]


def test_a_missing_reference_row_is_refused_by_number(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", [row(0), row(1), row(2)])
    rows = Rows(folder, reference(tmp_path / "ref", [0, 2]))
    assert rows.unscored(np.arange(3)).tolist() == [1]
    assert rows[2].ref_logprobs is not None
    with pytest.raises(StaleCache, match="row 1 is not in it"):
        rows.take(MicroBatch((0, 1)))


def test_unfinished_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", [row(0)], [row(1)])
    part = folder / "part-000001.arrow"
    part.write_bytes(part.read_bytes()[:-8])
    assert not is_finished(folder)
    with pytest.raises(StaleCache, match=r"part-000001\.arrow"):
        Rows(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(StaleCache, match="not finished"):
        Rows(folder)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", [row(0), row(1)])
    assert is_finished(folder)
    part = folder / "part-000000.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    assert not is_finished(folder)


def test_a_source_whose_rows_all_weigh_nothing_is_named(tmp_path: Path) -> None:
    rows = [row(i, source=i % 3) | {"weight": float(i % 3 == 1 and i > 1)} for i in range(9)]
    config = data(sources=[{"path": "a"}, {"path": "b"}], eval_sources=[{"path": "c"}])
    prepared = Rows(write(tmp_path / "rows", rows))
    warnings = prepared.weightless(config, prepared.split(config, seed=0))
    assert [warning.partition(",")[0] for warning in warnings] == [
        "data.sources.0: all rows of a have weight 0",
        "data.eval_sources.0: all rows of c have weight 0",
    ]


def test_a_share_that_uses_no_row_is_refused(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "rows", [row(i, source=int(i >= 30)) for i in range(50)]))
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.share"):
        rows.split(data(sources=[{"path": "x", "share": 1000}, {"path": "y", "share": 0.1}]), seed=0)


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "rows", [row(i, prompt=i // 2 * 31 % 97) for i in range(60)]))
    split = rows.split(data(eval_fraction=0.2), seed=0)
    assert len(split.eval) == 12  # 6 of 30 prompts, 2 rows each
    assert not set(rows.prompt_hash[split.train]) & set(rows.prompt_hash[split.eval])
    assert sorted([*split.train, *split.eval]) == list(range(60))


def test_eval_sources_are_held_out_whole(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "rows", [row(i, source=i % 2) for i in range(10)]))
    split = rows.split(data(eval_sources=[{"path": "y"}]), seed=0)
    assert set(rows.source_index[split.eval]) == {1}
    assert set(rows.source_index[split.train]) == {0}
    assert len(split.train) == len(split.eval) == 5


def test_held_out_rows_whose_prompt_is_trained_on_are_counted(tmp_path: Path) -> None:
    held = [row(10 + i, source=1, prompt=prompt) for i, prompt in enumerate([3, 3, 50, 60])]
    rows = Rows(write(tmp_path / "rows", [*(row(i, prompt=i) for i in range(10)), *held]))
    assert rows.also_trained(rows.split(data(eval_sources=[{"path": "y"}]), seed=0)) == 2
    assert rows.also_trained(rows.split(data(sources=[{"path": "x"}, {"path": "y"}], eval_fraction=0.3), seed=0)) == 0


def test_shares_set_the_mix_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "rows", [row(i, source=int(i >= 30)) for i in range(50)]))  # 30 + 20 rows
    config = data(sources=[{"path": "x", "share": 1}, {"path": "y", "share": 3}])
    split = rows.split(config, seed=0)
    counts = np.bincount(rows.source_index[split.train])
    assert counts.tolist() == [6, 20]  # all of y, and a third as many of x (rounded down)
    assert split.left_out == 24
    assert split.train.tolist() == rows.split(config, seed=0).train.tolist()
    assert split.train.tolist() != rows.split(config, seed=1).train.tolist()


def test_the_environments_tokens_are_not_counted_as_trained(tmp_path: Path) -> None:
    masked = row(1) | {"response_ids": [[5, 6, 7], [8]], "trained": [[True, False, True], [False]]}
    rows = Rows(write(tmp_path / "rows", [masked, row(2)]))
    assert rows.trained_tokens([1, 0]).tolist() == [sum(map(len, rows[1].response_ids)), 2]
