"""What is known before work starts, and told with its remedy."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline import data, preflight
from pipeline.config import ConfigError
from tests.conftest import save_tiny_llama, tiny_tokenizer


def test_a_tokenizer_with_more_tokens_than_the_model_names_them_and_the_remedy(make_config, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ConfigError, match=r"260 tokens \(added: \[PAD\]\), the model 259; .*resize_token_embeddings\(260\)"
    ):
        preflight.check_lengths(make_config(), str(folder))


def test_held_out_prompts_that_are_trained_on_are_told(make_config, tmp_path: Path, pairs_file: Path, caplog) -> None:
    lines = pairs_file.read_text().splitlines()
    own = json.dumps({"prompt": "never seen", "chosen": "a", "rejected": "b"})
    (tmp_path / "held.jsonl").write_text("\n".join([*lines[:3], own]))
    config = make_config(f"data.eval_sources=[{{path: {tmp_path}/held.jsonl}}]")
    with caplog.at_level(logging.WARNING):
        preflight.check_rows(config, data.prepare(config, config.model.path, local=True))
    assert "the prompts of 3 of 4 held-out rows are trained on" in caplog.text
