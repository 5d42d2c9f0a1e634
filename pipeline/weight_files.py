"""Which of a model's files may be read as weights: safetensors, and nothing that Python would unpickle.

transformers falls back to `pytorch_model.bin`, to an adapter's `adapter_model.bin`, and to whatever an index names. These are pickles:
programs that run as they are read. They are refused, whatever else the configuration allows. An adapter's description is refused as
well: it names another model, which transformers would fetch in place of the one that was asked for.

Left out: finding them (`model_files`), and loading (`pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pipeline.config import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
REMEDY = "see docs/security.md for how to convert it"


def check_weight_files(path: str, key: str) -> None:
    """Raises ConfigError, naming `key`, unless the model at a folder or hub name has its weights in safetensors alone.

    Nothing but names and headers is read, so that it can be asked before any work: a hub name's files are not fetched for it, and
    where the hub cannot be reached, loading tells.
    """
    folder = Path(path) if Path(path).is_dir() else None
    names = {file.name for file in folder.iterdir()} if folder is not None else _on_the_hub(path)
    if names is None:
        return
    if ADAPTER in names:
        raise ConfigError(
            f"{key}: {path} is an adapter; merge it into its model (peft: merge_and_unload) and name that"
        )
    if not names & {WEIGHTS, INDEX}:
        if names & set(PICKLES):
            raise ConfigError(f"{key}: {path} has its weights as a pickle only, which is never read; {REMEDY}")
        raise ConfigError(f"{key}: {path} holds no weights ({WEIGHTS}); save the model there again, or name another")
    if folder is not None:
        listed = _listed(folder, key) if INDEX in names else {}
        _check_parts(folder, {WEIGHTS: set()} if WEIGHTS in names else listed, key)  # transformers reads it first


def check_fetched(path: str, key: str) -> None:
    """The same as something is about to be loaded: a hub name's index is fetched, and read."""
    check_weight_files(path, key)
    if not Path(path).is_dir() and (index := model_file(path, INDEX)) is not None:
        _listed(index.parent, key)


@cache
def _on_the_hub(name: str) -> set[str] | None:
    """Files of a hub's model; where the hub is out of reach, those of a snapshot that was fetched before; None: not known."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return {file.rfilename for file in HfApi().model_info(name, timeout=10).siblings or ()}
    except Exception:  # whatever keeps the hub away: loading tells
        try:
            found = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name of the hub's: loading says what is wrong with it
            return None
    return {file.name for file in Path(found).parent.iterdir()} if isinstance(found, str) else None


def _listed(folder: Path, key: str) -> dict[str, set[str]]:
    """The parts that a folder's index names, each with its tensors. Raises ConfigError where one is no safetensors file of the folder's."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        parts: dict[str, set[str]] = {}
        for tensor, part in places.items():
            parts.setdefault(str(part), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{key}: {folder}: {INDEX} is no index of weights; save the model again") from None
    for part in sorted(parts):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: {folder}: {INDEX} names {part!r}, which is no safetensors file beside it; {REMEDY}"
            )
    return parts


def model_file(path: str, name: str) -> Path | None:
    """A file of the model's, if it has it (a hub name's is fetched)."""
    if Path(path).is_dir():
        found = Path(path) / name
        return found if found.is_file() else None
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    cached = cached_file(path, name, **quiet)
    return Path(cached) if cached is not None else None


def _check_parts(folder: Path, parts: Mapping[str, set[str]], key: str) -> None:
    """Raises ConfigError where a file is missing, cut off or damaged in its header, or lacks a tensor that the index promises."""
    from safetensors import SafetensorError, safe_open

    for name, promised in sorted(parts.items()):
        if not (folder / name).is_file():
            raise ConfigError(f"{key}: {folder}: {name} is missing; fetch or save the model again")
        try:
            with safe_open(folder / name, "pt") as file:
                lacking = promised - set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{key}: cannot load weights from {folder}: {name} is cut off or damaged ({error}); fetch or save the model again"
            ) from None
        if lacking:
            raise ConfigError(
                f"{key}: {folder}: {name} lacks {len(lacking)} weights ({min(lacking)}, …); save it again"
            )
