"""Precision, loading, and one line for each way to fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MambaConfig

from pipeline import driver
from pipeline.config import ConfigError
from pipeline.pretrained import _attention, check_kind, load_causal_lm, load_tokenizer, precision, settled

from .conftest import save_tiny_llama
from .tiny_architectures import tiny_lm


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_precision_is_native_bfloat16_or_float32(monkeypatch):
    assert precision("float32") == torch.float32
    assert precision("bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for features, expected in [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"neon": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert precision("auto") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert precision("auto") == expected


def test_auto_means_what_the_workers_are_whatever_this_machine_has(make_config, monkeypatch) -> None:
    def meant(*overrides: str) -> tuple[str, str]:
        config = settled(make_config("model.dtype=auto", *overrides))
        assert settled(config) == config
        return config.model.dtype, config.model.attention

    gpu = "scaling.gpus_per_worker=1"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        assert meant() == ("float32", "sdpa")
        assert meant(gpu) == ("bfloat16", "auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert meant() == ("bfloat16", "sdpa")
    assert meant("model.dtype=float32", "model.attention=eager") == ("float32", "eager")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert meant(gpu) == ("float32", "auto")


def test_attention_skips_what_is_hidden_on_gpus(tiny_model, tmp_path, monkeypatch) -> None:
    def chosen(path: Path) -> str:
        return load_causal_lm(str(path), torch.float32, "auto").config._attn_implementation

    wide = save_tiny_llama(tmp_path / "wide", num_attention_heads=2)
    assert chosen(wide) == "sdpa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen(wide) == "flex_attention"
    assert chosen(tiny_model) == "sdpa", "the kernel takes heads from 16 on"
    assert _attention("auto", MambaConfig()) == "sdpa", "it has no heads"


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
    empty = rf"{copy} holds no weights \(model\.safetensors\); save the model there again"
    unreadable = rf"cannot load a .* from {copy}; check the folder's files"
    unknown = r"cannot load a .* from no/such-model; correct the name"
    for load, here in ((lambda path: load_causal_lm(path, torch.float32), empty), (load_tokenizer, unreadable)):
        for path, cause in [(str(copy), here), ("no/such-model", unknown)]:
            with pytest.raises(ConfigError, match=rf"^model\.path: {cause}") as caught:
                load(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("cut off", r"cannot load weights from .*: model\.safetensors is cut off or damaged .*; fetch or save"),
        ("pointer", r"cannot load weights from .*: model\.safetensors is cut off or damaged .*; fetch or save"),
        ("other width", r"cannot load a causal .*check the folder's files"),
    ],
)
def test_damaged_weights_are_refused_in_one_line(damage, cause, copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
    with pytest.raises(ConfigError, match=rf"^model\.path: {cause}") as caught:
        load_causal_lm(str(copy), torch.float32)
    assert "\n" not in str(caught.value)


def test_a_run_is_the_same_whoever_settles_its_settings(make_config) -> None:
    config = make_config("model.dtype=auto")
    assert config != settled(config)
    runs = [driver.open_run(own, driver.prepare(own, local=True))[0] for own in (config, settled(config))]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "what"),
    [("t5", "an encoder–decoder model"), ("bart", "an encoder–decoder model"), ("vit", "no causal language model")],
)
def test_models_of_other_kinds_are_refused_in_one_line(tmp_path, name, what) -> None:
    config = AutoConfig.for_model(name)
    with pytest.raises(
        ConfigError, match=f"^model\\.path: somewhere is {what} \\({name}\\); name a decoder-only"
    ) as caught:
        check_kind(config, "somewhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma2", "gptj", "bloom", "mamba", "gpt_oss"])
def test_a_model_without_the_asked_attention_gets_one_that_it_has(tmp_path, name) -> None:
    lm = tiny_lm(name)
    lm.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), torch.float32, "sdpa")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, lm(input_ids=ids).logits)
