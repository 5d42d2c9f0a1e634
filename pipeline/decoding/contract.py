"""What every decoder is given and what it gives back.

A decoder is a function `decode(tools, prompts) -> completions`, `tools.sampling.per_prompt` of them for each prompt, those of
the first prompt first. It names the roles of the models it needs in its line of `DECODERS`. Each completion is a function of
the models, the settings, its prompt, the prompt's key and its own number alone: batches and workers do not matter.

Left out: loading models and scorers (`loading`), and where prompts come from and completions go (`pieces`, `stage`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, DecodingConfig, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Role = Literal["policy", "reference", "baseline", "base", "scorer", "baseline_scorer"]
"""policy: the aligned model that is decoded from. reference: the model it was aligned from (SFT). baseline: a model already
aligned, which makes roll-outs. base: another model of the same vocabulary, for `proxy`. The scorers score whole responses."""


class Prompt(NamedTuple):
    """One prompt to continue."""

    ids: Sequence[int]  # [P]
    key: int  # names its random streams


@dataclass(frozen=True, slots=True)
class Completion:
    """One decoded response."""

    token_ids: list[int]  # [R], with the EOS that ended it, if one did
    logprobs: list[float]  # [R] nats, under what was decoded from: no temperature, no filter
    score: float | None = None  # what the decoder ranked it by, where it ranks
    details: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None  # why there is none: the row goes to the quarantine file


Score = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], Tensor]
"""n prompts and a response (token ids) to each → scores [n] float64, nan where the scorer failed."""


SCORER_FAILED = "the scorer failed"
"""How the failure of a completion begins that a scorer is to blame for."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Models and settings of one decoder."""

    sampling: SamplingConfig
    decoding: DecodingConfig
    stop_ids: Sequence[int]  # tokens that end a response
    pad_id: int  # any token: it is masked wherever it stands
    models: Mapping[str, nn.Module]  # by role
    scorers: Mapping[str, Score] = field(default_factory=dict)  # by role
    beta: float | None = None  # strength of the leash that the baseline was aligned with
    answer: Callable[[Sequence[int]], str | None] | None = None  # what a response's answer is, where it has one
    progress: Callable[[int], None] | None = None  # is told the number of completions after each batch
    sampler: Sampler | None = None  # draws from the policy in place of `sampling`'s own loop

    def model(self, role: str) -> nn.Module:
        """The model in this role, ready for inference."""
        found = self.models[role]
        assert not found.training, "dropout would change the distribution: call model.eval() first"
        return found

    def score(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], role: str = "scorer") -> Tensor:
        """Scores [n] float64, nan where the scorer failed; what occurs several times is scored once."""
        names = [(id(prompt.ids), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        place = {name: i for i, name in reversed(list(enumerate(names)))}
        distinct = sorted(place.values())
        scores = self.scorers[role]([prompts[i] for i in distinct], [responses[i] for i in distinct])
        back = {i: n for n, i in enumerate(distinct)}
        return scores.double()[torch.tensor([back[place[name]] for name in names], dtype=torch.long)]

    def told(self, completions: int) -> None:
        """Report progress."""
        if self.progress is not None:
            self.progress(completions)


Sampler = Callable[[Tools, Sequence[Prompt], int], dict[tuple[int, int], Completion]]
"""(tools, prompts, completions of each) → completions by (place of the prompt, copy)."""

Decode = Callable[[Tools, Sequence[Prompt]], list[Completion]]


class Decoder(NamedTuple):
    """One entry of `DECODERS`."""

    decode: Decode
    needs: frozenset[Role]
    logprobs_of: Role | None = None
    """The model whose log-probabilities the completions carry; None: a mixture of the decoder's own."""


def check_lengths(config: PreTrainedConfig, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Raises ConfigError for an empty prompt, or one that leaves no room in the model's context."""
    for place, prompt in enumerate(prompts):
        reason = unusable(prompt.ids, context_of(config), new_tokens)
        if reason is not None:
            raise ConfigError(f"prompt {place}: {reason}")


def context_of(config: PreTrainedConfig, thoughts: int = 0) -> int | None:
    """Positions that a model knows, less those of its thoughts; None: no bound."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if known is None else known - thoughts


def unusable(ids: Sequence[int], context: int | None, new_tokens: int) -> str | None:
    """Why this prompt cannot be continued by `new_tokens`, or None."""
    if not ids:
        return "it has no tokens to continue; begin it with the tokenizer's BOS"
    if context is not None and len(ids) + new_tokens > context:
        return (
            f"{len(ids)} tokens + {new_tokens} new ones exceed the model's context of {context};"
            " shorten the prompt or lower sampling.max_new_tokens"
        )
    return None


def portions(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Places of the prompts, `size` (at least one) at a time: longest first, so that batches hold little padding, and a batch
    too large for the memory shows at once."""
    size = max(1, size)
    order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p].ids))
    return [order[start : start + size] for start in range(0, len(order), size)]
