"""LTA-Thinker: latent thoughts that make the right answer likely, stay with the question, and know the step that matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.contracts import Alarm, Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Alignment = Literal["each", "mean"]
Anchor = Literal["question", "thoughts"]


class Lta(Objective):
    """L = w_nll · L_nll + w_align · L_align + w_focus · L_focus (LTA-Thinker, arXiv 2509.12875).

    The paper's printed equations were not at hand: these are those of its published code, and so are the defaults.

    - L_nll: cross-entropy of the best response's tokens behind prompt and thoughts, in nats; of a trajectory the policy's.
    - L_align: mean_j KL(p ‖ q_j) with p = softmax of what the prior makes of the question, q_j of thought j, over the hidden
      dimension, gradients through both. It depends on the thoughts' size, and is 0 where all of them equal the question:
      the collapse that the method's own case for variance argues against. `alignment=mean` compares the question with the mean
      thought instead. Its gradient is the same for every thought, so it cannot change how they vary around their mean.
    - L_focus: −log softmax_i(cos(c_i, a) / τ) at the key step, with c_i what the prior makes of step i, and a of the question
      or, with `anchor=thoughts`, the mean thought, on which the term bears directly. The key step is the one whose c_i is
      closest, by cosine, to the mean input embedding of the answer: the last step's tokens. Steps before it are candidates;
      with fewer than two there is nothing to choose, and a row does not count.

    Steps are the policy's own. They never reach the thoughts (`pipeline.latent`): in the published code they do in training,
    which leaks the solution into what has to predict it. With w_align = w_focus = 0 and an assistant this is SoftCoT.
    Own metrics: `latent_variance` (of the thoughts of a row around their mean, per dimension, over the mean square of their
    values: 0 collapsed, at most 1), `latent_cosine` (mean over pairs of a row's thoughts), `thought_size` (root of the mean square
    of values, mean over rows) and, with focus, `focus_hit` (share of rows whose anchor is closest to the key step).
    """

    needs: ClassVar[Needs] = Needs(
        records=frozenset({"trajectory", "demonstration", "preference", "ranking"}), latent="steps"
    )
    alarms: ClassVar[tuple[Alarm, ...]] = (
        Alarm("latent_cosine", "all thoughts of a prompt are alike; set objective.alignment=mean", high=0.999),
    )

    nll_weight: Weight = 0.33
    """Coefficient of the cross-entropy."""
    align_weight: Weight = 0.33
    """Coefficient of the semantic alignment of thoughts and question."""
    focus_weight: Weight = 0.33
    """Coefficient of the contrast between steps; 0: trains on data without steps, too."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """τ of the contrast."""
    alignment: Alignment = "each"
    """What is aligned with the question: each thought, as published, or their mean, which leaves their variance alone."""
    anchor: Anchor = "question"
    """What the key step is drawn to: the question, as published, or the mean thought."""

    @model_validator(mode="after")
    def _some_term(self) -> Lta:
        if not (self.nll_weight or self.align_weight or self.focus_weight):
            raise ValueError("nll_weight: all three weights are 0, and nothing would be trained; set one")
        return self

    def needed(self) -> Needs:
        """Steps are for the contrast alone, and only trajectories have them."""
        if self.focus_weight:
            return replace(self.needs, records=frozenset({"trajectory"}))
        return replace(self.needs, latent="thoughts")

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        weights = {"nll": (batch.response_mask[:, 0].sum(-1) * batch.weight).sum()} if self.nll_weight else {}
        if self.align_weight:
            weights["align"] = (batch.valid[:, 0] * batch.weight).sum()
        if self.focus_weight:
            weights["focus"] = (choosable(candidates(batch)) * batch.weight).sum()
        return weights

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        assert out.thoughts is not None and out.question is not None
        own = batch.valid[:, 0] * batch.weight  # [B]
        terms, metrics = {}, latent_metrics(out.thoughts, own)
        if self.nll_weight:
            nll = -out.logprobs[:, 0].sum(-1) * batch.weight
            terms["nll"] = Term(nll.sum(), coefficient=self.nll_weight)
        if self.align_weight:
            align = where(own > 0, alignment_kl(out.question, out.thoughts, self.alignment)) * own
            terms["align"] = Term(align.sum(), coefficient=self.align_weight)
        if self.focus_weight:
            assert out.steps is not None and out.step_texts is not None
            open_, kept = candidates(batch), answer_step(batch)
            counts = choosable(open_) * batch.weight
            anchor = out.question if self.anchor == "question" else out.thoughts.mean(1)
            answer = (out.step_texts * kept[..., None]).sum(1)
            loss, hit = focus_loss(anchor, out.steps, answer, open_, self.temperature)
            terms["focus"] = Term((where(counts > 0, loss) * counts).sum(), coefficient=self.focus_weight)
            metrics["focus_hit"] = Mean.of(hit.float(), counts)
        return LossOut(terms, metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π itself: likelihood is what the thoughts are for. [B, K, R]"""
        return out.logprobs


