"""The value network V(s): what a state is still worth, for each token of a response before it is chosen.

Either a transformer of its own or a linear head on the policy's states. Both start at V = 0 (the head is zero) from the
policy's weights, and both are trained by an engine of their own.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pipeline.config import ConfigError, RunConfig
from pipeline.contracts import Batch, PolicyOut
from pipeline.model import add_lora, merge_lora, recompute_layers, remove_dropout, unflatten
from pipeline.packing import choose_layout
from pipeline.pretrained import load_backbone, load_config, precision
from pipeline.scalar_head import ScalarHead
from pipeline.trunk import Layout, token_states

HEAD = "value_head.safetensors"
CRITIC = "critic"
"""Folder of the critic within an exported model."""


class Critic(nn.Module):
    """V(s) of the state before each trained token. (batch, out) → [B, K, R] float32, 0 where masked.

    Args:
        width: D, the states' size.
        trunk: a transformer without output head, or None: the head reads the policy's states (`PolicyOut.states`),
            through which no gradient flows back.
    """

    def __init__(self, width: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.layout: Layout = "flat"  # a head alone computes no states
        if trunk is not None:
            remove_dropout(trunk)
            self.layout = choose_layout(trunk)
        self.head = ScalarHead(width)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, out: PolicyOut) -> Tensor:
        if self.trunk is not None:
            states = token_states(self.trunk, batch, self.layout)
        else:
            assert out.states is not None, "the policy keeps its states for a value head"
            states = out.states
        return unflatten(self.head(states).squeeze(-1), batch.response_mask)


def load_critic(config: RunConfig, path: str) -> Critic:
    """The critic of a run that starts from the weights at `path`; its head is zero."""
    settings, dtype = config.model, precision(config.model.dtype)
    if config.critic.architecture == "head":
        width = load_config(path, settings.trust_remote_code).get_text_config().hidden_size
        return Critic(width).to(dtype)
    trunk = load_backbone(path, dtype, settings.attention, settings.trust_remote_code)
    critic = Critic(trunk.config.get_text_config().hidden_size, trunk).to(dtype)
    if settings.lora is not None:
        object.__setattr__(critic, "adapter", add_lora(trunk, settings.lora, "FEATURE_EXTRACTION"))
    if settings.activation_checkpointing:
        recompute_layers(trunk)
    return critic


def merge_critic(critic: Critic) -> None:
    """Fold the trunk's adapters, if it has some, into its weights (for export; ends training)."""
    adapter = getattr(critic, "adapter", None)
    if critic.trunk is not None and adapter is not None:
        merge_lora(critic.trunk, adapter)


def save_critic(critic: Critic, folder: Path) -> None:
    """Write a trained and merged critic as a folder that `load_trained_critic` reads: the trunk, and the head."""
    from safetensors.torch import save_file

    if critic.trunk is not None:
        critic.trunk.save_pretrained(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in critic.head.named_parameters()}, folder / HEAD)


def load_trained_critic(config: RunConfig, folder: Path) -> Critic:
    """What `save_critic` wrote. Raises ConfigError when there is no critic in `folder`."""
    from safetensors.torch import load_file

    if not (folder / HEAD).is_file():
        raise ConfigError(
            f"checkpoint_from: {folder.parent} holds no critic, which this objective is evaluated with; name a run of it"
        )
    weights, dtype = load_file(folder / HEAD), precision(config.model.dtype)
    width = weights["weight"].shape[1]
    trunk = None
    if (folder / "config.json").is_file():
        trunk = load_backbone(str(folder), dtype, config.model.attention, config.model.trust_remote_code)
    critic = Critic(width, trunk)
    critic.head.load_state_dict(weights)
    return critic.to(dtype)
