"""prepare: what goes in comes out, bad records are quarantined and counted, caches are found only by what they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import data, reference
from pipeline.collate import collate
from pipeline.contracts import Needs
from pipeline.data import DataError
from pipeline.model import load_policy
from pipeline.objectives.dpo import Dpo
from pipeline.records import RECORDS
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


TRAJECTORIES = [
    {"prompt": "a", "trajectories": [{"steps": ["no"], "reward": 0}, {"steps": ["ye", "s"], "step_rewards": [1, 2]}]},
    {
        "prompt": "b",
        "steps": ["x", {"text": "tool", "role": "environment"}, "y"],
        "step_logprobs": [-1, 0, -2],
        "reward": 3,
    },
    {"prompt": "c", "trajectories": [{"response": "z", "reward": 1}] * 2},
    {"prompt": "d", "steps": []},
    {
        "prompt": "e",
        "trajectories": [{"steps": [{"text": "x", "logprob": -1}], "reward": 2}, {"response": "y", "reward": 1}],
    },
]


def write_records(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"data.sources=[{{path: {path}}}]"


@pytest.fixture
def make_rewarded(make_config, tmp_path: Path):
    """make_rewarded(records, kind, …) → a configuration of an objective that takes any kind."""

    def make(records: list[dict], kind: str, *more: str):
        objective = "objective={name: tests.test_data:Anything}"
        path = write_records(tmp_path / f"{kind}.jsonl", records)
        return make_config(objective, f"data.kind={kind}", path, "data.max_bad_fraction=0.5", *more)

    return make


def test_trajectories_become_rows_with_their_rewards_and_authors(make_rewarded) -> None:
    folder = prepare(make_rewarded(TRAJECTORIES, "trajectory"))
    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    first, second, third = (Rows(folder)[i] for i in range(3))
    assert [tokenizer.decode(ids) for ids in first.response_ids] == ["yes<|im_end|>", "no<|im_end|>"]
    assert first.token_rewards == [[0, 1, 2, 0], [0, 0, 0]]
    assert (first.trained, first.behaviour_logprobs, first.mismatched) == (None, None, False)
    assert tokenizer.decode(second.response_ids[0]) == "xtooly<|im_end|>"
    assert second.trained == [[True] + [False] * 4 + [True] * 2]
    assert second.token_rewards == [[0, 0, 0, 0, 0, 0, 3]]
    assert second.behaviour_logprobs == [-3.0]
    assert third.response_ids[0] == third.response_ids[1]  # samples, not a comparison
    found = data.summary(folder)
    assert found.reasons == {"no steps": 1}
    assert (found.responses, found.repeated, found.environment_tokens, found.behaviour) == (7, 1, 4, 1)
    assert found.mean_return == pytest.approx((3 + 0 + 3 + 1 + 1 + 2 + 1) / 7)


def test_the_reference_scores_environment_turns_as_context(make_rewarded) -> None:
    config = make_rewarded(TRAJECTORIES, "trajectory")
    rows = prepare(config)
    joined = Rows(rows, reference.score(config, rows, config.model.path, local=True))
    policy = load_policy(config.model, config.model.path)
    row = joined[1]
    with torch.no_grad():
        logits = policy.lm(torch.tensor([row.prompt_ids + row.response_ids[0]])).logits[0].log_softmax(-1)
    start = len(row.prompt_ids) - 1
    whole = [float(logits[start + t, token]) for t, token in enumerate(row.response_ids[0])]
    expected = [value if own else 0.0 for value, own in zip(whole, row.trained[0], strict=True)]
    assert row.ref_logprobs[0] == pytest.approx(expected, abs=2e-5)


class Anything(Dpo):
    """DPO that does not mind which kind of record it gets: these tests do not train."""

    needs: ClassVar[Needs] = Needs(records=frozenset(RECORDS))
    match: bool = False

    def needed(self) -> Needs:
        return Needs(records=self.needs.records, mismatched=self.match)


UNPAIRED = [
    {"prompt": prompt, "response": response, "label": label}
    for prompt, response, label in (("a", "one", True), ("a", "two", False), ("bb", "three", True), ("abc", "x", True))
]


def test_unpaired_rows_and_their_mismatched_partners(make_rewarded) -> None:
    from tests.conftest import tiny_tokenizer

    plain = make_rewarded(UNPAIRED, "unpaired", "data.max_length=6")
    config = make_rewarded(UNPAIRED, "unpaired", "data.max_length=6", "objective.match=true")
    assert prepare(plain) != prepare(config)
    rows = Rows(prepare(plain))
    assert [rows[i].token_rewards[0][-1] for i in range(4)] == [1, -1, 1, 1]
    assert data.summary(prepare(plain)).mismatched == 0
    folder = prepare(config)
    rows = Rows(folder)
    texts = [[tiny_tokenizer().decode(ids) for ids in rows[i].response_ids] for i in range(4)]
    # Prompts a, a, bb, abc: the next row of another prompt, in a circle; cut to what fits behind the own prompt.
    assert texts == [
        ["one<|im_end|>", "thre"],
        ["two<|im_end|>", "thre"],
        ["thre", "x<|im_end|>"],
        ["x<|im_end|>", "one"],
    ]
    assert all(rows[i].mismatched for i in range(4))
    assert [[sum(rewards) for rewards in rows[i].token_rewards] for i in range(4)] == [[1, 0], [-1, 0], [1, 0], [1, 0]]
    found = data.summary(folder)
    assert (found.mismatched, found.responses, found.mean_return) == (4, 4, 0.5)
    assert found.tokens == sum(rows[i].tokens for i in range(4))
    batch = collate([rows[i] for i in range(4)])
    assert batch.valid.tolist() == [[True, False]] * 4
    assert batch.response_mask[:, 1].any(-1).all()


@given(st.lists(st.integers(0, 2), max_size=7))
def test_partners_are_the_next_of_another_prompt(prompts: list[int]) -> None:
    rows = [
        {
            "prompt_hash": prompt,
            "prompt_ids": [0],
            "response_ids": [[i]],
            "trained": None,
            "token_rewards": None,
            "behaviour_logprobs": None,
            "mismatched": False,
            "step_ends": None,
        }
        for i, prompt in enumerate(prompts)
    ]
    count = data.mismatch(rows, 9)
    for i, row in enumerate(rows):
        others = [j % len(rows) for j in range(i + 1, i + len(rows)) if prompts[j % len(rows)] != prompts[i]]
        assert row["response_ids"] == [[i], *([[others[0]]] if others else [])]
        assert row["mismatched"] == bool(others)
    assert count == sum(row["mismatched"] for row in rows)


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
