"""The reward model: a language model's trunk with a scalar head that scores whole responses.

It is transformers' own `AutoModelForSequenceClassification` with one label, so that what is exported loads anywhere.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import ConfigError, ModelConfig
from pipeline.contracts import Batch, PolicyOut
from pipeline.model import add_lora, merge_lora, recompute_layers, remove_dropout, unflatten
from pipeline.packing import choose_layout
from pipeline.pretrained import classifies, load_config, load_scorer, precision
from pipeline.scalar_head import ScalarHead
from pipeline.trunk import final_states, trunk_of


class RewardNetwork(nn.Module):
    """Scores [B, K] of whole responses, read at each one's last token.

    Args:
        lm: a sequence classifier with one label; LoRA layers are injected into its trunk when the configuration has them.
    """

    def __init__(self, lm: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        remove_dropout(lm)
        self.layout = choose_layout(lm)
        lm.score = ScalarHead.like(lm.score)
        self.lm = lm
        object.__setattr__(self, "_adapter", None)
        if config.lora is not None:
            object.__setattr__(self, "_adapter", add_lora(trunk_of(lm), config.lora, "FEATURE_EXTRACTION"))
            lm.score.requires_grad_(True)
        if config.activation_checkpointing:
            recompute_layers(lm)

    def forward(self, batch: Batch) -> PolicyOut:
        states = final_states(self.lm, batch, self.layout)  # [M, D]
        scores = unflatten(self.lm.score(states).squeeze(-1), batch.valid)
        none = torch.zeros(batch.response_mask.shape, device=scores.device)
        return PolicyOut(logprobs=none, scores=scores)

    def merged(self) -> nn.Module:
        """The plain classifier, adapters folded into its weights (for export; ends training)."""
        if self._adapter is not None:
            merge_lora(self.lm.base_model, self._adapter)
        return self.lm


def load_reward_network(config: ModelConfig, path: str, trained: bool = False) -> RewardNetwork:
    """The reward model that training starts from: the trunk at `path` with a zero head, or a reward model as it is.

    trained: refuse a plain language model (ConfigError), whose head would be zero.
    """
    if trained and not classifies(load_config(path, config.trust_remote_code, "checkpoint_from")):
        raise ConfigError(f"checkpoint_from: {path} is no reward model; name a run of objective reward_model")
    lm = load_scorer(path, precision(config.dtype), config.attention, config.trust_remote_code)
    return RewardNetwork(lm, config)
