"""Exports under checksums: damage is found wherever they are read, and mended where the checkpoint is there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import checkpoint, checksums
from pipeline import export as exporting
from pipeline.config import ConfigError
from pipeline.driver import Result, fit
from pipeline.export import weights_of
from pipeline.model_files import locate
from tests.conftest import save_tiny_llama

WEIGHTS = "model.safetensors"


def flip(path: Path, place: int = -7) -> None:
    """One byte changes, and the times of the file do not."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = save_tiny_llama(tmp_path / "model")
    (folder / "prior").mkdir()
    shutil.copy(folder / WEIGHTS, folder / "prior" / "weights.safetensors")
    checksums.seal(folder)
    return folder


def test_what_is_damaged_is_named(sealed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert checksums.damage(sealed, cache) is None
    for name in (WEIGHTS, "prior/weights.safetensors"):
        flip(sealed / name)
        assert checksums.damage(sealed, cache) == f"the checksum of {name} differs", (
            "remembered digests are of other bytes"
        )
        flip(sealed / name)
    assert checksums.damage(sealed, cache) is None
    (sealed / "config.json").rename(sealed / "config.txt")
    assert checksums.damage(sealed, cache) == "config.json is missing"


def test_a_whole_text_that_differs_may_be_an_edit_and_a_broken_one_is_not(
    sealed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = sealed / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps(json.loads(plain) | {"note": 1}))
    for _ in range(2):
        assert locate(str(sealed), tmp_path / "cache") == str(sealed)
    assert caplog.text.count("config.json is not as it was exported") == 1
    config.write_text(plain[: len(plain) // 2])
    assert checksums.damage(sealed, tmp_path / "cache") == "the checksum of config.json differs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "unreadable"),
        ("gibberish\n", "unreadable"),
        (f"{'0' * 32}  ../secret\n", "names ../secret"),
        (f"{'0' * 32}  /etc/passwd\n", "names /etc/passwd"),
    ],
)
def test_checksums_that_are_none_are_refused(sealed: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "secret").write_text("x")
    (sealed / checksums.FILE).write_text(content)
    with pytest.raises(ConfigError, match=message):
        locate(str(sealed), tmp_path / "cache")


def test_a_folder_without_checksums_and_a_damaged_memory_of_digests(sealed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert checksums.damage(sealed, cache) is None
    (cache / checksums.MEMO).write_text('{"a": ')
    assert checksums.damage(sealed, cache) is None
    flip(sealed / WEIGHTS)
    with pytest.raises(ConfigError, match=rf"^model\.reference: .* is damaged \(the checksum of {WEIGHTS} differs\)"):
        locate(str(sealed), cache, "model.reference")
    (sealed / checksums.FILE).unlink()  # meant, or copied without it
    assert locate(str(sealed), cache) == str(sealed)


def test_a_sealed_export_passes_the_usual_tool(sealed: Path) -> None:
    """`xxh128sum -c`: digest, two spaces, name."""
    import xxhash

    for line in (sealed / checksums.FILE).read_text().splitlines():
        digest, name = line.split("  ")
        assert xxhash.xxh3_128((sealed / name).read_bytes()).hexdigest() == digest


# -------------------------------------------------------------------------------------------- an export of a run


def run_of(make_config) -> Result:
    return fit(make_config("train.max_steps=2"), local=True)


def test_whoever_reads_a_damaged_export_of_a_run_makes_it_again(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    result = run_of(make_config)
    cache, file = tmp_path / "outputs" / "cache", result.export / WEIGHTS
    right = file.read_bytes()

    def mended() -> None:
        assert file.read_bytes() == right
        assert (result.run / "export-damaged" / WEIGHTS).read_bytes() != right
        assert "exported again from" in caplog.text
        caplog.clear()

    for path in (result.run, result.export):
        flip(file)
        assert weights_of(str(path), cache) == str(result.export)
        mended()
    flip(file)
    assert run_of(make_config).already_finished
    mended()
    flip(file, 200)
    fit(make_config(f"model.path={result.run}", "train.max_steps=1"), local=True)
    mended()
    step = checkpoint.latest(result.run)
    beside = Path(weights_of(str(step), cache)) / WEIGHTS
    flip(beside)
    assert Path(weights_of(str(step), cache)) == beside.parent
    assert beside.read_bytes() == right
    assert sorted(p.name for p in result.run.glob(".*")) == []


def three_steps(folder: Path) -> Path:
    """A file of trajectories."""
    steps = [{"text": word, "reward": 1.0} for word in ("a ", "b ", "c")]
    records = [{"prompt": str(i), "trajectories": [{"steps": steps, "reward": 0.5}]} for i in range(4)]
    path = folder / "trajectories.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.slow
def test_every_role_of_a_damaged_export_makes_it_again(make_config, qalign, tmp_path: Path) -> None:
    """As a job names it: the model, the reference, a scorer, what is decoded and evaluated."""
    run, scorer = run_of(make_config), fit(make_config("objective={name: reward_model}"), local=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    short = ("sampling.max_new_tokens=2", f"sampling.prompts.path={prompts}")
    best = (*short, f"checkpoint_from={run.export}", "decoding.method=best_of_n", "decoding.n=2")
    latent = ("objective={name: lta}", "data.kind=trajectory", f"data.sources=[{{path: {three_steps(tmp_path)}}}]")
    for result, call in (
        (run, ("eval", "train.max_steps=2", f"checkpoint_from={run.export}")),
        (run, ("decode", *short, f"checkpoint_from={run.export}", f"sampling.output={tmp_path}/1.jsonl")),
        (run, ("decode", *short, f"model.path={run.run}", f"checkpoint_from={run.run}")),
        (run, ("train", f"model.reference={run.run}", "train.max_steps=1")),
        (run, ("train", f"model.path={run.run}", "--dry-run")),
        (run, ("train", *latent, f"latent.assistant={run.export}")),
        (scorer, ("decode", *best, f"sampling.scorer=classifier:{scorer.run}")),
        (
            scorer,
            ("decode", *best, f"sampling.scorer=classifier:{scorer.export}", f"sampling.output={tmp_path}/2.jsonl"),
        ),
        (scorer, ("eval", "train.max_steps=2", *short[:1], f"sampling.scorer=classifier:{scorer.export}")),
    ):
        right = (result.export / WEIGHTS).read_bytes()
        flip(result.export / WEIGHTS)
        status, _, told = qalign(*call)
        assert status == 0, (call, told)
        assert (result.export / WEIGHTS).read_bytes() == right, call


def test_of_two_that_find_the_same_damage_one_mends_it(make_config, tmp_path: Path, monkeypatch) -> None:
    """Neither fails, and nothing of either is left over."""
    result, cache, made = run_of(make_config), tmp_path / "outputs" / "cache", []
    right = (result.export / WEIGHTS).read_bytes()
    step, real = checkpoint.latest(result.run), exporting.export
    monkeypatch.setattr(exporting, "export", lambda *given: made.append(given) or real(*given))
    for path, folder in ((result.run, result.export), (step, result.run / "exports" / step.name)):
        if folder.exists():
            flip(folder / WEIGHTS)
        with ThreadPoolExecutor(3) as several:
            found = list(several.map(lambda path: weights_of(str(path), cache), [path] * 3))
        assert found == [str(folder)] * 3
        assert (folder / WEIGHTS).read_bytes() == right
    assert len(made) == 2
    assert not list(result.run.glob(".*")) and not list((result.run / "exports").glob(".*"))


def test_what_a_killed_export_left_is_cleared_and_a_finished_one_takes_its_place(make_config, tmp_path: Path) -> None:
    result, cache = run_of(make_config), tmp_path / "outputs" / "cache"
    right = (result.export / WEIGHTS).read_bytes()
    step = checkpoint.latest(result.run)
    stale = [result.run / "exports" / f".{step.name}.0123456789ab.tmp", result.run / "..export-again.0123456789ab.tmp"]
    stale.append(result.run / ".export-again.0123456789ab.tmp")
    for folder in stale:
        folder.mkdir(parents=True)
        (folder / WEIGHTS).touch()
        os.utime(folder, (0, 0))
    weights_of(str(step), cache)  # clears what lies beside it
    assert not stale[0].exists()
    flip(result.export / WEIGHTS)
    weights_of(str(result.run), cache)
    assert not list(result.run.glob(".*"))
    # Killed between its two renamings: the damaged one is away, the new one is not in its place.
    result.export.rename(result.run / ".export-again")
    assert weights_of(str(result.run), cache) == str(result.export)
    assert (result.export / WEIGHTS).read_bytes() == right and not (result.run / ".export-again").exists()
    # Killed before them, where the damaged one was deleted by hand or mended otherwise since.
    shutil.copytree(result.export, result.run / ".export-again")
    assert weights_of(str(result.run), cache) == str(result.export)
    assert not (result.run / ".export-again").exists()


def test_without_the_checkpoint_a_damaged_export_is_refused_in_one_line(make_config, tmp_path: Path) -> None:
    result = run_of(make_config)
    shutil.rmtree(result.run / checkpoint.FOLDER)
    assert run_of(make_config).already_finished
    flip(result.export / WEIGHTS)
    for read in (
        lambda: weights_of(str(result.run), tmp_path / "outputs" / "cache"),
        lambda: run_of(make_config),
        lambda: fit(make_config(f"model.path={result.export}"), local=True),
    ):
        with pytest.raises(ConfigError, match=r"is damaged .* there is no checkpoint to make it from") as error:
            read()
        assert "\n" not in str(error.value)
    assert (result.export / WEIGHTS).is_file() and not (result.run / "export-damaged").exists()
    (result.export / checksums.FILE).unlink()
    assert run_of(make_config).already_finished
