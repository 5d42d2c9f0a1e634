"""A checkpoint as a folder that transformers loads, tokenizer included; critic and prior lie in folders within."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import checkpoint
from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.critic import CRITIC, load_critic, save_critic
from pipeline.model import Policy, load_policy
from pipeline.model_files import locate
from pipeline.pretrained import load_tokenizer, precision
from pipeline.rendering import Renderer
from pipeline.reward import RewardNetwork, load_reward_network
from pipeline.thinker import new_prior, save_prior


def export(config: RunConfig, folder: Path, model: str, target: Path) -> Path:
    """Write the weights of checkpoint `folder` (trained from `model`) to `target` as safetensors; adapters are merged.

    Raises ConfigError when `target` exists and is not an empty folder: nothing is overwritten.
    """
    target = target.expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; name a new folder to export to")
    wanted = config.checkpoint.export_dtype
    dtype = precision(config.model.dtype if wanted == "auto" else wanted)
    needs, tokenizer = config.objective.needed(), load_tokenizer(model, config.model.trust_remote_code)
    # Weights are read, nothing is computed.
    plain = {"dtype": "float32", "activation_checkpointing": False, "attention": config.model.unpacked_attention}
    settings = config.model.model_copy(update=plain)
    network: RewardNetwork | Policy
    if needs.model == "reward":
        network = load_reward_network(settings, model)
    else:
        own = replace(needs, kl="none")  # the reference stays where it is
        network = load_policy(settings, model, own, new=new_prior(config))
    checkpoint.load_into(_trained(network), folder)
    lm = network.merged().to(dtype)
    if needs.model == "reward":
        _pad_behind_the_end(lm, tokenizer, Renderer(tokenizer, config.data).stop_ids)
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    lm.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if isinstance(network, Policy) and network.prior is not None:
        save_prior(network.prior, lm, aside)
    if needs.critic:
        critic = load_critic(config.model_copy(update={"model": settings}), model)
        checkpoint.load_into(_trained(critic), folder, prefix="critic-")
        save_critic(critic, aside / CRITIC, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    return target


def _pad_behind_the_end(lm: nn.Module, tokenizer: Any, ends: frozenset[int]) -> None:
    """A padding token that ends no response, for classifier and tokenizer.

    transformers reads the score at the last token that is no padding: were EOS the padding, too, it would read it at the
    token before, where nothing was trained.
    """
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    pad = next(token for token in (*known, *range(len(tokenizer))) if token is not None and token not in ends)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    lm.config.pad_token_id = pad


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


RUN_FILE = "run.json"
EXPORT = "export"


def weights_of(path: str, cache: Path, key: str = "checkpoint_from", trust_remote_code: bool = False) -> str:
    """A folder or hub name that transformers loads, for anything that holds weights.

    `path`: a hub name or model folder, a run's folder (its export, or else its newest checkpoint), or one of a run's
    checkpoints `…/step-00000020`. Checkpoints are exported once, beside the run's own export. trust_remote_code: the caller's
    permission; what a run's own file says of it does not count, as the run may be somebody else's. Raises ConfigError about `key`.
    """
    folder = Path(path).expanduser().absolute()
    if (folder / RUN_FILE).is_file() and not (folder / EXPORT).is_dir():
        newest = checkpoint.latest(folder)
        if newest is None:
            raise ConfigError(f"{key}: {folder} has neither an export nor a checkpoint yet; train it first")
        folder = newest
    run = folder.parent.parent
    if not (folder / checkpoint.STATE).is_file() or not (run / RUN_FILE).is_file():
        return locate(path, cache, key)
    target = run / "exports" / folder.name
    if not target.is_dir():
        made_by = json.loads((run / RUN_FILE).read_text())
        made_by["config"]["model"]["trust_remote_code"] = trust_remote_code
        target.parent.mkdir(exist_ok=True)
        export(validate(made_by["config"]), folder, made_by["model"], target)
    return str(target)
