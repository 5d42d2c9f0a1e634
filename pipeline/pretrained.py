"""Loading pretrained models and tokenizers: from what `model_files.locate` gave to what transformers makes of it.

`precision` picks the number format, `load_*` load. Every way to fail is a `ConfigError` of one line.
Left out: adapters, device placement and everything about training (see `model` and `engine`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import rope, widening
from pipeline.config import Attention, ConfigError, Precision, RunConfig
from pipeline.model_files import not_loadable
from pipeline.weight_files import check_fetched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

NARROWEST_HEAD = 16
"""FlexAttention's kernel on GPUs takes no narrower ones."""


def settled(config: RunConfig) -> RunConfig:
    """With what `auto` means to this run's workers: asked once, before anything is hashed or sent.

    Each process would answer for its own machine: a driver on a node without a GPU, a worker without one on a machine that has some.
    """
    model, gpu = config.model, config.scaling.gpus_per_worker > 0
    dtype = str(precision(model.dtype, gpu)).removeprefix("torch.")
    attention = "sdpa" if model.attention == "auto" and not gpu else model.attention
    return config.model_copy(update={"model": model.model_copy(update={"dtype": dtype, "attention": attention})})


def precision(dtype: Precision, gpu: bool | None = None) -> torch.dtype:
    """`auto` → bfloat16 where the processor has a unit that multiplies matrices of it (a GPU, or a CPU with AMX), else float32.
    AVX512-BF16 alone is no reason: it multiplies no faster than float32 does, and all else costs conversions.

    gpu: whether it is a GPU's; of one that is elsewhere the best is thought. Default: whether this machine has one.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    here = torch.cuda.is_available()
    if here if gpu is None else gpu:
        native = not here or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = widening.multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def load_tokenizer(path: str, trust_remote_code: bool = False, key: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of what `locate` gave. Raises `ConfigError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise not_loadable("a tokenizer", path, key, error) from None


def load_config(path: str, trust_remote_code: bool = False, key: str = "model.path") -> Any:
    """The configuration of what `locate` gave, without its weights. Raises `ConfigError`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise not_loadable("a model configuration", path, key, error) from None


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

    config = load_config(path, trust_remote_code, key)
    if classifies(config):
        raise ConfigError(f"{key}: {path} is a reward model, which has no words to say; name a language model")
    check_kind(config, path, key)
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

    check_kind(load_config(path, trust_remote_code), path)
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
    check_kind(config, path, key)
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
    """`auto` → flex_attention where there is a GPU and architecture and kernel take it, else sdpa."""
    if attention != "auto":
        return attention
    if not torch.cuda.is_available():
        return "sdpa"
    from transformers import AutoModelForCausalLM

    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not getattr(architecture, "_supports_flex_attn", False):
        return "sdpa"  # asked first: an architecture without attention has no heads
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return "flex_attention" if head >= NARROWEST_HEAD else "sdpa"


def check_kind(config: Any, path: str, key: str = "model.path") -> None:
    """Raises ConfigError where a configuration alone tells that this is no decoder-only language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    names = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder:
        what = "an encoder–decoder model"
    elif any(name.endswith("ForMaskedLM") for name in names):
        what = "a masked language model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        what = "no causal language model"
    else:
        return
    raise ConfigError(f"{key}: {path} is {what} ({config.model_type}); name a decoder-only language model")


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
    from transformers.utils import logging as library

    check_fetched(path, key)
    if Path(path).is_dir():
        library.disable_progress_bar()  # local weights load in moments; downloads keep their bar
    verbosity = library.get_verbosity()
    library.set_verbosity_error()  # what is missing or unused is ours to tell
    settings |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    settings |= {"use_safetensors": True, "output_loading_info": True}
    asked = _attention(attention, load_config(path, trust_remote_code, key))
    try:
        try:
            model, info = kind.from_pretrained(path, attn_implementation=asked, **settings)
        except (ValueError, ImportError) as error:
            if asked == "eager" or not _is_about_attention(error):
                raise
            # transformers says so before it reads weights.
            model, info = kind.from_pretrained(path, attn_implementation="eager", **settings)
            logger.info("%s has no %s attention: model.attention=eager is used", type(model).__name__, asked)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise not_loadable(what, path, key, error) from None
    finally:
        library.set_verbosity(verbosity)
    rope.attach(model)
    return model.eval(), sorted(info["missing_keys"])


def _is_about_attention(error: Exception) -> bool:
    return any(word in str(error) for word in ("scaled_dot_product_attention", "attn_implementation", "flex_attention"))


def _refuse_lacking(lacking: list[str], path: str, key: str, what: str) -> None:
    if lacking:
        raise ConfigError(f"{key}: {path} lacks {len(lacking)} weights ({lacking[0]}, …); it is not a complete {what}")
