"""LTA's three terms by hand, their gradients, and what each of them does and does not do to thoughts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.config_file import validate
from pipeline.objectives.lta import (
    Lta,
    alignment_kl,
    answer_step,
    candidates,
    choosable,
    focus_loss,
    latent_metrics,
)
from tests.batches import LOGPROB, as_out, as_trajectories, loss_of, make_batch, make_raw


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------- alignment


def test_alignment_by_hand() -> None:
    """p = (¾, ¼). q₁ = p adds nothing; q₂ = (½, ½) adds ¾ log 1.5 + ¼ log 0.5 = 0.1308, halved by the mean over thoughts."""
    question = torch.tensor([[math.log(3.0), 0.0]])
    thoughts = torch.tensor([[[math.log(3.0) + 2, 2.0], [5.0, 5.0]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert alignment_kl(question, thoughts).item() == pytest.approx(expected / 2)
    # The mean thought is (½ log 3, 0) up to a constant: q = (√3, 1) / (√3 + 1).
    q = math.sqrt(3) / (math.sqrt(3) + 1)
    mean = 0.75 * math.log(0.75 / q) + 0.25 * math.log(0.25 / (1 - q))
    assert alignment_kl(question, thoughts, "mean").item() == pytest.approx(mean, abs=1e-6)


def test_published_alignment_ends_in_one_vector_and_the_mean_keeps_the_variance() -> None:
    """Descent on each form alone, from the same thoughts."""
    spread = {}
    for alignment in ("each", "mean"):
        question, thoughts = vectors(1, 8, seed=1), vectors(1, 3, 8, seed=2).requires_grad_()
        start = thoughts.detach().var(1, unbiased=False).sum()
        for _ in range(4000):
            (grad,) = torch.autograd.grad(alignment_kl(question, thoughts, alignment).sum(), thoughts)
            thoughts = (thoughts - 3.0 * grad).detach().requires_grad_()
        assert alignment_kl(question, thoughts, alignment).item() < 1e-3
        aligned = thoughts - thoughts.mean(-1, keepdim=True)  # a softmax sees no constant
        spread[alignment] = aligned.var(1, unbiased=False).sum().item()
        if alignment == "mean":
            assert thoughts.var(1, unbiased=False).sum().item() == pytest.approx(start.item(), rel=1e-9)
    assert spread["each"] < 0.05 * spread["mean"]


def test_alignment_pulls_on_both_sides() -> None:
    for alignment in ("each", "mean"):
        both = vectors(2, 5, seed=3), vectors(2, 4, 5, seed=4)
        assert torch.autograd.gradcheck(
            lambda q, t, a=alignment: alignment_kl(q, t, a), [x.requires_grad_() for x in both]
        )
        grads = torch.autograd.grad(alignment_kl(*both, alignment).sum(), both)
        assert all(grad.abs().max() > 1e-2 for grad in grads)


# ------------------------------------------------------------------------------------------------- focus


def test_focus_by_hand() -> None:
    """Cosines with the answer (1, 0): 0.6, 1, −1; the key step is the second. With the anchor (0, 1): 0.8, 0, 0; τ = 0.5."""
    steps = torch.tensor([[[3.0, 4.0], [2.0, 0.0], [-1.0, 0.0]]])
    loss, hit = focus_loss(torch.tensor([[0.0, 7.0]]), steps, torch.tensor([[5.0, 0.0]]), torch.ones(1, 3).bool(), 0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(1.6) + 2))
    assert not hit.item()
    # Without the second step the key step is the first, which the anchor is closest to as well.
    open_ = torch.tensor([[True, False, True]])
    loss, hit = focus_loss(torch.tensor([[0.0, 7.0]]), steps, torch.tensor([[5.0, 0.0]]), open_, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.6)))
    assert hit.item()


def test_focus_gradient_passes_through_anchor_and_steps_and_not_through_the_choice() -> None:
    anchor, steps, answer = vectors(2, 5, seed=5), vectors(2, 4, 5, seed=6), vectors(2, 5, seed=7)
    open_ = torch.tensor([[True, True, False, True], [False, True, True, False]])
    inputs = [x.requires_grad_() for x in (anchor, steps)]
    assert torch.autograd.gradcheck(lambda a, s: focus_loss(a, s, answer, open_, 0.3)[0], inputs)
    answer.requires_grad_()
    loss = focus_loss(anchor, steps, answer, open_, 0.3)[0].sum()
    by_answer, by_steps = torch.autograd.grad(loss, (answer, steps), allow_unused=True)
    assert by_answer is None or not by_answer.any()
    assert (by_steps.abs().amax(-1) > 1e-4).tolist() == open_.tolist()


def test_nothing_to_choose_from_is_zero_and_finite() -> None:
    steps = torch.zeros(1, 3, 2, requires_grad=True)
    loss, hit = focus_loss(torch.ones(1, 2), steps, torch.ones(1, 2), torch.zeros(1, 3).bool(), 0.1)
    assert (loss.item(), hit.item()) == (0.0, False)
    (grad,) = torch.autograd.grad(loss.sum(), steps)
    assert grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- steps


def test_the_answer_is_the_policys_last_step_and_those_before_it_compete() -> None:
    """Steps end at tokens 0, 2, 4, 6; token 4 is the environment's. The second row has two steps, the third one."""
    batch = make_batch([[7], [3], [1]])
    ends = torch.tensor([[[0, 2, 4, 6]], [[0, 2, -1, -1]], [[0, -1, -1, -1]]])
    mask = batch.response_mask.clone()
    mask[0, 0, 4] = False
    batch = replace(batch, step_ends=ends, response_mask=mask)
    assert candidates(batch).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert answer_step(batch).int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert choosable(candidates(batch)).tolist() == [True, False, False]
    weights = Lta().weight(replace(batch, weight=torch.tensor([2.0, 1.0, 1.0])))
    assert {name: value.item() for name, value in weights.items()} == {"nll": 6 * 2 + 3 + 1, "align": 4.0, "focus": 2.0}


