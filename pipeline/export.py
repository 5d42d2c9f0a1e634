"""A checkpoint as a folder that transformers loads, tokenizer included; critic and prior lie in folders within.

An export stops where decoding stops (`generation`), has the chat template of the configuration, is compared with what was
trained (`export_check`) and carries checksums (`checksums`).
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import checkpoint, checksums
from pipeline.collate import collate
from pipeline.config import ConfigError, ModelConfig, RunConfig
from pipeline.config_file import validate
from pipeline.contracts import PolicyOut
from pipeline.critic import CRITIC, load_critic, load_trained_critic, merge_critic, save_critic
from pipeline.durable import building, clear_leftovers, discard, read_json
from pipeline.export_check import compare, critic_values, exported_values, probe_rows, read, trained_values
from pipeline.generation import own_stop_ids, save_model
from pipeline.lease import locked
from pipeline.model import Policy, load_policy
from pipeline.model_files import locate
from pipeline.pretrained import load_config, load_tokenizer, precision
from pipeline.redaction import unsealed
from pipeline.rendering import Renderer
from pipeline.reward import RewardNetwork, load_reward_network
from pipeline.thinker import new_prior, save_prior

logger = logging.getLogger(__name__)


def export(config: RunConfig, folder: Path, model: str, target: Path, rows: Path | None = None) -> Path:
    """Write the weights of checkpoint `folder` (trained from `model`) to `target` as safetensors; adapters are merged.

    rows: prepared rows, on some of which the result is compared with the checkpoint; default: tokens by chance. Raises
    ConfigError when `target` exists and is not an empty folder (nothing is overwritten), ExportError when the result is not
    what was trained; then there is no `target`.
    """
    target = target.expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; name a new folder to export to")
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent)
    with building(target) as aside:
        _Exporter(config, folder, model, rows).write(aside)
        checksums.seal(aside)
    return target


class _Exporter:
    """One export: every network is loaded in float32, compared after each step, and let go before the next one is loaded."""

    def __init__(self, config: RunConfig, folder: Path, model: str, rows: Path | None) -> None:
        wanted, trust = config.checkpoint.export_dtype, config.model.trust_remote_code
        self.dtype = precision(config.model.dtype if wanted == "auto" else wanted)
        # Weights are read, next to nothing is computed.
        plain = {"dtype": "float32", "activation_checkpointing": False, "attention": config.model.unpacked_attention}
        self.config = config.model_copy(update={"model": config.model.model_copy(update=plain)})
        self.folder, self.model = folder, model
        self.needs = config.objective.needed()
        self.tokenizer = load_tokenizer(model, trust)
        render = Renderer(self.tokenizer, config.data)
        self.stop_ids = render.stop_ids | own_stop_ids(model, trust)
        if config.data.chat_template is not None:  # a name among the model's own, or a template
            self.tokenizer.chat_template = self.tokenizer.get_chat_template(config.data.chat_template)
        if self.needs.model == "reward":
            _pad_behind_the_end(self.tokenizer, self.stop_ids)
        vocabulary = load_config(model, trust).get_text_config().vocab_size
        self.rows = probe_rows(config, rows, vocabulary, self.tokenizer.pad_token_id)
        self.batch = collate(self.rows)

    def write(self, aside: Path) -> None:
        """All files of the export but the checksums."""
        network = self._load()
        checkpoint.load_into(_trained(network), self.folder)
        before = read(network, self.batch)
        lm: Any = network.merged()
        self._compare(before, read(network, self.batch), "the merged model's")
        _round(lm, self.dtype)
        scores, prior = isinstance(network, RewardNetwork), getattr(network, "prior", None)
        if scores:
            lm.config.pad_token_id = self.tokenizer.pad_token_id
        save_model(lm, aside, self.stop_ids, self.tokenizer.pad_token_id)
        self.tokenizer.save_pretrained(aside)
        if prior is not None:
            save_prior(prior, lm, aside)
        _round(lm, torch.float32)  # what was saved, in the precision of the comparison
        saved = read(network, self.batch)
        del network, lm
        gc.collect()
        if prior is not None:
            self._compare(saved, read(self._load_exported(aside), self.batch), "the exported model's")
        else:
            found = exported_values(aside, self.config.model, self.rows, scores)
            compare(trained_values(saved, self.batch), found, "the exported model's")
        if self.needs.critic:
            self._write_critic(before, aside / CRITIC)

    def _compare(self, expected: PolicyOut, found: PolicyOut, whose: str) -> None:
        compare(trained_values(expected, self.batch), trained_values(found, self.batch), whose)

    def _load(self) -> RewardNetwork | Policy:
        """The network as training starts from it."""
        if self.needs.model == "reward":
            return load_reward_network(self.config.model, self.model)
        head = self.needs.critic and self.config.critic.architecture == "head"
        own = replace(self.needs, kl="none", latent="none")  # the reference stays where it is
        return load_policy(self.config.model, self.model, own, keep_states=head, new=new_prior(self.config))

    def _load_exported(self, aside: Path) -> Policy:
        """A model with its prior, which only we know to read."""
        settings: ModelConfig = self.config.model.model_copy(update={"lora": None})
        return load_policy(settings, str(aside))

    def _write_critic(self, out: PolicyOut, target: Path) -> None:
        """out: the policy's before its adapters were merged, for a value head on its states."""
        critic = load_critic(self.config, self.model)
        checkpoint.load_into(_trained(critic), self.folder, prefix="critic-")
        expected = critic_values(critic, out, self.batch)
        merge_critic(critic)
        compare(expected, critic_values(critic, out, self.batch), "the merged critic's")
        _round(critic, self.dtype)
        save_critic(critic, target)
        _round(critic, torch.float32)
        expected = critic_values(critic, out, self.batch)
        del critic
        gc.collect()
        compare(
            expected, critic_values(load_trained_critic(self.config, target), out, self.batch), "the exported critic's"
        )


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in another precision. Buffers stay: rotary frequencies are nothing that was trained, or is saved."""
    for p in module.parameters():
        p.data = p.data.to(dtype)


def _pad_behind_the_end(tokenizer: Any, ends: frozenset[int]) -> None:
    """A padding token that ends no response, for a classifier's tokenizer.

    transformers reads the score at the last token that is no padding: were EOS the padding, too, it would read it at the
    token before, where nothing was trained.
    """
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    pad = next(token for token in (*known, *range(len(tokenizer))) if token is not None and token not in ends)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def _trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


RUN_FILE = "run.json"
EXPORT, EXPORTS = "export", "exports"
LOCK = "export.lock"
"""Held by whoever makes an export of a run again, or of one of its checkpoints: anybody may, without the run's lease."""


