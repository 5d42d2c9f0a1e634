"""A policy and a critic that are tables, behind the same contracts as networks: the shipped objectives train them.

`rows` makes batches through the shipped `collate`; a `TabularPolicy` reads their tokens and yields a `PolicyOut`, as
`pipeline.model` and `pipeline.critic` do. `fit` minimises what `pipeline.loop` minimises, where the loss is one; for
losses with stopped gradients, which have no common minimum, see `flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.collate import collate
from pipeline.contracts import Batch, Needs, Objective, PolicyOut, Row
from tests.oracle.mdp import TokenMdp


class TabularPolicy:
    """One logit per prompt, state and token, starting at the reference; one value per prompt and state, starting at 0.

    The tables may hold X prompts or, for `flow`, copies of them: prompt x + c·X is x in the copy c.
    """

    def __init__(self, mdp: TokenMdp, logits: Tensor | None = None, values: Tensor | None = None) -> None:
        self.mdp = mdp
        start = mdp.ref_logits if logits is None else logits
        self.logits = start.detach().clone().requires_grad_()  # [X, S, V]
        zeros = torch.zeros(start.shape[:2], dtype=start.dtype)
        self.values = (zeros if values is None else values).detach().clone().requires_grad_()  # [X, S]

    def __call__(self, batch: Batch, needs: Needs | None = None) -> PolicyOut:
        """What `needs` asks for: log-probs always, exact KL and values where wanted; 0 where masked."""
        ours = self.logits.log_softmax(-1)
        prompt, state = visited(self.mdp, batch)
        live = batch.response_mask
        kl = values = None
        if needs is not None and needs.kl != "none":
            copies = len(ours) // self.mdp.prompts
            kl = divergence(ours, self.mdp.ref_logits.log_softmax(-1).repeat(copies, 1, 1), needs.kl)
            kl = torch.where(live, kl[prompt, state], 0.0)
        if needs is not None and needs.critic:
            values = torch.where(live, self.values[prompt, state], 0.0)
        return PolicyOut(torch.where(live, ours[prompt, state, batch.response_ids], 0.0), kl, values)

    def logprob(self) -> Tensor:
        """log π(y|x) of every response. [X, N]"""
        return self.mdp.sequence_logprob(self.logits.detach())


def divergence(ours: Tensor, reference: Tensor, direction: str) -> Tensor:
    """Exact KL per state of two tables of log-probabilities, [X, S, V] → [X, S]; forward is KL(π_ref ‖ π)."""
    first, second = (reference, ours) if direction == "forward" else (ours, reference)
    return (first.exp() * (first - second)).sum(-1)


def visited(mdp: TokenMdp, batch: Batch) -> tuple[Tensor, Tensor]:
    """The prompt's number and the state before each response token, both [B, K, R]: the tree walked along each response."""
    state = torch.zeros(batch.valid.shape, dtype=torch.long)
    states = []
    for token in batch.response_ids.unbind(-1):
        states.append(state)
        state = mdp.next_state[state, token].clamp(min=0)
    prompt = batch.input_ids[:, :1, None].expand(batch.response_ids.shape)  # a prompt is its number
    return prompt, torch.stack(states, dim=-1)


def rows(
    mdp: TokenMdp, groups: Sequence[tuple[int, Sequence[int]]], weight: Tensor, *, mismatched: bool = False
) -> Batch:
    """A batch of (prompt, responses best first), each of the given weight [B]; reference log-probs in float64."""
    made = [
        Row(
            row_id=i,
            prompt_ids=[prompt],
            response_ids=[list(mdp.responses[n]) for n in group],
            trained=[_policy_moves(mdp, mdp.responses[n]) for n in group],
            mismatched=mismatched,
        )
        for i, (prompt, group) in enumerate(groups)
    ]
    batch = replace(collate(made), weight=weight.double())
    with torch.no_grad():
        return replace(batch, ref_logprobs=TabularPolicy(mdp)(batch).logprobs)


def _policy_moves(mdp: TokenMdp, response: tuple[int, ...]) -> list[bool]:
    state, moves = 0, []
    for token in response:
        moves.append(bool(mdp.policy_moves[state]))
        state = int(mdp.next_state[state, token])
    return moves


def rewarded(mdp: TokenMdp, batch: Batch, behaviour: Tensor | None = None) -> Batch:
    """The batch with the MDP's rewards on its tokens, and log μ(response) where a `behaviour` table [X, S, V] of
    log-probabilities is given (over the policy's tokens, as records have it)."""
    prompt, state = visited(mdp, batch)
    ends = (mdp.next_state[state, batch.response_ids] < 0).int()  # [B, K, R]
    inside = (ends.cumsum(-1) == ends) & batch.response_mask.any(-1, keepdim=True)  # not behind an end, not padding
    reward = torch.where(inside, mdp.token_reward[prompt, state, batch.response_ids], 0.0)
    logged = None
    if behaviour is not None:
        ours = torch.where(batch.response_mask, behaviour[prompt, state, batch.response_ids], 0.0)
        logged = ours.sum(-1)
    return replace(batch, token_rewards=reward, behaviour_logprobs=logged)


def loss_of(objective: Objective, out: PolicyOut, batch: Batch, only: str | None = None) -> Tensor:
    """Σ coefficient · total / weight, as `loop` divides; `only` one term, before its coefficient, where named."""
    weights, terms = objective.weight(batch), objective(out, batch).terms
    if only is not None:
        return terms[only].total / weights[only]
    return sum((term.coefficient * term.total / weights[name] for name, term in terms.items()), torch.zeros(()))


def fit(
    mdp: TokenMdp, objective: Objective, batch: Batch, *, only: str | None = None, rounds: int = 40
) -> TabularPolicy:
    """Train from the reference until the loss falls no more, in at most `rounds` of 20 L-BFGS iterations."""
    policy = TabularPolicy(mdp)
    minimise(policy.logits, lambda: loss_of(objective, policy(batch, objective.needed()), batch, only), rounds)
    return policy


def minimise(table: Tensor, loss_at: Callable[[], Tensor], rounds: int = 40) -> None:
    """Change `table` until `loss_at()` falls no more."""
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=20,
        history_size=20,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_at()
        loss.backward()
        return loss

    before = float("inf")
    for _ in range(rounds):
        loss = optimizer.step(closure).item()  # at the round's start
        if before - loss < 1e-15 * abs(loss):
            break
        before = loss