# ------------------------------------------------------------------------------------------------- terms


def alignment_kl(question: Tensor, thoughts: Tensor, alignment: Alignment = "each") -> Tensor:
    """KL(softmax(question) ‖ softmax(thought)), mean over thoughts; or of the mean thought. [B, D], [B, n, D] → [B] nats"""
    aligned = thoughts if alignment == "each" else thoughts.mean(1, keepdim=True)
    log_p, log_q = question.log_softmax(-1)[:, None], aligned.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def focus_loss(
    anchor: Tensor, steps: Tensor, answer: Tensor, open_: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """−log softmax_i(cos(step_i, anchor) / τ) at the key step, and whether the anchor is closest to it.

    anchor, answer [B, D], steps [B, S, D], open_ [B, S] bool: the candidates. → [B], [B] bool; 0 where there are none. The key
    step is the candidate of the largest cosine with the answer; which one that is passes no gradient.
    """
    near = cosine_similarity(steps, answer[:, None], dim=-1).detach().masked_fill(~open_, -torch.inf)
    key = near.argmax(-1, keepdim=True)  # [B, 1]
    score = (cosine_similarity(steps, anchor[:, None], dim=-1) / temperature).masked_fill(~open_, -1e9)
    loss = -score.log_softmax(-1).gather(-1, key).squeeze(-1)
    return where(open_.any(-1), loss), open_.any(-1) & (score.argmax(-1) == key.squeeze(-1))


def where(kept: Tensor, values: Tensor) -> Tensor:
    """The values that count, 0 elsewhere, whatever stands there: 0 · nan would be nan."""
    return torch.where(kept, values, torch.zeros_like(values))


# ------------------------------------------------------------------------------------------------- steps


def policy_steps(batch: Batch) -> Tensor:
    """Steps of each row's best response that the policy wrote. [B, S] bool; S = 0 without steps"""
    if batch.step_ends is None:
        return torch.zeros_like(batch.valid[:, :0])
    ends = batch.step_ends[:, 0]
    return (ends >= 0) & batch.response_mask[:, 0].gather(-1, ends.clamp(min=0))


def answer_step(batch: Batch) -> Tensor:
    """The last of them: the answer. [B, S] bool"""
    own = policy_steps(batch)
    return own & (own.flip(-1).cumsum(-1).flip(-1) == 1)


def candidates(batch: Batch) -> Tensor:
    """Those before it. [B, S] bool"""
    return policy_steps(batch) & ~answer_step(batch)


def choosable(open_: Tensor) -> Tensor:
    """Rows with at least two candidates. [B, S] → [B] bool"""
    return open_.sum(-1) > 1


# ------------------------------------------------------------------------------------------------ metrics


@torch.no_grad()
def latent_metrics(thoughts: Tensor, weight: Tensor) -> dict[str, Mean]:
    """`latent_variance`, `latent_cosine` and `thought_size`, as `Lta` defines them. [B, n, D], [B]"""
    n = thoughts.shape[1]
    square = thoughts.square().mean((-2, -1))
    spread = (thoughts - thoughts.mean(1, keepdim=True)).square().mean((-2, -1)) / square.clamp(min=1e-12)
    found = {"latent_variance": Mean.of(spread, weight), "thought_size": Mean.of(square.sqrt(), weight)}
    if n > 1:
        unit = torch.nn.functional.normalize(thoughts, dim=-1)
        cosine = (unit.sum(1).square().sum(-1) - n) / (n * (n - 1))  # Σ_{i≠j} u_i·u_j = |Σu|² − n
        found["latent_cosine"] = Mean.of(cosine, weight)
    return found