def test_the_whole_loss_is_the_weighted_sum_of_its_terms() -> None:
    batch = as_trajectories(make_batch([[7], [6]], weight=[1.0, 3.0]))
    raw = make_raw(batch)
    out = as_out(raw, batch, Lta().needed())
    assert (
        out.steps is not None and out.question is not None and out.thoughts is not None and out.step_texts is not None
    )
    nll = -(out.logprobs.sum((-1, -2)) * batch.weight).sum() / (batch.response_mask.sum((-1, -2)) * batch.weight).sum()
    align = (alignment_kl(out.question, out.thoughts) * batch.weight).sum() / 4
    total = 0.0
    for b in range(2):
        kept = candidates(batch)[b].nonzero().flatten()
        answer = out.step_texts[b][answer_step(batch)[b]].sum(0)
        key = max(kept.tolist(), key=lambda i: torch.cosine_similarity(out.steps[b, i], answer, dim=0))
        scores = {i: torch.cosine_similarity(out.steps[b, i], out.question[b], dim=0) / 0.2 for i in kept.tolist()}
        total = total + batch.weight[b] * (torch.stack([*scores.values()]).logsumexp(0) - scores[key])
    expected = 0.5 * nll + 2.0 * align + 0.7 * total / 4
    objective = Lta(nll_weight=0.5, align_weight=2.0, focus_weight=0.7, temperature=0.2)
    loss = loss_of(objective, out, batch)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, raw, retain_graph=True)[0], torch.autograd.grad(expected, raw)[0]
    torch.testing.assert_close(*grads)
    assert grads[0][..., LOGPROB].any()


def test_an_anchor_of_thoughts_lets_the_contrast_bear_on_them() -> None:
    batch = as_trajectories(make_batch([[7], [6]]))
    for anchor, moved in (("question", False), ("thoughts", True)):
        objective = Lta(nll_weight=0, align_weight=0, anchor=anchor)
        out = as_out(make_raw(batch).detach(), batch, objective.needed())
        assert out.thoughts is not None
        out.thoughts.requires_grad_()
        out.question.requires_grad_()
        loss = loss_of(objective, out, batch)
        (grad,) = torch.autograd.grad(loss, out.thoughts, allow_unused=True)
        assert (grad is not None and bool(grad.any())) == moved


# ----------------------------------------------------------------------------------------- metrics, settings


def test_variance_and_cosine_by_hand() -> None:
    """(1, 0) and (0, 1): mean (½, ½), deviations ±½ in each of two dimensions: ¼ over a mean square of ½. (2, 0) twice: none."""
    thoughts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [2.0, 0.0]]])
    found = latent_metrics(thoughts, torch.tensor([1.0, 1.0]))
    means = {name: (mean.total / mean.weight).item() for name, mean in found.items()}
    assert means == pytest.approx(
        {"latent_variance": 0.25, "latent_cosine": 0.5, "thought_size": (0.5**0.5 + 2**0.5) / 2}, abs=1e-6
    )
    three = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])  # pairs: 0, −1, 0
    assert latent_metrics(three, torch.ones(1))["latent_cosine"].total.item() == pytest.approx(-1 / 3)
    assert "latent_cosine" not in latent_metrics(three[:, :1], torch.ones(1)), "one thought has no pair"


def plain(kind: str, **objective: object) -> dict:
    return {
        "data": {"kind": kind, "sources": [{"path": "data.jsonl"}]},
        "model": {"path": "some/model"},
        "objective": {"name": "lta", **objective},
    }


def test_demonstrations_have_no_steps_to_contrast() -> None:
    assert validate(plain("demonstration", focus_weight=0)).objective.needed().latent == "thoughts"
    assert validate(plain("trajectory")).objective.needed().latent == "steps"
    with pytest.raises(ConfigError, match=r"^data\.kind: lta trains on trajectory with these settings, not on demonst"):
        validate(plain("demonstration"))
    with pytest.raises(ConfigError, match=r"^objective\.nll_weight: all three|^objective: nll_weight: all three"):
        validate(plain("trajectory", nll_weight=0, align_weight=0, focus_weight=0))


def test_published_defaults() -> None:
    found = Lta()
    assert (found.nll_weight, found.align_weight, found.focus_weight, found.temperature) == (0.33, 0.33, 0.33, 0.1)
    assert (found.alignment, found.anchor) == ("each", "question")
