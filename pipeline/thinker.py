"""Language models that think before they answer: a prior is started, saved beside its backbone, loaded, and decoded with.

    <model>/prior/settings.json   what it is, and the identity of the backbone that it was trained for
                  weights.safetensors
                  assistant/      the frozen assistant, where there is one

A folder that holds a prior is a model with thoughts wherever it is loaded from; a prior beside another backbone is refused.

Left out: what a prior computes (`latent`), its training (`model`, `objectives`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Attention, ConfigError, LatentConfig, ModelConfig, RunConfig, SamplingConfig
from pipeline.contracts import Needs
from pipeline.durable import read_json, write_json
from pipeline.latent import PLACE, AssistantPrior, BlockPrior, Prior, Text, embeddings
from pipeline.model_files import fingerprint, locate
from pipeline.packing import refuses_embeddings
from pipeline.pretrained import load_causal_lm

logger = logging.getLogger(__name__)
PRIOR, SETTINGS, WEIGHTS, ASSISTANT = "prior", "settings.json", "weights.safetensors", "assistant"
SAMPLED = 1024
"""Values of each weight that go into a backbone's identity: any training moves all of them."""


# ---------------------------------------------------------------------------------------------- priors on disk


def assistant_of(config: RunConfig) -> str | None:
    """Located weights of the assistant that makes thoughts, where there is one."""
    name = config.latent.assistant
    return None if name is None else locate(name, Path(config.storage) / "cache", "latent.assistant")


def latent_identity(config: RunConfig) -> list[Any]:
    """What changes the thoughts: the section, and the assistant's weights in place of its name."""
    assistant = assistant_of(config)
    plain = config.latent.model_dump(exclude={"assistant"})
    return [plain, fingerprint(assistant, Path(config.storage) / "cache", "latent.assistant") if assistant else None]


@dataclass(frozen=True, slots=True)
class NewPrior:
    """What a prior starts from; the same on every rank."""

    latent: LatentConfig
    assistant: str | None = None  # located weights
    seed: int = 0


def new_prior(config: RunConfig) -> NewPrior | None:
    """What this configuration's prior starts from, where its objective has one."""
    return (
        None
        if config.objective.needed().latent == "none"
        else NewPrior(config.latent, assistant_of(config), config.seed)
    )


def prior_for(lm: nn.Module, path: str, model: ModelConfig, new: NewPrior | None) -> Prior | None:
    """The prior in the folder of `lm`; where there is none, a new one if that is asked for.

    Raises ConfigError where the one in the folder is not of the kind that is asked for.
    """
    if not has_prior(path):
        return None if new is None else start_prior(lm, model, new)
    prior = load_prior(lm, path, model.unpacked_attention, model.trust_remote_code)
    if new is not None and new.latent.n_latents != prior.n_latents:
        raise ConfigError(
            f"latent.n_latents: the prior in {path}, from which training goes on, has {prior.n_latents} thoughts, not "
            f"{new.latent.n_latents}; set it to {prior.n_latents}"
        )
    if new is not None and (new.assistant is not None) != isinstance(prior, AssistantPrior):
        raise ConfigError(f"latent.assistant: training goes on from the prior in {path}, which is of the other kind")
    return prior


