"""A policy that is a table, behind the same contracts as a language model: the shipped objectives train it.

`rows` makes batches through the shipped `collate`; a `TabularPolicy` reads their tokens and yields a `PolicyOut`, as
`pipeline.model` does. Then `fit` minimises what `pipeline.loop` minimises, by L-BFGS on all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.collate import collate
from pipeline.contracts import Batch, Objective, PolicyOut, Row
from tests.oracle.mdp import TokenMdp


class TabularPolicy:
    """One logit per prompt, state and token; starts at the reference."""

    def __init__(self, mdp: TokenMdp, logits: Tensor | None = None) -> None:
        self.mdp = mdp
        self.logits = (mdp.ref_logits if logits is None else logits).detach().clone().requires_grad_()  # [X, S, V]

    def __call__(self, batch: Batch) -> PolicyOut:
        """Walks the tree along each response: logprobs [B, K, R], 0 where masked."""
        table = self.logits.log_softmax(-1)
        prompt = batch.input_ids[:, :1].expand(batch.valid.shape)  # [B, K]: a prompt is its number
        state = torch.zeros_like(prompt)
        steps = []
        for token, live in zip(batch.response_ids.unbind(-1), batch.response_mask.unbind(-1), strict=True):
            steps.append(torch.where(live, table[prompt, state, token], 0.0))
            state = self.mdp.next_state[state, token].clamp(min=0)
        return PolicyOut(torch.stack(steps, dim=-1))

    def logprob(self) -> Tensor:
        """log π(y|x) of every response. [X, N]"""
        return self.mdp.sequence_logprob(self.logits.detach())


def rows(mdp: TokenMdp, groups: Sequence[tuple[int, Sequence[int]]], weight: Tensor) -> Batch:
    """A batch of (prompt, responses best first), each of the given weight [B]; reference log-probs in float64."""
    made = [
        Row(row_id=i, prompt_ids=[prompt], response_ids=[list(mdp.responses[n]) for n in group])
        for i, (prompt, group) in enumerate(groups)
    ]
    batch = replace(collate(made), weight=weight.double())
    with torch.no_grad():
        return replace(batch, ref_logprobs=TabularPolicy(mdp)(batch).logprobs)


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
    optimizer = torch.optim.LBFGS(
        [policy.logits],
        max_iter=20,
        history_size=20,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(objective, policy(batch), batch, only)
        loss.backward()
        return loss

    before = float("inf")
    for _ in range(rounds):
        loss = optimizer.step(closure).item()  # at the round's start
        if before - loss < 1e-15 * abs(loss):
            break
        before = loss
    return policy
