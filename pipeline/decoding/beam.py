"""Likelihood search: the responses of highest log-probability under the aligned policy.

An aligned policy is a soft Q-function (arXiv 2404.12358): Σ log π is, up to a constant, the sum of its advantages, so that search
for likelihood under it is search for reward. The rules are those of transformers' `generate(num_beams=…)`, to the same result:

- In each step the `beams` best unfinished continuations go on; one that ends is kept if it is among the `beams` best of all.
- A finished response of n tokens (EOS included) scores Σ log π / n^length_penalty.
- A prompt is done when `beams` responses are finished and, by `early_stopping`: true: at once; false: when the best
  unfinished one, scored at its present length, is no better than the worst of them; never: when it could not become better
  even at `max_new_tokens` (which is what a positive length penalty favours).
- What is unfinished at `max_new_tokens` counts as finished.

Done prompts leave the batch, which transformers keeps to the end; a prompt runs through the model once, not once per beam.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import ConfigError, DecodingConfig
from pipeline.decoding.choice import barred
from pipeline.decoding.contract import Completion, Prompt, Tools, check_lengths, portions
from pipeline.decoding.prefixes import Prefixes


class _Beam(NamedTuple):
    """A continuation that goes on."""

    total: float  # Σ log π; −inf: there is no such beam, and nothing behind it is ever chosen
    token: int
    parent: int  # the beam that it continues


@dataclass(slots=True)
class _Search:
    """What is known about one prompt."""

    place: int  # in the caller's list
    responses: list[list[int]]  # of the unfinished beams, best first
    logprobs: list[list[float]]
    finished: list[Completion] = field(default_factory=list)  # best first

    def advance(self, table: Iterable[_Row], ends: set[int], options: DecodingConfig, last: bool) -> list[_Beam]:
        """Finish what ended, let the `beams` best others go on. table: continuations, best first."""
        beams, grown = [], []
        for rank, (total, token, parent, own) in enumerate(table):
            if total == -math.inf or len(beams) == options.beams:
                break
            response, logprobs = [*self.responses[parent], token], [*self.logprobs[parent], own]
            if not last and token not in ends:
                beams.append(_Beam(total, token, parent))
                grown.append((response, logprobs))
            elif rank < options.beams:
                score = total / len(response) ** options.length_penalty
                self.finished.append(Completion(response, logprobs, score, {"search_score": score}))
        self.finished = sorted(self.finished, key=_score, reverse=True)[: options.beams]
        missing = options.beams - len(beams)
        self.responses = [response for response, _ in grown] + [[]] * missing
        self.logprobs = [logprobs for _, logprobs in grown] + [[]] * missing
        return beams + [_Beam(-math.inf, 0, 0)] * missing

    def goes_on(self, best: float, length: int, options: DecodingConfig, longest: int) -> bool:
        """Whether something better may still be found. best: Σ log π of the best beam; length: its tokens."""
        if best == -math.inf:
            return False
        if len(self.finished) < options.beams:
            return True
        if options.early_stopping is True:
            return False
        hoped = longest if options.early_stopping == "never" and options.length_penalty > 0 else length
        return best / hoped**options.length_penalty > _score(self.finished[-1])


def _score(completion: Completion) -> float:
    assert completion.score is not None
    return completion.score


def search(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """The `per_prompt` best responses to each prompt, best first. `score`: Σ log π / n^length_penalty.

    Raises ConfigError where more responses are asked for than there are beams.
    """
    options, model = tools.decoding, tools.model("policy")
    if tools.sampling.per_prompt > options.beams:
        raise ConfigError(
            f"sampling.per_prompt: {options.beams} beams find no {tools.sampling.per_prompt} responses; raise decoding.beams"
        )
    check_lengths(model.config, prompts, tools.sampling.max_new_tokens)
    found: dict[int, list[Completion]] = {}
    for portion in portions(prompts, tools.sampling.batch_size // options.beams):
        with torch.inference_mode():
            prefixes = Prefixes.of(model, [prompts[p].ids for p in portion], tools.pad_id)
            for done in _search_batch(tools, prefixes, portion):
                found[done.place] = _told(done, tools.sampling.per_prompt)
        tools.told(len(portion))
    return [completion for p in range(len(prompts)) for completion in found[p]]


def _told(prompt: _Search, count: int) -> list[Completion]:
    """The best `count`; where the whole tree has fewer responses, the rest say so."""
    found = prompt.finished[:count]
    reason = f"there are only {len(found)} responses of at most this length"
    return found + [Completion([], [], failure=reason)] * (count - len(found))


def _search_batch(tools: Tools, prefixes: Prefixes, places: list[int]) -> list[_Search]:
    """Search from B prefixes. In the loop A ≤ B prompts are open, with W beams each: 1 at first, then `beams`."""
    options, new, stops = tools.decoding, tools.sampling.max_new_tokens, set(tools.stop_ids)
    ends = torch.tensor(list(tools.stop_ids), dtype=torch.long, device=prefixes.device)
    totals = prefixes.logits.new_zeros(len(places), 1)  # [A, W] Σ log π
    open_, done = [_Search(place, [[]], [[]]) for place in places], []
    for step in range(new):
        last, width = step + 1 == new, totals.shape[1]
        logits = barred(prefixes.logits, ends) if step < tools.sampling.min_new_tokens else prefixes.logits
        tables = _best(logits, prefixes.logits.logsumexp(-1), totals, options.beams * max(2, 1 + len(ends)))
        rows: list[int] = []
        going: list[tuple[_Search, list[_Beam]]] = []
        for a, (prompt, table) in enumerate(zip(open_, tables, strict=True)):
            beams = prompt.advance(table, stops, options, last)
            if last or not prompt.goes_on(beams[0].total, step + 1, options, new):
                done.append(prompt)
                continue
            going.append((prompt, beams))
            rows += [a * width + beam.parent for beam in beams]
        if not going:
            break
        open_ = [prompt for prompt, _ in going]
        totals = totals.new_tensor([[beam.total for beam in beams] for _, beams in going])
        prefixes.keep(torch.tensor(rows))
        prefixes.append(torch.tensor([beam.token for _, beams in going for beam in beams]))
    return done


_Row = tuple[float, int, int, float]
"""Σ log π, token, parent (beam) and the token's own log-probability of one continuation."""


def _best(logits: Tensor, norm: Tensor, totals: Tensor, count: int) -> list[Iterator[_Row]]:
    """The `count` best continuations of each prompt's beams, best first. logits [A·W, V], norm [A·W], totals [A, W].

    Each beam's best are found among raw logits: normalising the whole vocabulary changes no order within a beam.
    """
    rows = len(totals)
    own, token = logits.topk(min(count, logits.shape[-1]), dim=-1)  # [A·W, C]
    own = own - norm[:, None]
    whole = (totals.flatten()[:, None] + own).view(rows, -1)  # [A, W·C]
    best, place = whole.topk(min(count, whole.shape[-1]), dim=-1)
    parts = (best, token.view(rows, -1).gather(-1, place), place // own.shape[-1], own.view(rows, -1).gather(-1, place))
    return [zip(*table, strict=True) for table in zip(*(part.tolist() for part in parts), strict=True)]
