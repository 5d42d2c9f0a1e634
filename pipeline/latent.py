"""Latent thoughts: vectors that a prior makes of a prompt, and that a language model reads between prompt and answer.

    [prompt | thought 1 … thought n | response 1 | … | response K]

A thought is an input embedding like any other, so it stands in the prompt's segment of a packed row and all layouts of
`trunk` take it as it is. Two priors make thoughts behind one interface:

    BlockPrior      one transformer block of random weights over the model's own input embeddings, with n trained queries
                    (LTA-Thinker, arXiv 2509.12875)
    AssistantPrior  a small frozen language model's last states at n placeholders (SoftCoT, arXiv 2502.12134)

both through a trained projection. What departs from the published code, on purpose:

- Thoughts are made of the prompt alone, in training as when decoding. There the block also sees the solution's steps in
  training: they leak into the thoughts, and are missing when it counts. Here steps may look at the prompt, never the reverse.
- A thought sees the prompt, itself and earlier thoughts: the first k of n are the k that fewer would be.
- Thoughts start at the size of the model's embeddings, and a step of the optimizer moves them by a share of that size.
- There are no markers around the thoughts.

Left out: losses (`objectives`), and models that think when they are decoded from (`thinker`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pipeline.contracts import Batch

PLACE = -1
"""In `input_ids`: a thought stands here."""

Embed = Callable[[Tensor], Tensor]
"""A language model's input embeddings, tokens [...] → [..., D]; through its module, whose weight ZeRO-3 gathers."""


class Text(NamedTuple):
    """Token rows, padded anywhere."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool


class Steps(NamedTuple):
    """One response per row, and where its steps end."""

    ids: Tensor  # [B, R] int64
    ends: Tensor  # [B, S] int64: index into R, −1 where there is no step


class Reading(NamedTuple):
    """What a prior makes of prompts and steps."""

    thoughts: Tensor  # [B, n, D]
    question: Tensor  # [B, D]: at the prompt's last token
    steps: Tensor | None = None  # [B, S, D]: at the last token of each step; meaningless where there is none


# -------------------------------------------------------------------------------------------------- priors


class BlockPrior(nn.Module):
    """Attention (one head, no mask but padding), feed-forward with ReLU, each with residual and RMSNorm behind; a projection.

    Only places that are asked for are computed: the prompt's last token, the thoughts, the steps' ends.

    Args:
        width: D of the language model. inner: width of the feed-forward layer.
        n_latents: trained queries: thoughts in training, and the most there can be.
        size: root mean square of the language model's input embeddings: the unit of all that comes in and goes out.
        positions: add sinusoids to what comes in.
    """

    def __init__(self, width: int, inner: int, n_latents: int, size: float, positions: bool = False) -> None:
        super().__init__()
        self.n_latents, self.most = n_latents, n_latents
        self.size, self.positions = size, positions
        self.queries = nn.Embedding(n_latents, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm_attention, self.norm_forward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project = nn.Linear(width, width)
        start_projection(self.project)

    def forward(self, embed: Embed, prompt: Text, n: int, steps: Steps | None = None) -> Reading:
        known = self._placed(embed(prompt.ids), place_of(prompt.mask))  # [B, P, D]
        rows = torch.arange(len(known), device=known.device)
        queries = self.queries(torch.arange(n, device=known.device)).expand(len(known), n, -1)
        asked = torch.cat([known[rows, last_of(prompt.mask)][:, None], queries], 1)  # [B, 1 + n, D]
        earlier = torch.ones(n, n, dtype=torch.bool, device=known.device).tril()
        earlier = torch.cat([torch.zeros_like(earlier[:1]), earlier]).expand(
            len(known), -1, -1
        )  # the prompt sees no thought
        seen = torch.cat([prompt.mask[:, None].expand(-1, 1 + n, -1), earlier], -1)
        made = self._block(asked, torch.cat([known, queries], 1), seen)
        if steps is None:
            return Reading(made[:, 1:], made[:, 0])
        told = self._placed(embed(steps.ids), prompt.mask.sum(-1, keepdim=True) + place_in(steps.ids))
        within = step_tokens(steps)  # [B, S, R]
        seen = torch.cat([prompt.mask[:, None].expand(-1, within.shape[1], -1), within], -1)
        ends = told[rows[:, None], steps.ends.clamp(min=0)]
        return Reading(made[:, 1:], made[:, 0], self._block(ends, torch.cat([known, told], 1), seen))

    def _placed(self, embedded: Tensor, place: Tensor) -> Tensor:
        embedded = embedded.to(self.project.weight.dtype) / self.size
        return embedded + sinusoids(place, embedded.shape[-1]).to(embedded) if self.positions else embedded

    def _block(self, asked: Tensor, known: Tensor, seen: Tensor) -> Tensor:
        """asked [B, Q, D] look at known [B, T, D] where seen [B, Q, T] → [B, Q, D], of the embeddings' size."""
        query, key, value = self.query(asked), self.key(known), self.value(known)
        heads = (x[:, None] for x in (query, key, value))
        looked = scaled_dot_product_attention(*heads, attn_mask=seen[:, None])[:, 0]
        hidden = self.norm_attention(asked + self.out(looked))
        hidden = self.norm_forward(hidden + self.down(self.up(hidden).relu()))
        return self.size * self.project(hidden)


