"""Which of a model's files may be read as weights: safetensors, and nothing that Python would unpickle.

transformers falls back to `pytorch_model.bin`, to an adapter's `adapter_model.bin`, and to whatever an index names. These are pickles:
programs that run as they are read. They are refused, whatever else the configuration allows. An adapter's description is refused as
well: it names another model, which transformers would fetch in place of the one that was asked for.

Left out: finding them (`model_files`), and loading (`pretrained`).
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config import ConfigError

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
REMEDY = "see docs/security.md for how to convert it"


def check_weight_files(path: str, key: str) -> None:
    """Raises ConfigError, naming `key`, unless the model at a folder or hub name has its weights in safetensors alone."""
    if model_file(path, ADAPTER) is not None:
        raise ConfigError(
            f"{key}: {path} is an adapter; merge it into its model (peft: merge_and_unload) and name that"
        )
    if (index := model_file(path, INDEX)) is not None:
        _check_index(index, path, key)
    elif model_file(path, "model.safetensors") is None and any(model_file(path, name) for name in PICKLES):
        raise ConfigError(f"{key}: {path} has its weights as a pickle only, which is never read; {REMEDY}")


def _check_index(index: Path, path: str, key: str) -> None:
    """The parts that an index names lie beside it, and are safetensors."""
    try:
        parts = {str(part) for part in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError):
        raise ConfigError(f"{key}: {path}: {INDEX} is no index of weights; save the model again") from None
    for part in sorted(parts):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: {path}: {INDEX} names {part!r}, which is no safetensors file beside it; {REMEDY}"
            )


def model_file(path: str, name: str) -> Path | None:
    """A file of the model's, if it has it (a hub name's is fetched)."""
    if Path(path).is_dir():
        found = Path(path) / name
        return found if found.is_file() else None
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    cached = cached_file(path, name, **quiet)
    return Path(cached) if cached is not None else None