def run_settings(found: Any) -> dict[str, Any]:
    """What a run's file says: identity, model, config; raises what `durable.read_json` takes for damage."""
    sections = {name: dict(found["config"][name]) for name in ("data", "model", "objective", "optimizer", "train")}
    config = {**found["config"], **sections}
    return {"identity": str(found["identity"]), "model": str(found["model"]), "config": config}


def weights_of(path: str, cache: Path, key: str = "checkpoint_from", trust_remote_code: bool = False) -> str:
    """A folder or hub name that transformers loads, for anything that holds weights.

    `path`: a hub name or model folder, a run's folder (its export, or else its newest checkpoint), or one of a run's
    checkpoints `…/step-00000020`. Checkpoints are exported once, beside the run's own export. trust_remote_code: the caller's
    permission; what a run's own file says of it does not count, as the run may be somebody else's. Raises ConfigError about `key`.
    """
    mend_export(path, cache, key, trust_remote_code)
    folder = Path(path).expanduser().absolute()
    if (folder / RUN_FILE).is_file() and not (folder / EXPORT).is_dir():
        newest = checkpoint.latest(folder)
        if newest is None:
            raise ConfigError(f"{key}: {folder} has neither an export nor a checkpoint yet; train it first")
        folder = newest
    run = folder.parent.parent
    if not (folder / checkpoint.STATE).is_file() or not (run / RUN_FILE).is_file():
        return locate(path, cache, key)
    target = run / EXPORTS / folder.name
    if not target.is_dir():
        with locked(run, LOCK):
            if not target.is_dir():
                _export_again(run, folder, target, trust_remote_code)
    return locate(str(target), cache, key)


def intact(path: str, cache: Path, key: str, trust_remote_code: bool = False) -> str:
    """`model_files.locate` after `mend_export`."""
    mend_export(path, cache, key, trust_remote_code)
    return locate(path, cache, key)


def mend_export(path: str, cache: Path, key: str, trust_remote_code: bool = False) -> None:
    """Where `path` is, or stands for, a damaged export of a run: make it again from the checkpoint, with a warning.

    The damaged folder is kept beside it. Raises ConfigError about `key` where the checkpoint is gone.
    """
    given = Path(path).expanduser().absolute()
    for folder in (given, given / EXPORT, given.parent.parent / EXPORTS / given.name):
        run = folder.parent if folder.name == EXPORT else folder.parent.parent
        if not (run / RUN_FILE).is_file():
            continue
        if _fresh(folder).is_dir() or checksums.damage(folder, cache) is not None:
            with locked(run, LOCK):
                _mend(run, folder, cache, key, trust_remote_code)


def _fresh(folder: Path) -> Path:
    """Where a new export lies, complete, before it takes the place of the damaged one."""
    return folder.with_name(f".{folder.name}-again")


def _mend(run: Path, folder: Path, cache: Path, key: str, trust_remote_code: bool) -> None:
    """`mend_export` by the only one who does it now; others may have done it before, or have been killed at it."""
    fresh, kept = _fresh(folder), folder.with_name(f"{folder.name}-damaged")
    if fresh.is_dir() and not folder.exists():
        fresh.rename(folder)
    discard(fresh)
    wrong = checksums.damage(folder, cache)
    if wrong is None:
        return
    source = _source(run, folder)
    if source is None:
        raise ConfigError(
            f"{key}: {folder} is damaged ({wrong}), and there is no checkpoint to make it from again; delete it and train again, "
            f"or delete {checksums.FILE} in it if the change is meant"
        )
    logger.warning("%s is damaged (%s): exported again from %s, kept as %s", folder, wrong, source, kept.name)
    _export_again(run, source, fresh, trust_remote_code)
    discard(kept)
    folder.rename(kept)
    fresh.rename(folder)


def _source(run: Path, folder: Path) -> Path | None:
    """The checkpoint that an export of this run was made from."""
    if folder.name == EXPORT:
        return checkpoint.latest(run)
    found = run / checkpoint.FOLDER / folder.name
    try:
        checkpoint.verify(found)
    except checkpoint.Corrupt:
        return None
    return found


def _export_again(run: Path, folder: Path, target: Path, trust_remote_code: bool) -> None:
    """Export a checkpoint of a run with the settings that the run notes."""
    made_by = unsealed(
        read_json(run / RUN_FILE, run_settings, "`qalign train` with this run's configuration writes it anew")
    )
    made_by["config"]["model"]["trust_remote_code"] = trust_remote_code
    export(validate(made_by["config"]), folder, made_by["model"], target)
