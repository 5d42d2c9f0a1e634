"""A token MDP in which an environment speaks between the policy's tokens: its tokens are drawn, nobody chooses them.

The optimum is then no longer π_ref e^{r/β} over whole trajectories, which would bend the environment's dice, too:
V*(s) is the plain mean over its tokens, and the soft maximum over the policy's.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tests.oracle.mdp import TokenMdp


class TurnsMdp(TokenMdp):
    """Policy, environment, policy: the tokens at depth 1 are drawn from `ref_logits`, whatever the policy is."""

    def __init__(self, stops: bool, beta: float = 0.5) -> None:
        super().__init__(vocabulary=3, horizon=3, beta=beta, seed=5, stops=stops)
        self.policy_moves = self.depth != 1

    @cached_property
    def soft_values(self) -> Tensor:
        """V*(s), by recursion from the leaves. [X, S]"""
        values = torch.zeros(self.prompts, len(self.next_state), dtype=torch.float64)
        reference = self.ref_logits.log_softmax(-1)
        for state in reversed(range(len(self.next_state))):
            q = self.token_reward[:, state] + self.after(values)[:, state]  # Q*(s, a) [X, V]
            chosen = self.beta * (reference[:, state] + q / self.beta).logsumexp(-1)
            drawn = (reference[:, state].exp() * q).sum(-1)
            values[:, state] = chosen if self.policy_moves[state] else drawn
        return values

    @cached_property
    def optimum(self) -> Tensor:
        """log of how often π* and the environment make each trajectory. [X, N]"""
        advantage = self.token_reward + self.after(self.soft_values) - self.soft_values[..., None]
        return self.path_sum(self.with_environment(self.ref_logits.log_softmax(-1) + advantage / self.beta))

    def with_environment(self, policy: Tensor) -> Tensor:
        """The table of log-probabilities [X, S, V] with the environment's own at its states."""
        return torch.where(self.policy_moves[:, None], policy, self.ref_logits.log_softmax(-1))

    def objective(self, policy: Tensor) -> Tensor:
        """E[Σ r − β Σ ρ] over all listed trajectories, for a table of log-probabilities [X, S, V] → [X]."""
        made, reference = self.with_environment(policy), self.ref_logits.log_softmax(-1)
        gain = self.reward - self.beta * self.path_sum(made - reference)  # the environment's ratio is 0
        return (self.path_sum(made).exp() * gain).sum(-1)
