"""A checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads, tokenizer included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from pipeline import checkpoint
from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.model import Policy
from pipeline.pretrained import load_causal_lm, load_tokenizer, locate


def export(config: RunConfig, folder: Path, model: str, target: Path) -> Path:
    """Write the weights of checkpoint `folder` (trained from `model`) to `target` as safetensors; adapters are merged.

    Raises ConfigError when `target` exists and is not an empty folder: nothing is overwritten.
    """
    target = target.expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; name a new folder to export to")
    lm = load_causal_lm(model, torch.float32, config.model.attention, config.model.trust_remote_code)
    policy = Policy(lm, config.model.lora)
    checkpoint.load_into({name: p for name, p in policy.named_parameters() if p.requires_grad}, folder)
    lm = policy.merged().to(getattr(torch, config.checkpoint.export_dtype))
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    lm.save_pretrained(aside)
    load_tokenizer(model, config.model.trust_remote_code).save_pretrained(aside)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    return target


RUN_FILE = "run.json"
EXPORT = "export"


def weights_of(path: str, cache: Path) -> str:
    """A folder or hub name that transformers loads, for anything that holds weights.

    `path`: a hub name or model folder, a run's folder (its export, or else its newest checkpoint), or one of a run's
    checkpoints `…/step-00000020`. Checkpoints are exported once, beside the run's own export. Raises ConfigError.
    """
    folder = Path(path).expanduser().absolute()
    if (folder / RUN_FILE).is_file() and not (folder / EXPORT).is_dir():
        newest = checkpoint.latest(folder)
        if newest is None:
            raise ConfigError(f"checkpoint_from: {folder} has neither an export nor a checkpoint yet; train it first")
        folder = newest
    run = folder.parent.parent
    if not (folder / checkpoint.STATE).is_file() or not (run / RUN_FILE).is_file():
        return locate(path, cache, "checkpoint_from")
    target = run / "exports" / folder.name
    if not target.is_dir():
        made_by = json.loads((run / RUN_FILE).read_text())
        target.parent.mkdir(exist_ok=True)
        export(validate(made_by["config"]), folder, made_by["model"], target)
    return str(target)
