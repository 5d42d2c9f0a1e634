"""Which weights play which role: found, checked and loaded.

Left out: what decoders do with them (`contract`), and the scorers (`scoring`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from pipeline.config import ConfigError, RunConfig
from pipeline.decoding.contract import Role
from pipeline.evaluation.scorers import judge_for
from pipeline.export import weights_of
from pipeline.pretrained import check_kind, load_config, load_tokenizer, precision
from pipeline.thinker import load_thinker

KEYS: dict[Role, str] = {
    "policy": "checkpoint_from",
    "reference": "decoding.reference",
    "baseline": "decoding.baseline",
    "base": "decoding.base",
    "scorer": "sampling.scorer",
    "baseline_scorer": "decoding.baseline_scorer",
}
"""The configuration key that names what plays a role."""


def named_models(config: RunConfig) -> dict[str, str]:
    """What the configuration names as models of decoding, by key."""
    options = config.decoding
    given = {
        "policy": config.checkpoint_from,
        "reference": options.reference,
        "baseline": options.baseline,
        "base": options.base,
    }
    return {KEYS[role]: path for role, path in given.items() if path is not None}


def weights(config: RunConfig, roles: Collection[Role], policy: str, reference: str, tokenizer: str) -> dict[str, str]:
    """Located weights of each language model among `roles`. policy: a run, checkpoint, folder or hub name.

    reference: located weights of the run's own; tokenizer: where it lies. Raises ConfigError, also where a model's own
    tokenizer is another.
    """
    cache, options = Path(config.storage) / "cache", config.decoding
    given: dict[Role, str] = {
        "policy": policy,
        "reference": options.reference or reference,
        "baseline": options.baseline or policy,
        "base": options.base or options.reference or reference,
    }
    trust = config.model.trust_remote_code
    found = {role: weights_of(path, cache, KEYS[role], trust) for role, path in given.items() if role in roles}
    _check_tokens(config, found, tokenizer)
    return dict(found)


def _check_tokens(config: RunConfig, found: Mapping[Role, str], tokenizer: str) -> None:
    """A token has to mean the same to all models. Raises ConfigError."""
    trust = config.model.trust_remote_code

    def tokens(path: str, key: str) -> tuple[dict[str, int], int]:
        size = load_config(path, trust, key).get_text_config().vocab_size
        return load_tokenizer(path, trust, key).get_vocab(), size

    for role, path in found.items():
        check_kind(load_config(path, trust, KEYS[role]), path, KEYS[role])
    wanted, known = tokens(tokenizer, "model.path"), {tokenizer}
    for role, path in found.items():
        if path not in known and tokens(path, KEYS[role]) != wanted:
            raise ConfigError(
                f"{KEYS[role]}: the tokenizer of {path} differs from that of model.path, {tokenizer}; name a model of the "
                "same vocabulary"
            )
        known.add(path)


def check_scorers(config: RunConfig, needs: Collection[Role]) -> None:
    """Whether there are the scorers that the configuration names, before any work. Raises ConfigError."""
    if "scorer" in needs and config.sampling.scorer is None:
        raise ConfigError(f"sampling.scorer: {config.decoding.method} needs one; set vader, classifier:NAME, …")
    if config.sampling.scorer is not None:
        judge_for(config, None)
    if config.decoding.baseline_scorer is not None:
        try:
            judge_for(scored_by_baseline(config), None)
        except ConfigError as error:
            raise ConfigError(str(error).replace(KEYS["scorer"], KEYS["baseline_scorer"])) from None


def scored_by_baseline(config: RunConfig) -> RunConfig:
    """The configuration whose scorer is the baseline's."""
    scorer = {"scorer": config.decoding.baseline_scorer}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=scorer)})


def load_models(config: RunConfig, paths: Mapping[str, str], device: torch.device) -> dict[str, nn.Module]:
    """The models by role; equal paths are loaded once."""
    options, loaded = config.model, {}
    for role, path in paths.items():
        if path not in loaded:
            found = load_thinker(path, precision(options.dtype), options, config.sampling, KEYS[role])
            loaded[path] = found.to(device).eval()
    return {role: loaded[path] for role, path in paths.items()}
