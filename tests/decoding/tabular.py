"""The tabular token MDP behind the call of a transformers model: decoders run on it as they are, in float64, and what they
should find is known by enumeration.

A prompt is the one token V + x, responses are tokens below V. The model's cache is the decoders' own and holds the tokens
seen, so that padding, forking and leaving the batch are part of what is tested. Responses of H tokens end by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pipeline.config import DecodingConfig, SamplingConfig
from pipeline.decoding.contract import Prompt, Score, Tools
from pipeline.decoding.guided import Fork
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.rollouts import Rollouts
from tests.oracle.mdp import STOP, TokenMdp


class TabularLM(nn.Module):
    """A language model whose next-token logits are a table [X, S, V]."""

    def __init__(self, mdp: TokenMdp, logits: Tensor) -> None:
        from transformers import LlamaConfig

        super().__init__()
        self.mdp = mdp
        self.table = nn.Parameter(logits, requires_grad=False)
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=mdp.horizon + 1)
        self.forwards = 0
        self.eval()

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache) -> SimpleNamespace:
        """Logits [A, 1, V] of the last position, from the tokens in the cache alone."""
        self.forwards += 1
        states = input_ids[:, None, :, None].double()
        seen = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()  # [A, T]
        assert seen.shape == attention_mask.shape
        assert (position_ids[:, -1] == attention_mask.sum(-1) - 1).all()
        rows = [tokens[mask.bool()].tolist() for tokens, mask in zip(seen, attention_mask, strict=True)]
        nothing = torch.zeros(self.mdp.vocabulary, dtype=torch.float64)  # a row that ended may stay for a few steps
        logits = [
            nothing if self._ended(row[1:]) else self.table[row[0] - self.mdp.vocabulary, state_of(self.mdp, row[1:])]
            for row in rows
        ]
        return SimpleNamespace(logits=torch.stack(logits)[:, None])

    def _ended(self, response: list[int]) -> bool:
        return any(tuple(response[: i + 1]) in self.mdp.responses for i in range(len(response)))


def state_of(mdp: TokenMdp, response: Sequence[int]) -> int:
    """The state behind an unfinished response."""
    state = 0
    for token in response:
        state = int(mdp.next_state[state, token])
        assert state >= 0, f"{response} goes on behind its end"
    return state


def prompts_of(mdp: TokenMdp) -> list[Prompt]:
    return [Prompt([mdp.vocabulary + x], key=x) for x in range(mdp.prompts)]


def scorer(mdp: TokenMdp, table: Tensor) -> Score:
    """Σ of a reward table [X, S, V] along each response or beginning of one."""

    def score(prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Tensor:
        totals = []
        for prompt, response in zip(prompts, responses, strict=True):
            state, total = 0, torch.zeros((), dtype=torch.float64)
            for token in response:
                total = total + table[prompt.ids[0] - mdp.vocabulary, state, token]
                state = int(mdp.next_state[state, token])
            totals.append(total)
        return torch.stack(totals)

    return score


def tools(mdp: TokenMdp, models: dict[str, Tensor], scorers: dict[str, Tensor] | None = None, **settings) -> Tools:
    """Tools from tables; settings are those of `sampling` and `decoding` alike. Every token is a candidate by default."""
    given = {"candidates": mdp.vocabulary, "max_new_tokens": mdp.horizon, "batch_size": 10**6, **settings}
    sampling = {name: given.pop(name) for name in list(given) if name in SamplingConfig.model_fields}
    return Tools(
        SamplingConfig(**sampling),
        DecodingConfig(**given),
        [STOP] if (mdp.next_state[0, STOP] < 0).all() else [],
        0,
        {role: TabularLM(mdp, table) for role, table in models.items()},
        {role: scorer(mdp, table) for role, table in (scorers or {}).items()},
        beta=mdp.beta,
    )


def every_rollout(tools: Tools, fork: Fork, prefixes: Prefixes) -> Rollouts:
    """All continuations of each candidate, weighted by their probability under the prefixes' own model."""
    model = prefixes.model
    mdp, logprobs = model.mdp, model.table.log_softmax(-1)
    owner, responses, share = [], [], []
    for a, (draw, begun) in enumerate(zip(fork.draws, fork.responses, strict=True)):
        for rank, token in enumerate(fork.candidates[a].tolist()):
            start = [*begun, token]
            for response in mdp.responses:
                if list(response[: len(start)]) == start:
                    owner.append(a * fork.candidates.shape[1] + rank)
                    responses.append(list(response))
                    share.append(tail(mdp, logprobs[draw.prompt.ids[0] - mdp.vocabulary], response, len(start)))
    return Rollouts(torch.tensor(owner), responses, torch.stack(share))


def tail(mdp: TokenMdp, logprobs: Tensor, response: Sequence[int], start: int) -> Tensor:
    """log-probability of a response's tokens from place `start` on; logprobs [S, V]."""
    return sum(
        (logprobs[state_of(mdp, response[:i]), response[i]] for i in range(start, len(response))),
        torch.zeros((), dtype=torch.float64),
    )


def values_after(mdp: TokenMdp, policy: Tensor, reward: Tensor) -> Tensor:
    """E_{τ ~ policy(·|s, z)}[r(x, whole response)] by enumeration; policy log-probs and reward [X, S, V] → [X, S, V]."""
    total = torch.zeros_like(policy)
    mass = torch.zeros_like(policy)
    paths = mdp.path_sum(reward)
    for n, response in enumerate(mdp.responses):
        for i, token in enumerate(response):
            state = state_of(mdp, response[:i])
            for x in range(mdp.prompts):
                chance = tail(mdp, policy[x], response, i + 1).exp()
                total[x, state, token] += chance * paths[x, n]
                mass[x, state, token] += chance
    return total / mass
