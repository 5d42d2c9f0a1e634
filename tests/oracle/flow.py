"""Training followed to its end for losses with stopped gradients: policy and critic move together, as in `pipeline.loop`.

Such a pair of losses has no common minimum; what training does is a vector field (the gradients), and where it ends is
a stable root of it. `settle` follows the field by implicit Euler steps that grow: small ones trace gradient descent, and
large ones are Newton's. `rates` tells how fast, and whether, gradient descent is drawn to an end.

The field's derivative is taken by central differences, since autograd would miss what is behind the stopped gradients.
All the shifted tables are computed in one call of the shipped objective, as further prompts of one batch.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from pipeline.contracts import Batch, Objective
from tests.oracle.mdp import TokenMdp
from tests.oracle.policy import TabularPolicy, loss_of

SHIFT = 1e-5
"""Of the central differences: truncation and rounding both stay below 1e-9."""


class Flow:
    """The field of one objective on one batch. A point [X, D] holds each prompt's logits and, with a critic, values."""

    def __init__(self, mdp: TokenMdp, objective: Objective, batch: Batch) -> None:
        self.mdp, self.objective = mdp, objective
        self.states, self.tokens = mdp.next_state.shape
        self.width = self.states * (self.tokens + objective.needed().critic)  # D
        self.batch, self._shifted = batch, copies(batch, 2 * self.width, mdp.prompts)

    def point(self, policy: TabularPolicy) -> Tensor:
        """The policy's tables in one row per prompt. [X, D]"""
        return torch.cat([policy.logits.flatten(1), policy.values], dim=1).detach()[:, : self.width]

    def policy(self, point: Tensor) -> TabularPolicy:
        """The tables of such a row: the inverse of `point`."""
        logits, values = point.tensor_split([self.states * self.tokens], dim=1)
        logits = logits.reshape(-1, self.states, self.tokens)
        return TabularPolicy(self.mdp, logits, values if values.shape[1] else None)

    def gradient(self, point: Tensor, batch: Batch | None = None) -> Tensor:
        """What the loss says to move against, [X, D]; every term moves whatever it reaches, as one backward would."""
        policy, batch = self.policy(point), self.batch if batch is None else batch
        loss = loss_of(self.objective, policy(batch, self.objective.needed()), batch)
        parts = torch.autograd.grad(loss, [policy.logits, policy.values], allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten(1) for part in parts], dim=1)[:, : self.width]

    def jacobian(self, point: Tensor) -> Tensor:
        """∂ gradient_i / ∂ point_j of each prompt. [X, D, D]"""
        shift = SHIFT * torch.eye(self.width, dtype=point.dtype)
        shift = torch.cat([shift, -shift])[:, None]  # [2D, 1, D]
        # The copies' common denominator is 2D times as large.
        moved = 2 * self.width * self.gradient((point + shift).flatten(0, 1), self._shifted)
        up, down = moved.reshape(2, self.width, *point.shape)
        return (up - down).permute(1, 2, 0) / (2 * SHIFT)


def copies(batch: Batch, count: int, prompts: int) -> Batch:
    """The batch's rows `count` times over, each time for prompts of their own."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in tensors.items() if isinstance(v, Tensor)}
    number = torch.arange(count).repeat_interleave(len(batch.weight))
    tensors["input_ids"][:, 0] += prompts * number
    return replace(batch, **tensors)


def settle(mdp: TokenMdp, objective: Objective, batch: Batch, *, steps: int = 80, growth: float = 2.0) -> TabularPolicy:
    """Where training from the reference (and V = 0) ends. Fails if it has not come to rest."""
    flow = Flow(mdp, objective, batch)
    point, eye = flow.point(TabularPolicy(mdp)), torch.eye(flow.width, dtype=torch.float64)
    time = 1.0
    for _ in range(steps):
        gradient = flow.gradient(point)
        if gradient.abs().max() < 1e-15:
            break
        point = point - torch.linalg.solve(eye / time + flow.jacobian(point), gradient)
        # A softmax does not feel a constant added to all logits of a state: eye / time must keep that direction still.
        time = min(time * growth, 1e9)
    assert flow.gradient(point).abs().max() < 1e-12, "training has not come to rest"
    return flow.policy(point)


def rates(mdp: TokenMdp, objective: Objective, batch: Batch, policy: TabularPolicy) -> Tensor:
    """How fast gradient descent returns to `policy` after a small push, slowest first: real parts of the field's
    eigenvalues, without the one direction per state that no policy feels. All positive: an end that attracts. [X, D − S]"""
    flow = Flow(mdp, objective, batch)
    eigenvalues = torch.linalg.eigvals(flow.jacobian(flow.point(policy)))
    felt = eigenvalues.abs().argsort(dim=-1)[:, flow.states :]
    return eigenvalues.gather(1, felt).real.sort(-1).values
