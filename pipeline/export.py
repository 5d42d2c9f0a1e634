"""A checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads, tokenizer included."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pipeline import checkpoint
from pipeline.config import RunConfig
from pipeline.model import Policy
from pipeline.pretrained import load_causal_lm, load_tokenizer


def export(config: RunConfig, folder: Path, model: str, target: Path) -> Path:
    """Write the weights of checkpoint `folder` (trained from `model`) to `target` as safetensors; adapters are merged."""
    lm = load_causal_lm(model, torch.float32, config.model.attention, config.model.trust_remote_code)
    policy = Policy(lm, config.model.lora)
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, tensor in checkpoint.read_weights(folder):
            parameters[name].copy_(tensor)
    lm = policy.merged().to(getattr(torch, config.checkpoint.export_dtype))
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    lm.save_pretrained(aside)
    load_tokenizer(model, config.model.trust_remote_code).save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target
