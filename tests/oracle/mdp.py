"""A token MDP so small that every response can be listed: the optimum is known, not estimated.

Everything is float64. X prompts share one tree of responses over V tokens: token 0 ends a response, and so does
length H. N responses, S states (prefixes that go on). Reference and rewards are random, of their own for each prompt.

What is claimed about objectives is in `test_oracle.py`; here are the tables that the claims are checked against, each
by enumeration of all responses where possible, so that a recursion is never compared with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

STOP = 0
"""Token that ends a response."""


class TokenMdp:
    """The tree of responses, a reference policy and per-token rewards. Without `stops` all responses have H tokens."""

    def __init__(
        self,
        vocabulary: int = 3,
        horizon: int = 3,
        beta: float = 0.5,
        prompts: int = 2,
        seed: int = 0,
        stops: bool = True,
    ) -> None:
        self.vocabulary, self.horizon, self.beta, self.prompts = vocabulary, horizon, beta, prompts
        prefixes: list[tuple[int, ...]] = [()]
        self.responses: list[tuple[int, ...]] = []
        index = {(): 0}
        self.next_state = torch.empty(0, vocabulary, dtype=torch.long)  # [S, V]: −1 where the response is complete
        for prefix in prefixes:  # grows while it is walked: parents come before children
            row = torch.full((1, vocabulary), -1)
            for token in range(vocabulary):
                longer = (*prefix, token)
                if (stops and token == STOP) or len(longer) == horizon:
                    self.responses.append(longer)
                else:
                    row[0, token] = index[longer] = len(prefixes)
                    prefixes.append(longer)
            self.next_state = torch.cat([self.next_state, row])
        self.depth = torch.tensor([len(prefix) for prefix in prefixes])  # [S]
        self.policy_moves = torch.ones(len(prefixes), dtype=torch.bool)  # [S]: whose token comes next (see `turns`)
        rng = torch.Generator().manual_seed(seed)
        shape = (prompts, len(prefixes), vocabulary)
        self.ref_logits = torch.randn(shape, generator=rng, dtype=torch.float64)  # [X, S, V]
        step = torch.randn(shape, generator=rng, dtype=torch.float64)
        self.token_reward = torch.where(self.next_state < 0, step, 0.5 * step)  # [X, S, V]
        self.length = torch.tensor([len(response) for response in self.responses])  # [N]

    @property
    def size(self) -> int:
        """N, how many responses there are."""
        return len(self.responses)

    def path_sum(self, table: Tensor) -> Tensor:
        """table [X, S, V] → [X, N]: its entries summed along each response."""
        sums = []
        for response in self.responses:
            state, total = 0, torch.zeros(len(table), dtype=table.dtype)
            for token in response:
                total = total + table[:, state, token]
                state = int(self.next_state[state, token])
            sums.append(total)
        return torch.stack(sums, dim=1)

    def sequence_logprob(self, logits: Tensor) -> Tensor:
        """logits [X, S, V] → log π(y|x) [X, N]."""
        return self.path_sum(logits.log_softmax(-1))

    @cached_property
    def ref_logprob(self) -> Tensor:
        """log π_ref(y|x). [X, N]"""
        return self.sequence_logprob(self.ref_logits)

    @cached_property
    def reward(self) -> Tensor:
        """r(x, y), the sum of the token rewards. [X, N]"""
        return self.path_sum(self.token_reward)

    @cached_property
    def preference(self) -> Tensor:
        """Bradley–Terry: p[x, i, j] = σ(r_i − r_j), how often y_i wins over y_j. [X, N, N]"""
        return torch.sigmoid(self.reward[:, :, None] - self.reward[:, None, :])

    @cached_property
    def optimum(self) -> Tensor:
        """log π*(y|x), π* ∝ π_ref e^{r/β}, normalised over the list of all responses. [X, N]"""
        return (self.ref_logprob + self.reward / self.beta).log_softmax(-1)

    def conditionals(self, logprob: Tensor) -> Tensor:
        """log π(y|x) [X, N] → log π(token | state) [X, S, V], by adding up the responses behind each token."""
        behind = torch.full((self.prompts, *self.next_state.shape), -torch.inf, dtype=torch.float64)
        for n, response in enumerate(self.responses):
            state = 0
            for token in response:
                behind[:, state, token] = torch.logaddexp(behind[:, state, token], logprob[:, n])
                state = int(self.next_state[state, token])
        return behind.log_softmax(-1)

    @cached_property
    def soft_values(self) -> Tensor:
        """V*(s) = β log Σ_a π_ref(a|s) e^{(r + V*(s'))/β}, by the soft Bellman recursion from the leaves. [X, S]"""
        values = torch.zeros(self.prompts, len(self.next_state), dtype=torch.float64)
        for state in reversed(range(len(self.next_state))):
            q = self.token_reward[:, state] + self.after(values)[:, state]  # Q*(s, a) [X, V]
            logits = self.ref_logits[:, state].log_softmax(-1) + q / self.beta
            values[:, state] = self.beta * logits.logsumexp(-1)
        return values

    def after(self, values: Tensor) -> Tensor:
        """V [X, S] → V(s ⊕ a) [X, S, V]; 0 behind a complete response."""
        return torch.where(self.next_state < 0, 0.0, values[:, self.next_state.clamp(min=0)])

    def values_by_enumeration(self) -> Tensor:
        """V*(s) = β log E_{π_ref}[e^{(rewards still to come)/β} | s] over the listed responses. [X, S]"""
        total = torch.full((self.prompts, len(self.next_state)), -torch.inf, dtype=torch.float64)
        ref = self.ref_logits.log_softmax(-1)
        for response in self.responses:
            states, state = [], 0
            for token in response:
                states.append(state)
                state = int(self.next_state[state, token])
            score = torch.zeros(self.prompts, dtype=torch.float64)
            for state, token in zip(reversed(states), reversed(response), strict=True):
                score = score + ref[:, state, token] + self.token_reward[:, state, token] / self.beta
                total[:, state] = torch.logaddexp(total[:, state], score)
        return self.beta * total


def normalised(logprob_at: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The log-probabilities [X, N] that sum to one among `logprob_at(c)`, c [X, 1], falling in c: by bisection.

    `low` must give a sum above one and `high` one below, each [X, 1].
    """
    for _ in range(200):
        middle = (low + high) / 2
        above = logprob_at(middle).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return logprob_at((low + high) / 2)


# f′ of the papers' Table, its inverse and the supremum of its range; u = π/π_ref.
F_PRIME_INVERSE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda z, a: (z - 1).exp(),  # f′ = log u + 1
    "forward_kl": lambda z, a: -1 / z,  # f′ = −1/u
    "jensen_shannon": lambda z, a: z.exp() / (2 - z.exp()),  # f′ = log(2u/(1 + u))
    "alpha": lambda z, a: (1 - a * z) ** (-1 / a),  # f′ = (1 − u^{−α})/α
}
F_PRIME_AT_ONE = {"reverse_kl": 1.0, "forward_kl": -1.0, "jensen_shannon": 0.0, "alpha": 0.0}
F_PRIME_SUPREMUM: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda a: 100.0,  # unbounded: e^{99} times as likely is out of reach here
    "forward_kl": lambda a: 0.0,
    "jensen_shannon": lambda a: torch.tensor(2.0, dtype=torch.float64).log().item(),
    "alpha": lambda a: 1 / a,
}


def f_optimum(mdp: TokenMdp, divergence: str, alpha: float) -> Tensor:
    """argmax E_π[r] − β D_f(π ‖ π_ref): u = (f′)^{−1}((r − λ)/β), λ by bisection so that Σ π_ref u = 1. log π [X, N]"""
    best, worst = mdp.reward.max(-1, keepdim=True).values, mdp.reward.min(-1, keepdim=True).values
    at_one, supremum = F_PRIME_AT_ONE[divergence], F_PRIME_SUPREMUM[divergence](alpha)

    def logprob(multiplier: Tensor) -> Tensor:
        u = F_PRIME_INVERSE[divergence]((mdp.reward - multiplier) / mdp.beta, alpha)
        return mdp.ref_logprob + u.log()

    # All u ≤ 1 at `high`; at `low` all u ≥ 1, or the best response's u is infinite.
    high = best - mdp.beta * at_one
    low = torch.maximum(worst - mdp.beta * at_one, best - mdp.beta * supremum)
    return normalised(logprob, low, high)


def papers_f(u: Tensor, divergence: str, alpha: float) -> Tensor:
    """f(u) of the paper, any shape."""
    return {
        "reverse_kl": u * u.log(),
        "forward_kl": -u.log(),
        "jensen_shannon": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
    }[divergence]


def f_divergence(logp: Tensor, logq: Tensor, divergence: str, alpha: float) -> Tensor:
    """D_f(p ‖ q) = Σ q f(p/q) with the paper's f; log-probabilities [X, N] → [X]."""
    return (logq.exp() * papers_f((logp - logq).exp(), divergence, alpha)).sum(-1)


def kl(logp: Tensor, logq: Tensor) -> float:
    """KL(p ‖ q) in nats of log-probabilities [X, N]; the largest over the prompts."""
    return (logp.exp() * (logp - logq)).sum(-1).max().item()