class AssistantPrior(nn.Module):
    """A frozen language model reads `[prompt | placeholders | steps]` in causal order; a projection takes its last states.

    The placeholders are the last ids of its vocabulary, as the published code takes reserved ones. No gradient passes through
    the assistant, and it is no submodule: neither trained, nor partitioned, nor in checkpoints.
    """

    def __init__(self, assistant: nn.Module, width: int, n_latents: int, size: float) -> None:
        super().__init__()
        assistant.requires_grad_(False).eval()
        object.__setattr__(self, "assistant", assistant)
        self.n_latents, self.most = n_latents, assistant.config.get_text_config().vocab_size
        self.size = size
        self.project = nn.Linear(assistant.config.get_text_config().hidden_size, width)
        start_projection(self.project)

    def forward(self, embed: Embed, prompt: Text, n: int, steps: Steps | None = None) -> Reading:
        vocabulary = self.assistant.config.get_text_config().vocab_size
        places = (vocabulary - 1 - torch.arange(n, device=prompt.ids.device)).expand(len(prompt.ids), n)
        parts, masks = [prompt.ids, places], [prompt.mask, torch.ones_like(places, dtype=torch.bool)]
        if steps is not None:
            parts.append(steps.ids)
            masks.append(place_in(steps.ids) <= steps.ends.amax(-1, keepdim=True))
        states = self._states(torch.cat(parts, 1), torch.cat(masks, 1))
        rows, width = torch.arange(len(states), device=states.device), prompt.ids.shape[1]
        question, thoughts = states[rows, last_of(prompt.mask)], states[:, width : width + n]
        if steps is None:
            return Reading(self._projected(thoughts), self._projected(question))
        ends = states[rows[:, None], width + n + steps.ends.clamp(min=0)]
        return Reading(*(self._projected(x) for x in (thoughts, question, ends)))

    @torch.no_grad()
    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        rows = {"input_ids": ids.clamp(min=0), "attention_mask": mask.long(), "position_ids": place_of(mask)}
        return self.assistant.base_model(**rows, use_cache=False).last_hidden_state

    def _projected(self, states: Tensor) -> Tensor:
        return self.size * self.project(states.to(self.project.weight.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The assistant goes where the prior goes, and takes its precision."""
        self.assistant._apply(fn, recurse)
        return super()._apply(fn, recurse)


Prior = BlockPrior | AssistantPrior


def start_projection(layer: nn.Linear) -> None:
    """What is of unit size before it is of unit size behind it."""
    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------------------- in a row


def read(prior: Prior, embed: Embed, batch: Batch, n: int, steps: bool) -> Reading:
    """What the prior makes of the prompts of packed rows and, if asked, of the steps of their best responses."""
    asked = batch.segment == 0
    width = int(asked.sum(-1).max())
    prompt = Text(batch.input_ids[:, :width], asked[:, :width])
    if not steps:
        return prior(embed, prompt, n)
    assert batch.step_ends is not None, "rows of trajectories know where their steps end"
    return prior(embed, prompt, n, Steps(batch.response_ids[:, 0], batch.step_ends[:, 0]))


def insert(batch: Batch, n: int) -> Batch:
    """The same rows with n `PLACE`s behind each prompt: part of the prompt's segment, seen by every response."""
    prompt = (batch.segment == 0).sum(-1, keepdim=True)  # [B, 1]
    target = place_in(batch.input_ids) + n * (place_in(batch.input_ids) >= prompt)  # [B, T]
    places = prompt + torch.arange(n, device=prompt.device)  # [B, n]
    rows, width = batch.input_ids.shape

    def spread(values: Tensor, fill: int) -> Tensor:
        return values.new_full((rows, width + n), fill).scatter(1, target, values)

    positions = batch.position_ids + n * (batch.segment > 0)
    behind = batch.predictor >= prompt[..., None] - 1  # the prompt's last token hands over to the last thought
    return replace(
        batch,
        input_ids=spread(batch.input_ids, PLACE),
        position_ids=spread(positions, 0).scatter(1, places, places),
        segment=spread(batch.segment, 0),
        predictor=batch.predictor + n * behind,
    )


def embeddings(embed: Embed, input_ids: Tensor, thoughts: Tensor) -> Tensor:
    """Tokens [B, T] with n `PLACE`s a row, thoughts [B, n, D] → [B, T, D]."""
    embedded = embed(input_ids.clamp(min=0))
    return embedded.masked_scatter((input_ids == PLACE)[..., None], thoughts.to(embedded.dtype))


def mean_texts(embed: Embed, steps: Steps) -> Tensor:
    """Mean input embedding of each step's tokens, 0 where there is none; no gradient. [B, S, D] float32"""
    own = step_tokens(steps).float()
    return (own @ embed(steps.ids).detach().float()) / own.sum(-1, keepdim=True).clamp(min=1)


def step_tokens(steps: Steps) -> Tensor:
    """True at the tokens of each step: behind the end of the one before, up to its own. [B, S, R]"""
    start = torch.cat([torch.full_like(steps.ends[:, :1], -1), steps.ends[:, :-1]], 1)
    place = place_in(steps.ids)[:, None]
    return (place > start[..., None]) & (place <= steps.ends[..., None])


def place_in(ids: Tensor) -> Tensor:
    """0, 1, … along the last dimension, for every row. [B, L] → [1, L]"""
    return torch.arange(ids.shape[1], device=ids.device)[None]


def place_of(mask: Tensor) -> Tensor:
    """Each token's place among its row's own. [B, L] bool → int64, 0 on leading padding"""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def last_of(mask: Tensor) -> Tensor:
    """Index of each row's last token. [B, L] bool → [B]"""
    return torch.where(mask, place_in(mask), 0).amax(-1)


def sinusoids(place: Tensor, width: int) -> Tensor:
    """The encoding of arXiv 1706.03762, §3.5. [B, L] → [B, L, D] float32"""
    rates = torch.exp(torch.arange(0, width, 2, device=place.device) * (-math.log(10_000.0) / width))
    angle = place[..., None].float() * rates
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :width]
