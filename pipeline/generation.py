"""What a model's folder says of generation: the tokens that end a response, read from it and written into an export.

transformers looks for them in `generation_config.json`, or where a model has no such file in its `config.json`.
See also: `rendering`, which knows what ends a response in training.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.durable import write_json
from pipeline.pretrained import load_config
from pipeline.weight_files import model_file

FILE = "generation_config.json"


def own_stop_ids(path: str, trust_remote_code: bool = False, key: str = "model.path") -> frozenset[int]:
    """Tokens at which the model that `locate` gave stops by its own account. Raises ConfigError about `key`."""
    config = load_config(path, trust_remote_code, key).get_text_config()
    file = model_file(path, FILE)
    if file is None:
        return _tokens(getattr(config, "eos_token_id", None), config.vocab_size)
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError):
        raise ConfigError(f"{key}: {path}: {FILE} is no JSON object; correct it") from None
    return _tokens(found, config.vocab_size)


def save_model(lm: Any, folder: Path, stop_ids: Collection[int], pad: int | None) -> None:
    """`save_pretrained` of a language model or classifier, after which `generate` stops at all of `stop_ids`.

    The model's own settings stay, sampling above all. They are written past transformers, which loads some combinations
    (a temperature without sampling, say) but refuses to save them again once anything else changes.

    pad: the tokenizer's padding token, for a model that names none.
    """
    if not lm.can_generate():
        lm.save_pretrained(folder)
        return
    from transformers import GenerationConfig

    settings, vocabulary = lm.generation_config.to_diff_dict(), lm.config.get_text_config().vocab_size
    lm.generation_config = GenerationConfig()
    lm.save_pretrained(folder)
    stops = _tokens(settings.get("eos_token_id"), vocabulary) | frozenset(stop_ids)
    if stops:
        settings["eos_token_id"] = min(stops) if len(stops) == 1 else sorted(stops)
    settings.pop("_from_model_config", None)  # some versions would take that as leave to derive it all again
    own_pad = settings.pop("pad_token_id", None)
    if not _tokens(own_pad, vocabulary):
        own_pad = pad
    if own_pad is not None:
        settings["pad_token_id"] = own_pad
    write_json(folder / FILE, settings)


def _tokens(value: Any, vocabulary: int) -> frozenset[int]:
    """One token, a list of them, or none."""
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocabulary)
