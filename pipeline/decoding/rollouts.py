"""Roll-outs: what a model would say behind each candidate token, all candidates of all completions as one batch.

Candidates share their prefix's cache: it is forked, never computed again. A candidate that ends the response, or that takes
the last token there is room for, is its own only roll-out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoding.choice import Filters, stream
from pipeline.decoding.contract import Tools
from pipeline.decoding.guided import Fork
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.sampling import continue_to_end


@dataclass(frozen=True, slots=True)
class Rollouts:
    """N whole responses and the candidates that they begin with."""

    owner: Tensor  # [N] int64: place of the candidate in [A·k]
    responses: list[list[int]]  # N, from the response's first token
    log_share: Tensor  # [N] float64: log of each one's probability, up to a constant per owner (0: drawn alike)


RollOut = Callable[[Tools, Fork, Prefixes], Rollouts]


def roll_out(tools: Tools, fork: Fork, prefixes: Prefixes) -> Rollouts:
    """`decoding.rollouts` samples behind each candidate (one where they are greedy: all would be equal), of up to
    `rollout_tokens` tokens, within `max_new_tokens` in all."""
    options = tools.decoding
    many = options.rollouts if options.rollout_temperature > 0 else 1
    new = min(options.rollout_tokens or tools.sampling.max_new_tokens, tools.sampling.max_new_tokens - fork.step - 1)
    width, flat = fork.candidates.shape[1], fork.candidates.flatten()
    tokens = flat.tolist()
    ends = torch.tensor(list(tools.stop_ids), dtype=torch.long, device=flat.device)
    goes_on = ~torch.isin(flat, ends) if new > 0 else torch.zeros_like(flat, dtype=torch.bool)
    behind: dict[int, list[list[int]]] = {i: [[]] for i in (~goes_on).nonzero().flatten().tolist()}
    places = goes_on.nonzero().flatten()
    if len(places):
        forked = prefixes.select(places // width)
        forked.append(flat[places])
        forked.keep(torch.arange(len(places)).repeat_interleave(many))
        names = [(place, m) for place in places.tolist() for m in range(many)]
        streams = [_stream(tools, fork, place // width, tokens[place], m, forked.device) for place, m in names]
        least = max(0, tools.sampling.min_new_tokens - fork.step - 1)
        filters = Filters(options.rollout_temperature, min_new_tokens=least)
        found = continue_to_end(forked, new, filters, tools.stop_ids, streams)
        for (place, _), (ids, _) in zip(names, found, strict=True):
            behind.setdefault(place, []).append(ids)
    owners = [place for place in range(len(tokens)) for _ in behind[place]]
    responses = [[*fork.responses[p // width], tokens[p], *ids] for p in range(len(tokens)) for ids in behind[p]]
    return Rollouts(torch.tensor(owners), responses, torch.zeros(len(owners), dtype=torch.float64))


def _stream(tools: Tools, fork: Fork, row: int, token: int, number: int, device: torch.device) -> torch.Generator:
    """Named by the token, not by its rank: two candidates that nearly tie keep their roll-outs when they change places."""
    draw = fork.draws[row]
    purpose = f"rollout/{fork.step}/{token}/{number}"
    return stream(tools.sampling.seed, draw.prompt.key, draw.copy, device, purpose)


def scored(tools: Tools, fork: Fork, rollouts: Rollouts, role: str = "scorer") -> Tensor:
    """The scores of the roll-outs' whole responses, [N] float64."""
    width = fork.candidates.shape[1]
    prompts = [fork.draws[place // width].prompt for place in rollouts.owner.tolist()]
    return tools.score(prompts, rollouts.responses, role)


def mean_by_owner(values: Tensor, log_weight: Tensor, owner: Tensor, count: int) -> Tensor:
    """Σ w·value / Σ w over each owner's own entries, w = exp(log_weight). values, log_weight, owner [N] → [count].

    A weight never leaves its owner: normalising over all would compare the owners' probabilities with each other.
    """
    top = torch.full((count,), float("-inf"), dtype=values.dtype).scatter_reduce(0, owner, log_weight, "amax")
    weight = (log_weight - top[owner]).exp()
    total = torch.zeros(count, dtype=values.dtype).index_add(0, owner, weight * values)
    return total / torch.zeros(count, dtype=values.dtype).index_add(0, owner, weight)
