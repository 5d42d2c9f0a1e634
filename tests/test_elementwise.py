"""Rotary positions and norms with fewer passes: transformers' own numbers and gradients, and its own code for all else."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import elementwise

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
}
IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL, **FAMILIES[name])).eval()
    with torch.no_grad():
        for module in norms(lm):
            module.weight.add_(0.3 * torch.randn_like(module.weight))
    return lm


def norms(lm: nn.Module) -> list[nn.Module]:
    return [module for module in lm.modules() if "RMSNorm" in type(module).__name__]


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch):
    """transformers' own function in a model's file, for this test and behind it."""

    def take_back(lm: nn.Module) -> str:
        file = next(type(m).__module__ for m in lm.modules() if hasattr(sys.modules[type(m).__module__], "rotate_half"))
        own = getattr(sys.modules[file], elementwise.ROTATE)
        while hasattr(own, "replaced"):
            own = own.replaced
        monkeypatch.setattr(sys.modules[file], elementwise.ROTATE, own)
        return file

    return take_back


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_computes_the_same_states_and_gradients_without_its_own_code(
    name: str, untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build(name)
    file = untouched(lm)
    weight = torch.randn(*IDS.shape, SMALL["vocab_size"])

    def found() -> list[torch.Tensor]:
        logits = lm(input_ids=IDS).logits
        return [logits.detach(), *torch.autograd.grad((logits * weight).sum(), list(lm.parameters()))]

    expected = found()
    elementwise.attach(lm)

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("its own code ran")

    monkeypatch.setattr(sys.modules[file], "rotate_half", broken)
    for kind in {type(module) for module in norms(lm)}:
        monkeypatch.setattr(kind, "forward", broken)
    for one, other in zip(found(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_the_gradients_are_those_of_the_formulas() -> None:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))

    x, weight = numbers(2, 3, 6).requires_grad_(), numbers(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: elementwise.rms_norm(x, w, 1e-2), (x, weight))
    apart = numbers(2, 6, 3).transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: elementwise.rms_norm(x, w, 1e-2), (apart, weight))
    cos, sin = numbers(1, 3, 6), numbers(1, 3, 6) + 1  # halves that differ: no model has them, the formula does
    assert torch.autograd.gradcheck(lambda x: elementwise.rotate(x, cos, sin), (x,))


def test_other_types_and_other_functions_keep_their_own_code(untouched) -> None:
    lm = build("llama").to(torch.bfloat16)
    file = untouched(lm)
    expected = lm(input_ids=IDS).logits
    elementwise.attach(lm)
    assert torch.equal(lm(input_ids=IDS).logits, expected)
    assert not any("forward" in vars(module) for module in norms(lm))
    own = getattr(sys.modules[file], elementwise.ROTATE)
    elementwise.attach(lm)
    assert getattr(sys.modules[file], elementwise.ROTATE) is own, "attached twice"

    def by_pairs(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        return tuple(x * cos[:, None] + t * sin[:, None] for x, t in zip((q, k), turned, strict=True))

    assert not elementwise._same_rotation(by_pairs)

    def never_unsqueezed(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ):
        return tuple(elementwise.rotate(x, cos, sin) for x in (q, k))

    assert not elementwise._same_rotation(never_unsqueezed)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6


class CentredRMSNorm(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (8,), self.weight + 1, eps=self.eps)


class GatedRMSNorm(Own):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps) * (1 if gate is None else gate.sigmoid())


class NeedsGateRMSNorm(Own):
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps) * gate.sigmoid()


class ScaledInputRMSNorm(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # Gemma's as long as its weights are 0
        return elementwise.rms_norm(x * (1 + self.weight), torch.ones(8), self.eps)


class EpsBehindRMSNorm(Own):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


@pytest.mark.parametrize("kind", Own.__subclasses__())
def test_a_norm_of_another_kind_stays_as_it_is(kind: type[Own]) -> None:
    norm = kind()
    elementwise.attach(norm)
    assert "forward" not in vars(norm)


def test_frozen_weights_get_no_gradient_and_inputs_do() -> None:
    lm = build("llama")
    elementwise.attach(lm)
    for module in norms(lm):
        module.requires_grad_(False)
    lm(input_ids=IDS).logits.sum().backward()
    assert all(module.weight.grad is None for module in norms(lm))
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)


def test_a_copy_of_a_model_computes_with_its_own_weights() -> None:
    lm = build("llama")
    elementwise.attach(lm)
    other, pickled = copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))
    with torch.no_grad():
        for module in norms(lm):
            module.weight.zero_()
    assert lm(input_ids=IDS).logits.abs().max() == 0
    assert other(input_ids=IDS).logits.abs().max() > 0
    assert torch.equal(other(input_ids=IDS).logits, pickled(input_ids=IDS).logits)
