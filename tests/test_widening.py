"""Products of bfloat16 in float32: the exact sums, rounded once, and torch's own code wherever that is no gain."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import widening
from pipeline.attention import group_attention, pack
from pipeline.config import LoraSection
from pipeline.model import add_lora
from pipeline.packing import choose_layout, probe_batch
from pipeline.trunk import token_states
from pipeline.widening import FEW, attach

BF16 = torch.bfloat16
HALF_STEP = 2**-8
"""Half of the distance from 1 to bfloat16's next number: the most that rounding once moves a number, relative to it."""


@pytest.fixture(autouse=True)
def no_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is."""
    monkeypatch.setattr(widening, "_no_matrix_unit", lambda: True)


def layer(bias: bool = True, head: bool = False) -> nn.Linear:
    """Of a model with one: 24 → 40."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 40, bias=bias, dtype=BF16)

        def get_output_embeddings(self) -> nn.Module | None:
            return self.linear if head else None

    torch.manual_seed(0)
    model = Model()
    attach(model)
    return model.linear


def exact(linear: nn.Linear, x: torch.Tensor, by: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients (input, weight, bias) in float64."""
    given = [x.detach().double(), *(p.detach().double() for p in linear.parameters())]
    given = [tensor.requires_grad_() for tensor in given]
    out = nn.functional.linear(*given)
    return [out.detach(), *torch.autograd.grad(out, given, by.double())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEW, 24), (3, 50, 24)])
def test_outputs_and_gradients_are_exact_sums_rounded_once(bias: bool, shape: tuple[int, ...]) -> None:
    linear = layer(bias)
    x = torch.randn(shape).to(BF16).requires_grad_()
    by = torch.randn(*shape[:-1], 40).to(BF16)
    out = linear(x)
    found = [out.detach(), *torch.autograd.grad(out, [x, *linear.parameters()], by)]
    for one, other in zip(found, exact(linear, x, by), strict=True):
        assert one.dtype == BF16
        # 1e-5: what sums of float32 may be off by, where a sum is close to 0.
        torch.testing.assert_close(one.double(), other, rtol=HALF_STEP * 1.001, atol=1e-5)


def test_a_head_leaves_float32_and_takes_it_back() -> None:
    linear = layer(head=True)
    x = torch.randn(64, 24).to(BF16).requires_grad_()
    by = torch.randn(64, 40)
    logits = linear(x)
    assert logits.dtype == torch.float32
    expected = exact(linear, x, by)
    torch.testing.assert_close(logits.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert (logits.detach() != logits.detach().to(BF16)).float().mean() > 0.9, "it was rounded on the way"
    (by_x,) = torch.autograd.grad(logits, x, by)
    torch.testing.assert_close(by_x.double(), expected[1], rtol=HALF_STEP * 1.001, atol=1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    linear = layer().requires_grad_(False)
    x = torch.randn(64, 24).to(BF16).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None and linear.weight.grad is None and linear.bias.grad is None


class Widened(Exception):
    """In place of the product."""


def widened(*_: object) -> None:
    raise Widened


@pytest.mark.parametrize("case", ["few rows", "float32", "a matrix unit"])
def test_torch_multiplies_where_there_is_nothing_to_gain(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening._Linear, "apply", widened)
    linear, rows = layer(), FEW - 1 if case == "few rows" else FEW
    with pytest.raises(Widened):
        linear(torch.randn(FEW, 24).to(BF16))
    if case == "float32":
        linear.float()
    if case == "a matrix unit":
        monkeypatch.setattr(widening, "_no_matrix_unit", lambda: False)
    x = torch.randn(rows, 24).to(linear.weight.dtype)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_a_heads_logits_do_not_depend_on_how_many_there_are() -> None:
    linear = layer(head=True)
    x = torch.randn(100, 24).to(BF16)
    assert linear(x[:1]).dtype == torch.float32
    torch.testing.assert_close(linear(x)[:1], linear(x[:1]), rtol=1e-5, atol=1e-6)


def test_adapters_are_widened_too() -> None:
    lm = tiny().to(BF16)
    attach(lm)
    add_lora(lm, LoraSection(r=4, target_modules=("q_proj",)))
    names = [
        name for name, module in lm.named_modules() if isinstance(getattr(module, "forward", None), widening._Widened)
    ]
    assert sum(".lora_" in name for name in names) == 4
    assert isinstance(lm.get_output_embeddings()(torch.randn(1, 32).to(BF16)), torch.FloatTensor)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_multiplies_with_its_own_weights(again) -> None:
    lm = tiny().to(BF16)
    attach(lm)
    other = again(lm)
    projection = other.model.layers[0].mlp.up_proj
    with torch.no_grad():
        projection.weight.zero_()
    x = torch.randn(FEW, 32).to(BF16)
    assert projection(x).count_nonzero() == 0
    assert lm.model.layers[0].mlp.up_proj(x).count_nonzero() > 0


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, initializer_range=0.3, **settings))


def test_attention_is_float32s_rounded_once() -> None:
    groups = [(40, 20, 9), (5, 3)]
    tokens = sum(map(sum, groups))
    drawn = [torch.randn(1, heads, tokens, 16).to(BF16) for heads in (4, 2, 2)]
    narrow = [x.clone().requires_grad_() for x in drawn]
    wide = [x.float().requires_grad_() for x in drawn]
    by = torch.randn(1, tokens, 4, 16).to(BF16)
    module = nn.Module()
    out = group_attention(module, *narrow, pack(groups, None))[0]
    expected = group_attention(module, *wide, pack(groups, None))[0]
    assert out.dtype == BF16
    assert torch.equal(out, expected.to(BF16))
    for one, other in zip(
        torch.autograd.grad(out, narrow, by), torch.autograd.grad(expected, wide, by.float()), strict=True
    ):
        assert torch.equal(one, other.to(BF16))


def test_a_model_in_bfloat16_is_as_close_to_float32_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny().to(BF16)
    exact_lm = tiny().float()
    exact_lm.load_state_dict(lm.state_dict())

    assert {choose_layout(lm), choose_layout(exact_lm)} == {"flat"}

    def states(model: nn.Module) -> torch.Tensor:
        return token_states(model, probe_batch(model), "flat").detach().double()

    reference = states(exact_lm)
    monkeypatch.setattr(widening, "FEW", 1)
    widened = (states(lm) - reference).norm() / reference.norm()
    monkeypatch.setattr(widening, "_no_matrix_unit", lambda: False)
    plain = (states(lm) - reference).norm() / reference.norm()
    assert widened < 0.02
    assert widened < 1.2 * plain
