"""The reference's hidden states: what is kept of them, and when keeping them is worth it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from pipeline import data, reference, reference_cost
from pipeline.collate import collate
from pipeline.model import load_policy
from pipeline.reference_cost import Cost, keeps_states
from pipeline.rows import Rows
from pipeline.trunk import token_states

TURNS = [
    {
        "prompt": "a b",
        "steps": [{"text": "think"}, {"text": " seen", "role": "environment"}, {"text": " so"}],
        "reward": 1,
    },
    {"prompt": "c", "steps": [{"text": "no"}], "reward": 0},
]


def kept(config) -> tuple[Path, Path, Path]:
    """Rows, log-probs and states of a tiny data set."""
    rows = data.prepare(config, config.model.path, local=True)
    scoring = reference.Scoring(config, rows, config.model.path, local=True, states=True)
    scoring.run(scoring.pieces.of_the_run)
    return rows, scoring.folder, scoring.states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_states_are_those_behind_its_trained_tokens(make_config, tmp_path: Path, dtype: str) -> None:
    (tmp_path / "turns.jsonl").write_text("\n".join(map(json.dumps, TURNS)))
    source = f"data.sources=[{{path: {tmp_path / 'turns.jsonl'}}}]"
    config = make_config("data.kind=trajectory", "objective={name: dro}", source, f"model.dtype={dtype}")
    rows = Rows(*kept(config))
    lm = load_policy(config.model, config.model.path).eval().lm
    assert len(rows) == 2
    for position in range(2):
        batch = collate([rows[position]])
        assert batch.ref_states.dtype == lm.dtype
        assert len(batch.ref_states) == batch.response_mask.sum()
        with torch.no_grad():
            own = token_states(lm, batch, "separate")
        torch.testing.assert_close(batch.ref_states, own, atol=2e-5 if dtype == "float32" else 0.1, rtol=1e-2)
    masked = collate([rows[0]]).response_mask
    assert 0 < masked.sum() < len(rows[0].response_ids[0]), "the environment's tokens have no states"
    both = collate([rows[0], rows[1]])
    assert torch.equal(both.ref_states, torch.cat([rows[0].ref_states, rows[1].ref_states]))


def test_damaged_states_are_made_again_and_log_probs_left_alone(make_config) -> None:
    config = make_config()
    rows, logprobs, states = kept(config)
    expected = [row.ref_states for row in map(Rows(rows, logprobs, states).__getitem__, range(24))]
    part, before = states / "part-000000.arrow", (logprobs / "part-000000.arrow").stat().st_mtime_ns
    part.write_bytes(part.read_bytes()[:-9])
    assert kept(config) == (rows, logprobs, states)
    assert (logprobs / "part-000000.arrow").stat().st_mtime_ns == before
    for position, row in enumerate(expected):
        torch.testing.assert_close(Rows(rows, logprobs, states)[position].ref_states, row)


@pytest.mark.parametrize(
    ("cost", "epochs", "cheaper"),
    [
        (Cost(live=1.0, write=0.5, read=0.1, bytes=1), 1, True),
        (Cost(live=1.0, write=0.95, read=0.1, bytes=1), 1, False),  # written for nothing
        (Cost(live=1.0, write=0.95, read=0.1, bytes=1), 2, True),
        (Cost(live=0.1, write=0.0, read=0.2, bytes=1), 9, False),  # a slow disk
    ],
)
def test_the_cheaper_way_depends_on_the_passes(cost: Cost, epochs: int, cheaper: bool) -> None:
    assert cost.cached_is_cheaper(epochs) is cheaper


def test_auto_measures_once_and_then_decides_by_cost_and_disk(make_config, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("objective={name: tdpo}")
    rows = data.prepare(config, config.model.path, local=True)
    folder = reference.cache_of(config, rows, config.model.path, "states")
    note = folder.with_suffix(".json")
    with caplog.at_level(logging.INFO):
        keeps_states(config, rows, config.model.path, local=True)
    found = json.loads(note.read_text())
    assert min(found.values()) > 0
    # 32 float32 numbers behind each response token, none behind the prompt's: between the two.
    assert 0.2 * 128 < found["bytes"] < 2 * 128
    assert "reference states:" in caplog.text

    def decide(**changes: float) -> bool:
        note.write_text(json.dumps(found | asdict(Cost(live=1, write=0, read=0.1, bytes=1)) | changes))
        return keeps_states(config, rows, config.model.path, local=True)

    assert decide()
    assert not decide(read=2)
    assert not decide(bytes=1e15)
    folder.mkdir()  # it was begun: its place is taken already
    assert decide(bytes=1e15)
    for choice, expected in (("live", False), ("cached", True)):
        asked = make_config("objective={name: tdpo}", f"model.reference_states={choice}")
        assert keeps_states(asked, rows, config.model.path, local=True) == expected


def test_the_sample_leaves_nothing_behind(make_config) -> None:
    config = make_config("objective={name: tdpo}")
    rows = data.prepare(config, config.model.path, local=True)
    keeps_states(config, rows, config.model.path, local=True)
    assert not list((Path(config.storage) / "cache").glob(".states-*"))
    assert reference_cost.SAMPLE_TOKENS >= 1
