"""Checkpoints on disk: whole or skipped, committed by the newest attempt of a living driver only."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.checkpoint import Attempt, Corrupt, Lease, Superseded
from pipeline.durable import digest_file

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.5)}
SOON = 0.3  # seconds that a lease lasts in these tests


def save(attempt: Attempt, step: int, weights: dict[str, torch.Tensor] = WEIGHTS) -> Path:
    """A committed checkpoint in two files."""
    folder = attempt.temporary(step)
    for number, name in enumerate(sorted(weights), 1):
        checkpoint.write_tensors(
            folder / f"weights-{number:05d}-of-{len(weights):05d}.safetensors", {name: weights[name]}
        )
    return checkpoint.finish(folder, {"step": step, "best": None}, attempt)


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
    return r"manifest\.json: unreadable"


def empty_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": {}}')
    return r"manifest\.json: unreadable"


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
        checkpoint.finish(folder, {"step": 3}, attempt)
    assert checkpoint.latest(run) is None


# -------------------------------------------------------------------------------------------------- fencing


def test_only_the_newest_attempt_commits(run: Path) -> None:
    assert checkpoint.next_attempt(run) == 1
    old = Attempt.begin(run)
    first = save(old, 10)
    half_written = old.temporary(20)
    checkpoint.write_tensors(half_written / "weights-00001-of-00001.safetensors", WEIGHTS)
    new = Attempt.begin(run)
    assert (old.number, new.number, checkpoint.next_attempt(run)) == (1, 2, 3)
    assert not half_written.exists(), "what older attempts left half written is removed"
    with pytest.raises(FileNotFoundError):
        checkpoint.write_tensors(half_written / "weights-00002-of-00002.safetensors", WEIGHTS)
    with pytest.raises(Superseded, match=r"^.*attempt 1 may not commit, attempt 2 has taken over$"):
        save(old, 20)
    assert checkpoint.latest(run) == first
    assert checkpoint.latest(run) != save(new, 20)


def test_attempts_begun_at_once_get_different_numbers(run: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: Attempt.begin(run).number, range(40)))
    assert sorted(numbers) == list(range(1, 41))


def test_commit_needs_a_living_driver(run: Path) -> None:
    with Lease(run, interval=0.05):
        attempt = Attempt.begin(run, SOON)
        time.sleep(2 * SOON)
        alive = save(attempt, 10)
    started = time.monotonic()
    with pytest.raises(Superseded, match=r"^.*its driver is gone; start the same command again to go on$"):
        save(attempt, 20)
    assert time.monotonic() - started >= SOON, "it has to wait for a renewal first"
    with pytest.raises(Superseded, match="its driver is gone"):
        Attempt.begin(run, SOON)
    (run / "lease").unlink()
    with pytest.raises(Superseded, match="its driver is gone"):
        save(attempt, 20)
    assert checkpoint.latest(run) == alive


@pytest.mark.slow
def test_a_driver_that_was_killed(run: Path) -> None:
    """No goodbye: the lease just stops being renewed. The next driver takes over."""
    code = "import sys, time; from pathlib import Path; from pipeline.checkpoint import Lease\n"
    code += "with Lease(Path(sys.argv[1]), 0.05): print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        orphan = Attempt.begin(run, SOON)
        save(orphan, 10)
        driver.kill()
    time.sleep(1.2 * SOON)
    with pytest.raises(Superseded, match="its driver is gone"):
        save(orphan, 20)
    with Lease(run, interval=0.05):
        successor = Attempt.begin(run, SOON)
        save(successor, 20)
        with pytest.raises(Superseded, match="attempt 2 has taken over"):
            save(orphan, 30)


def test_a_machine_that_was_suspended_goes_on(run: Path) -> None:
    """Old when the worker wakes up, renewed a moment later."""
    with Lease(run, interval=SOON / 3) as lease:
        attempt = Attempt.begin(run, SOON)
        os.utime(run / "lease", (1, 1))
        save(attempt, 10)
        assert lease._thread.is_alive()
    assert checkpoint.latest(run) == checkpoint.path_of(run, 10)


def test_an_attempt_without_a_lease_answers_to_no_driver(run: Path) -> None:
    started = time.monotonic()
    save(Attempt.begin(run), 10)
    assert time.monotonic() - started < 5


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
