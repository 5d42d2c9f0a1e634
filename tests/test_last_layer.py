"""The last feed-forward block runs where its output is read, and changes nothing that is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import attention, last_layer
from pipeline.collate import collate
from pipeline.contracts import Row
from pipeline.model import recompute_layers
from pipeline.packing import choose_layout
from pipeline.trunk import token_states

SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
BATCH = collate([Row(0, [5, 6, 7, 8], [[20, 21, 22], [30]]), Row(1, [40, 41], [[42, 43]])])
READ = (1 + 2) + (1 + 1)  # each prompt's last token, and each response token that another one follows


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=97, **SIZES[name])).eval()


def last_block(lm: torch.nn.Module) -> torch.nn.Module:
    return (lm.base_model.layers if hasattr(lm.base_model, "layers") else lm.base_model.h)[-1].mlp


@pytest.mark.parametrize("name", SIZES)
def test_only_what_is_read_is_computed_and_that_is_the_same(name: str) -> None:
    lm = build(name)
    expected = token_states(lm, BATCH, "separate")
    assert choose_layout(lm) == "flat"
    seen = []
    first = next(m for m in last_block(lm).modules() if not list(m.children()))
    first.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-2]))
    states = token_states(lm, BATCH, "flat")
    assert seen == [READ]
    torch.testing.assert_close(states, expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(states)
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), list(lm.base_model.parameters())) for x in (states, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [4, 2])
def test_of_long_prompts_only_the_last_token_looks_in_the_last_layer(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = SIZES["llama"] | {"num_key_value_heads": heads}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=97, **sizes)).eval()

    def ids(count: int) -> list[int]:
        return torch.randint(97, (count,)).tolist()

    batch = collate([Row(0, ids(270), [ids(9), ids(30)]), Row(1, ids(5), [ids(280)]), Row(2, ids(4), [ids(3), ids(2)])])
    expected = token_states(lm, batch, "separate")
    assert choose_layout(lm) == "flat"
    flags, plan = [], attention.plan
    monkeypatch.setattr(attention, "plan", lambda *given: flags.append(given[-1]) or plan(*given))
    states = token_states(lm, batch, "flat")
    assert flags == [False, True]
    long, *_ = plan(((270, 9, 30), (5, 280), (4, 3, 2)), 0, torch.float32, True)
    assert (long.block.start, long.block.stop, long.block.first) == (269, 270, 0)
    torch.testing.assert_close(states, expected, atol=5e-6, rtol=1e-5)
    weight = torch.randn_like(states)
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), list(lm.base_model.parameters())) for x in (states, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_prompts_that_somebody_reads_look_everywhere() -> None:
    lm = build("llama")
    choose_layout(lm)
    layer = lm.base_model.layers[-1].self_attn
    for ends, expected in ((False, False), (True, True)):
        with last_layer.read_at(lm, torch.tensor([0, 3]), 5, ends):
            assert last_layer.reads_ends(layer) == expected
            assert not last_layer.reads_ends(lm.base_model.layers[0].self_attn)
    assert not last_layer.reads_ends(layer)


def test_all_is_computed_for_whoever_reads_all() -> None:
    lm = build("llama")
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = lm(input_ids=ids).logits
    choose_layout(lm)
    torch.testing.assert_close(lm(input_ids=ids).logits, expected)


def test_layers_that_are_computed_again_are_computed_whole() -> None:
    lm = build("llama").train()
    choose_layout(lm)
    plain = torch.autograd.grad(token_states(lm, BATCH, "flat").square().sum(), list(lm.base_model.parameters()))
    recompute_layers(lm)
    again = torch.autograd.grad(token_states(lm, BATCH, "flat").square().sum(), list(lm.base_model.parameters()))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_rows_without_a_trained_token_have_no_states() -> None:
    lm = build("llama")
    assert choose_layout(lm) == "flat"
    batch = replace(BATCH, response_mask=torch.zeros_like(BATCH.response_mask))
    states = token_states(lm, batch, "flat")
    assert states.shape == (0, lm.config.hidden_size)
    states.sum().backward()


class Experts(torch.nn.Module):
    """As some mixtures of experts are: it tells the router's scores, too."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block(x), x.sum(-1)


def test_a_block_that_tells_more_than_its_output() -> None:
    lm = build("llama")
    layer = lm.base_model.layers[-1]
    expected = token_states(lm, BATCH, "separate")
    layer.mlp = Experts(layer.mlp)
    last_layer.attach(lm)
    layer.mlp.register_forward_hook(lambda _, __, out: out[0])  # what such a layer does
    assert choose_layout(lm) == "flat"
    torch.testing.assert_close(token_states(lm, BATCH, "flat"), expected, atol=2e-6, rtol=1e-5)


def test_a_model_without_such_a_block_stays_as_it_is() -> None:
    lm = build("llama")
    lm.base_model.layers[-1].mlp, layer = torch.nn.Identity(), lm.base_model.layers[-1]
    del layer.mlp
    last_layer.attach(lm)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())
