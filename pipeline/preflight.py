"""What can be known to fail before any work starts: storage, GPUs, lengths, vocabularies, and what an objective asks of rows.

Left out: what a configuration alone gives away (`config`), and weights that do not load (`pretrained`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pipeline import checkpoint, data
from pipeline.config import ConfigError, RunConfig
from pipeline.export import RUN_FILE, intact
from pipeline.model_files import locate
from pipeline.optimizer import check_offload
from pipeline.order import Plan
from pipeline.pretrained import check_kind, load_config, load_tokenizer
from pipeline.redaction import redact
from pipeline.rows import Rows
from pipeline.thinker import assistant_of, check_steps, refuse_thoughts_under_kl
from pipeline.tracking import tracking_uri

logger = logging.getLogger(__name__)

UPLOADED = "working_dir_files"
"""The folder below a Ray session in which uploaded working directories lie."""


def check(config: RunConfig, local: bool = False) -> None:
    """What this machine, the storage and the tracking server give away. Raises ConfigError."""
    if redact(config.name) != config.name:
        raise ConfigError("name: holds a secret of the environment, and becomes the name of a folder; take another one")
    _refuse_uploaded_folder("storage", config.storage)
    _refuse_uploaded_folder("sampling.output", config.sampling.output)
    if config.tracking.enabled:
        tracking_uri(config)
    if local and config.scaling.gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError("scaling.gpus_per_worker: this machine has no GPU; set it to 0")
    if 0 < config.scaling.gpus_per_worker < 1 < config.scaling.most_workers:
        raise ConfigError("scaling.gpus_per_worker: workers that train together need a GPU each; set it to 1")
    try:
        (Path(config.storage) / "cache").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"storage: cannot be written ({error}); name another folder") from None
    if config.scaling.offload_optimizer:
        check_offload()


def _refuse_uploaded_folder(key: str, path: str | None) -> None:
    """A job's `--working-dir` is unpacked into a cache of Ray's, which it empties: a relative path would lead there."""
    if path is not None and UPLOADED in Path(path).absolute().parts:
        raise ConfigError(
            f"{key}: {path} lies in Ray's copy of the job's working directory, which Ray deletes; give an absolute path that all "
            f"nodes share, e.g. {key}=/shared/qalign"
        )


def check_models(config: RunConfig, model: str) -> str:
    """All that training reads beside the model at `model`: found, whole, and of the same tokens. Returns the reference. Raises ConfigError."""
    check_lengths(config, model)
    cache, needs = Path(config.storage) / "cache", config.objective.needed()
    frozen = locate(config.model.reference, cache, "model.reference") if config.model.reference else model
    if frozen != model:
        check_vocabularies(config, model, frozen, "model.reference")
    refuse_thoughts_under_kl(needs, model, frozen)
    if needs.latent != "none" and (assistant := assistant_of(config)) is not None:
        check_vocabularies(config, model, assistant, "latent.assistant")
        check_lengths(config, assistant)
    return frozen


def check_model(config: RunConfig, path: str, key: str, tokenizer: bool = False) -> None:
    """Raises ConfigError where a run, checkpoint, folder or name cannot be a model (that has a tokenizer)."""
    folder = Path(path).expanduser()
    if not (folder / RUN_FILE).is_file() and not (folder / checkpoint.STATE).is_file():
        found = intact(path, Path(config.storage) / "cache", key, config.model.trust_remote_code)
        check_kind(load_config(found, config.model.trust_remote_code, key), found, key)
        if tokenizer:
            load_tokenizer(found, config.model.trust_remote_code, key)


def check_lengths(config: RunConfig, model: str) -> None:
    """Rows have to fit the model at `model`: its context and its vocabulary. Raises ConfigError."""
    own = load_config(model, config.model.trust_remote_code)
    check_kind(own, model)
    text = own.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    thoughts = config.latent.n_latents if config.objective.needed().latent != "none" else 0
    if context is not None and config.data.max_length + thoughts > context:
        beside = f" and {thoughts} thoughts" if thoughts else ""
        raise ConfigError(
            f"data.max_length: {config.data.max_length}{beside} exceeds the model's context of {context} tokens; lower it"
        )
    tokenizer = load_tokenizer(model, config.model.trust_remote_code)
    if len(tokenizer) > text.vocab_size:
        beyond = [token for token, i in tokenizer.get_added_vocab().items() if i >= text.vocab_size]
        added = f" (added: {', '.join(sorted(beyond)[:3])})" if beyond else ""
        raise ConfigError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens{added}, the model {text.vocab_size}; give the model as many "
            f"(resize_token_embeddings({len(tokenizer)}), save_pretrained), or take the tokenizer that belongs to it"
        )


def check_vocabularies(config: RunConfig, model: str, other: str, key: str) -> None:
    """Two models of one token mean the same only if it is the same token. Raises ConfigError about the `key` of the other."""
    trust = config.model.trust_remote_code
    check_kind(load_config(other, trust, key), other, key)
    sizes = [load_config(path, trust).get_text_config().vocab_size for path in (model, other)]
    tokenizers = [data.tokenizer_identity(load_tokenizer(path, trust)) for path in (model, other)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise ConfigError(
            f"{key}: its tokenizer differs from the policy's (vocabularies of {sizes[1]} and {sizes[0]}); "
            f"name {'a reference' if key == 'model.reference' else 'a model'} with the same one"
        )


def check_rows(config: RunConfig, folder: Path) -> None:
    """What the objective asks of the rows, and the steps that they make, before anything is scored. Raises ConfigError."""
    found, needs, rows = data.summary(folder), config.objective.needed(), Rows(folder)
    split = rows.split(config.data, config.seed)
    if len(split.train) == 0:
        raise ConfigError("data.eval_fraction: holds out every prompt; lower it or add records")
    if shared := rows.also_trained(split):
        logger.warning(
            "data.eval_sources: the prompts of %d of %d held-out rows are trained on, too, which flatters eval/*; "
            "take them out of data.sources, or hold out by data.eval_fraction",
            shared,
            len(split.eval),
        )
    steps = Plan(config, rows.lengths[split.train]).total_steps
    if needs.critic and config.critic.steps_alone >= steps:
        raise ConfigError(
            f"critic.steps_alone: {config.critic.steps_alone} of {steps} steps would leave none for the policy; "
            "lower it or train longer"
        )
    if config.data.kind == "unpaired" and found.mean_return is not None and abs(found.mean_return) == 1:
        logger.warning("data.sources: all labels are the same; there is nothing to tell good from bad by")
    if needs.mismatched and found.mismatched < found.rows:
        logger.warning(
            "data.sources: %d rows have no response to another prompt beside them, all of one prompt?",
            found.rows - found.mismatched,
        )
    if needs.latent == "steps" and found.stepped < found.rows:
        check_steps(found.rows - found.stepped, found.rows)
    if needs.behaviour and found.behaviour < found.rows:
        raise ConfigError(
            f"objective.importance: {found.rows - found.behaviour} of {found.rows} rows have no log-probs of the policy that "
            "made them; give each step a logprob, or set importance=reference (the reference made them) or none"
        )