def start_prior(lm: nn.Module, model: ModelConfig, new: NewPrior) -> Prior:
    """A new prior for this backbone, a function of `new` and the backbone alone.

    Raises ConfigError for a backbone that reads no embeddings.
    """
    if (reason := refuses_embeddings(lm)) is not None:
        raise ConfigError(
            f"model.path: {type(lm).__name__} reads no embeddings in place of tokens ({reason}), which latent thoughts are; "
            "use another model"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(new.seed)
        table, latent = lm.get_input_embeddings().weight, new.latent
        plain = {"n_latents": latent.n_latents, "size": float(table.detach().float().square().mean().sqrt())}
        if new.assistant is None:
            text = lm.config.get_text_config()
            inner = latent.inner or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
            plain |= {"inner": inner, "positions": latent.positions}
        found = _build(plain, table.shape[-1], new.assistant, model.unpacked_attention, model.trust_remote_code)
    return found.to(table.dtype)


def _build(plain: dict[str, Any], width: int, assistant: str | None, attention: Attention, trust: bool) -> Prior:
    if assistant is None:
        return BlockPrior(width, plain["inner"], plain["n_latents"], plain["size"], plain["positions"])
    helper = load_causal_lm(assistant, torch.float32, attention, trust, "latent.assistant")
    return AssistantPrior(helper, width, plain["n_latents"], plain["size"])


def save_prior(prior: Prior, lm: nn.Module, model: Path) -> None:
    """Write a trained prior into the folder of its backbone `lm`, as that was just saved there; float32."""
    from safetensors.torch import save_file

    folder = model / PRIOR
    folder.mkdir(parents=True)
    plain: dict[str, Any] = {"n_latents": prior.n_latents, "size": prior.size, "backbone": identity(lm)}
    if isinstance(prior, BlockPrior):
        plain |= {"inner": prior.up.out_features, "positions": prior.positions}
    else:
        prior.assistant.save_pretrained(folder / ASSISTANT)
    save_file({name: p.detach().float().contiguous() for name, p in prior.named_parameters()}, folder / WEIGHTS)
    write_json(folder / SETTINGS, plain)


def has_prior(path: str | Path) -> bool:
    """Whether this model thinks before it answers."""
    return (Path(path) / PRIOR / SETTINGS).is_file()


def settings_of(path: str | Path) -> dict[str, Any]:
    """What `save_prior` noted of the prior at `path`. Raises durable.Corrupt."""

    def checked(found: Any) -> dict[str, Any]:
        return {**found, "n_latents": int(found["n_latents"]), "backbone": found["backbone"]}

    return read_json(Path(path) / PRIOR / SETTINGS, checked, "export the model again")


def load_prior(lm: nn.Module, path: str | Path, attention: Attention, trust: bool, key: str = "model.path") -> Prior:
    """The prior in the folder of the backbone `lm`. Raises ConfigError about `key` where it was trained for another one."""
    from safetensors.torch import load_file

    folder, plain = Path(path) / PRIOR, settings_of(path)
    if plain["backbone"] != identity(lm):
        raise ConfigError(
            f"{key}: the prior in {folder} was trained for another backbone than the one beside it; put both back together, "
            "or remove the prior"
        )
    table = lm.get_input_embeddings().weight
    assistant = str(folder / ASSISTANT) if (folder / ASSISTANT).is_dir() else None
    prior = _build(plain, table.shape[-1], assistant, attention, trust)
    prior.load_state_dict(load_file(folder / WEIGHTS))
    return prior.to(table.dtype).to(table.device)


@torch.no_grad()
def identity(lm: nn.Module) -> str:
    """A name of a model's weights, the same in float32 and bfloat16: a digest over some values of each.

    Read before weights are partitioned. Tied weights count once.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, p in sorted(lm.named_parameters()):
        flat = p.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)].to("cpu", torch.bfloat16)
        total.update(f"{name}{list(p.shape)}".encode() + some.view(torch.int16).numpy().tobytes())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------ decoding


class Thinker(nn.Module):
    """A causal language model that reads thoughts wherever its input has a `PLACE`; else it is the model itself.

    A row's thoughts follow from its tokens before the first `PLACE`: `prompt` puts them behind a prompt.

    Args:
        n: thoughts per prompt. noise: how far a sampled thought lies from the prior's, as a share of its size.
    """

    def __init__(self, lm: nn.Module, prior: Prior, n: int, noise: float = 0.0) -> None:
        super().__init__()
        self.lm, self.prior, self.n, self.noise = lm, prior, n, noise
        self.config = lm.config
        self.train(lm.training)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """A prompt with places for thoughts behind it."""
        return [*ids, *[PLACE] * self.n]

    def get_base_model(self) -> nn.Module:
        """The language model, whose signature says which arguments there are."""
        return self.lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        streams: Sequence[torch.Generator] | None = None,
        **others: Any,
    ) -> Any:
        """As the language model's own. streams: one per row, for thoughts that are sampled."""
        places = input_ids == PLACE
        # A single token stands behind what is in the cache: on a GPU, looking at it would have to wait for it.
        if input_ids.shape[1] == 1 or not bool(places.any()):
            return self.lm(input_ids=input_ids, attention_mask=attention_mask, **others)
        embed = self.lm.get_input_embeddings()
        before = attention_mask[:, -input_ids.shape[1] :].bool() & (places.cumsum(-1) == 0)
        thoughts = self.prior(embed, Text(input_ids.clamp(min=0), before), self.n).thoughts
        if streams is not None and self.noise:
            thoughts = thoughts + self.noise * _noise(streams, thoughts)
        read = embeddings(embed, input_ids, thoughts)
        return self.lm(inputs_embeds=read, attention_mask=attention_mask, **others)


def _noise(streams: Sequence[torch.Generator], thoughts: Tensor) -> Tensor:
    """Gaussian, each row from its own stream, of each thought's own root mean square. [A, n, D]"""
    drawn = [torch.randn(thoughts.shape[1:], generator=stream, device=thoughts.device) for stream in streams]
    return torch.stack(drawn).to(thoughts.dtype) * thoughts.square().mean(-1, keepdim=True).sqrt()


def thoughts_of(path: str, sampling: SamplingConfig) -> int:
    """Thoughts per prompt with which the model at `path` is decoded."""
    if not has_prior(path):
        return 0
    return settings_of(path)["n_latents"] if sampling.n_latents is None else sampling.n_latents


def with_places(model: nn.Module, prompt: Sequence[int]) -> Sequence[int]:
    """The prompt as this model reads it."""
    return model.prompt(prompt) if isinstance(model, Thinker) else prompt


def load_thinker(
    path: str, dtype: torch.dtype, model: ModelConfig, sampling: SamplingConfig, key: str = "model.path"
) -> nn.Module:
    """The causal language model at `path` for decoding; with its prior where it has one, unless `sampling.n_latents` is 0.

    Raises ConfigError about `key`, and where more thoughts are asked for than the prior has.
    """
    lm = load_causal_lm(path, dtype, model.unpacked_attention, model.trust_remote_code, key)
    if not has_prior(path) or sampling.n_latents == 0:
        return lm
    prior = load_prior(lm, path, model.unpacked_attention, model.trust_remote_code, key)
    n = prior.n_latents if sampling.n_latents is None else sampling.n_latents
    if n > prior.most:
        raise ConfigError(f"sampling.n_latents: the prior in {path} has {prior.most} thoughts, not {n}; lower it")
    return Thinker(lm, prior, n, sampling.thought_noise).eval()


def check_steps(without: int, rows: int) -> None:
    """Raises ConfigError where no trajectory has steps that one could choose from."""
    what = f"{without} of {rows} rows have fewer than two steps before the last one"
    if without == rows:
        raise ConfigError(
            f"data.sources: {what}, among which the objective chooses; give trajectories as steps (a text is cut at `separator`), "
            "or set the weight of that term to 0"
        )
    logger.warning("data.sources: %s; nothing is chosen there", what)


def refuse_thoughts_under_kl(needs: Needs, *paths: str) -> None:
    """Raises ConfigError where an exact KL is asked of models that think: two of them need not think alike."""
    for path in paths if needs.kl != "none" else ():
        if has_prior(path):
            raise ConfigError(
                f"model.path: {path} has latent thoughts, behind which there is no exact KL to a reference; use an objective without "
                "one, or remove its prior"
            )


def check_thoughts(sampling: SamplingConfig, paths: Sequence[str]) -> None:
    """Raises ConfigError where thoughts are asked of models that have none, or more than there are."""
    asked = "n_latents" if sampling.n_latents else "thought_noise" if sampling.thought_noise else None
    if asked is not None and not any(map(has_prior, paths)):
        raise ConfigError(
            f"sampling.{asked}: {', '.join(paths)} has no prior of latent thoughts; remove the key, or name a model that has"
        )
