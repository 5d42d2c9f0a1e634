"""Checkpoints on disk: whole or skipped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.checkpoint import Corrupt
from pipeline.durable import digest_file
from pipeline.fencing import Attempt

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.5)}


def save(attempt: Attempt, step: int, weights: dict[str, torch.Tensor] = WEIGHTS) -> Path:
    """A committed checkpoint in two files."""
    folder = attempt.temporary(step)
    for number, name in enumerate(sorted(weights), 1):
        checkpoint.write_tensors(
            folder / f"weights-{number:05d}-of-{len(weights):05d}.safetensors", {name: weights[name]}
        )
    checkpoint.finish(folder, {"step": step, "best": None})
    return attempt.commit(folder, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


# -------------------------------------------------------------------------------------------------- content


def test_round_trip(run: Path) -> None:
    folder = save(Attempt.begin(run), 20)
    assert folder == run / "checkpoints" / "step-00000020" == checkpoint.latest(run) == checkpoint.path_of(run, 20)
    assert checkpoint.read_state(folder) == {"step": 20, "best": None}
    assert {name: t.tolist() for name, t in checkpoint.read_weights(folder)} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": 0.5,
    }
    assert list(checkpoint.read_tensors(folder, "moments")) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "state.json",
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
    ]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000020"]


def test_load_into_demands_the_same_parameters(run: Path) -> None:
    folder = save(Attempt.begin(run), 1)
    mine = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    checkpoint.load_into(mine, folder)
    assert torch.equal(mine["a"], WEIGHTS["a"])
    assert mine["b"] == 0.5
    with pytest.raises(ValueError, match=r"lacks c; it is of another model"):
        checkpoint.load_into(mine | {"c": torch.zeros(1)}, folder)
    with pytest.raises(ValueError, match=r"has a \[2, 3\], this model does not"):
        checkpoint.load_into(mine | {"a": torch.zeros(3, 2)}, folder)
    with pytest.raises(ValueError, match=r"has b \[\], this model does not"):
        checkpoint.load_into({"a": torch.zeros(2, 3)}, folder)


def test_digest_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # xxhsum -H128
    assert digest_file(tmp_path / "abc") == "06b05ab6733a618578af5f94892f3950"


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000), max_size=20), parts=st.integers(1, 5)
)
def test_deal_is_complete_and_balanced(sizes: dict[str, int], parts: int) -> None:
    dealt = checkpoint.deal(sizes, parts)
    assert len(dealt) == parts
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in dealt]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert dealt == checkpoint.deal(dict(reversed(sizes.items())), parts), "every rank has to deal alike"


# --------------------------------------------------------------------------------------------------- damage


def truncate(folder: Path) -> str:
    path = folder / "weights-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return r"weights-00002-of-00002\.safetensors: \d+ bytes instead of \d+"


def flip_a_bit(folder: Path) -> str:
    path = folder / "weights-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return r"weights-00001-of-00002\.safetensors: its checksum differs"


def lose_a_file(folder: Path) -> str:
    (folder / "state.json").unlink()
    return r"state\.json: missing"


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return r"manifest\.json: missing"


def cut_the_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 40)
    return r"manifest\.json: damaged"


def empty_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": {}}')
    return r"manifest\.json: damaged"


def point_outside(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../attempt"] = {"size": 2, "xxh3": digest_file(folder / "../../attempt")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return r"attempt: missing"


DAMAGES = [truncate, flip_a_bit, lose_a_file, lose_the_manifest, cut_the_manifest, empty_the_manifest, point_outside]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_skipped(
    damage: Callable[[Path], str], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = Attempt.begin(run)
    before, newest = save(attempt, 10), save(attempt, 20)
    reason = damage(newest)
    with pytest.raises(Corrupt, match=reason):
        checkpoint.verify(newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(run) == before
    assert len(caplog.records) == 1
    caplog.clear()
    damage(before)
    assert checkpoint.latest(run) is None
    assert len(caplog.records) == 2


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.mktemp("run")
    folder = save(Attempt.begin(run), 1)
    path = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.name != "manifest.json")))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert checkpoint.latest(run) is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_trained_again(run: Path) -> None:
    attempt = Attempt.begin(run)
    truncate(save(attempt, 10))
    folder = save(attempt, 10, {"a": torch.ones(1)})
    assert checkpoint.latest(run) == folder
    assert [name for name, _ in checkpoint.read_weights(folder)] == ["a"]


def test_a_file_that_is_not_what_its_writer_sealed(run: Path) -> None:
    attempt = Attempt.begin(run)
    folder = attempt.temporary(3)
    checkpoint.write_tensors(folder / "weights-00001-of-00001.safetensors", WEIGHTS)
    os.truncate(folder / "weights-00001-of-00001.safetensors", 9)
    with pytest.raises(Corrupt, match=r"its writer sealed another size"):
        checkpoint.finish(folder, {"step": 3})
    assert checkpoint.latest(run) is None


# ------------------------------------------------------------------------------------------------ retention


def test_prune_keeps_the_newest_and_the_best(run: Path) -> None:
    attempt = Attempt.begin(run)
    for step in (1, 2, 3, 100_000_000, 20_000_000):
        save(attempt, step)
    checkpoint.prune(run, 2, checkpoint.path_of(run, 2))
    assert [path.name for path in checkpoint.saved(run)] == ["step-00000002", "step-20000000", "step-100000000"]
    checkpoint.prune(run, 2, checkpoint.path_of(run, 20_000_000))
    assert [path.name for path in checkpoint.saved(run)] == ["step-20000000", "step-100000000"]
    checkpoint.prune(run, 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-100000000"]
    assert load_file(checkpoint.saved(run)[0] / "weights-00001-of-00002.safetensors")["a"].shape == (2, 3)


@pytest.mark.parametrize("failing", range(4))
def test_finishing_again_after_the_storage_failed_gives_a_checkpoint_that_can_be_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each flush of the state and the manifest, of the file and of its folder, fails once."""
    folder, calls = run / "finishing", []
    folder.mkdir(parents=True)
    checkpoint.write_tensors(folder / "weights-00001-of-00001.safetensors", WEIGHTS)

    def fails_once(path: Path) -> None:
        calls.append(path)
        if len(calls) == failing + 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.durable.flush", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.finish(folder, {"step": 1})
    checkpoint.finish(folder, {"step": 1})
    checkpoint.verify(folder)
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == [
        "state.json",
        "weights-00001-of-00001.safetensors",
    ]
