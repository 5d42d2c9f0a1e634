"""The packed forward equals separate forwards, in value and gradient, for every kind of attention we meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.collate import collate
from pipeline.config import ConfigError, LoraSection
from pipeline.contracts import Row
from pipeline.model import OutputHead, Policy
from pipeline.packing import refuses_embeddings
from pipeline.trunk import token_states

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
HEADED = BASE | {"head_dim": 16}
ARCHITECTURES = {
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": HEADED,
    "gemma": HEADED,
    "gemma3_text": HEADED | {"sliding_window": 4},
    "mistral": BASE | {"sliding_window": 4},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "granite": BASE | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": BASE | {"logit_scale": 0.3},
}
ROWS = [
    Row(0, [5, 6, 7, 8, 9, 10, 11], [[20, 21, 22, 23, 24, 25], [30, 31]]),
    Row(1, [40], [[41, 42, 43], [44], [45, 46]]),
]


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def separately(lm: torch.nn.Module, row: Row, k: int) -> torch.Tensor:
    """Log-probs of one response by the model's own forward on [prompt | response], the plainest way there is."""
    ids = torch.tensor([row.prompt_ids + row.response_ids[k]])
    logprobs = lm(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(row.response_ids[k])[:, None])[:, 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_forward_equals_separate_forwards(name: str, attention: str) -> None:
    lm = build(name, attention=attention)
    policy = Policy(lm)
    assert policy.layout == ("flat" if attention == "sdpa" else "rows")
    logprobs = policy(collate(ROWS)).logprobs
    for b, row in enumerate(ROWS):
        for k, response in enumerate(row.response_ids):
            torch.testing.assert_close(logprobs[b, k, : len(response)], separately(lm, row, k), atol=2e-5, rtol=1e-5)
    assert (logprobs[~collate(ROWS).response_mask] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_flex_attention_equals_sdpa(name: str) -> None:
    """Its forward; uncompiled, for want of a GPU. Its backward pass has no CPU form."""
    torch.compiler.set_stance("force_eager")
    try:
        policy = Policy(build(name, attention="flex_attention"))
        assert policy.layout == "flat"
        with torch.no_grad():
            flex, sdpa = (p(collate(ROWS)).logprobs for p in (policy, Policy(build(name))))
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(flex, sdpa, atol=2e-5, rtol=1e-5)


def test_where_flex_attention_cannot_be_compiled_rows_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors for which there is no compiler; what it is compared with needs none."""

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel for this processor")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", refuse)
    lm = build("llama", attention="flex_attention")
    assert refuses_embeddings(lm) is None
    policy = Policy(lm)
    assert (policy.layout, lm.config._attn_implementation) == ("rows", "sdpa")
    assert torch._dynamo.config.recompile_limit >= 64
    torch.testing.assert_close(policy(collate(ROWS)).logprobs, Policy(build("llama"))(collate(ROWS)).logprobs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on GPUs only")
def test_flex_attention_has_the_gradients_of_sdpa() -> None:
    grads = []
    for attention in ("flex_attention", "sdpa"):
        policy = Policy(build("llama", attention=attention).cuda())
        policy(collate(ROWS).to("cuda")).logprobs.sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_gradients_equal_those_of_separate_forwards(name: str) -> None:
    lm = build(name)
    torch.manual_seed(1)
    weights = [[torch.randn(len(r)) for r in row.response_ids] for row in ROWS]
    policy, batch = Policy(lm), collate(ROWS)
    out = policy(batch).logprobs
    total = sum((out[b, k, : len(w)] * w).sum() for b, row in enumerate(weights) for k, w in enumerate(row))
    packed = torch.autograd.grad(total, list(lm.parameters()))
    apart = sum((separately(lm, ROWS[b], k) * w).sum() for b, row in enumerate(weights) for k, w in enumerate(row))
    for one, other in zip(packed, torch.autograd.grad(apart, list(lm.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_bfloat16_stays_within_its_rounding() -> None:
    exact = Policy(build("llama"))(collate(ROWS)).logprobs
    rounded = Policy(build("llama", torch.bfloat16))(collate(ROWS)).logprobs
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.01)


def test_a_model_that_ignores_masks_falls_back_to_separate_rows(caplog: pytest.LogCaptureFixture) -> None:
    lm = build("llama")
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(10)  # freshly initialised weights barely look at the context
    inner = lm.model.forward

    def deaf(
        *args, attention_mask=None, position_ids=None, **kwargs
    ):  # like a recurrent model: causal order is all it knows
        return inner(*args, **kwargs)

    lm.model.forward = deaf
    policy = Policy(lm)
    assert policy.layout == "separate"
    assert "block mask" in caplog.text
    logprobs = policy(collate(ROWS)).logprobs
    for b, row in enumerate(ROWS):
        for k, response in enumerate(row.response_ids):
            torch.testing.assert_close(logprobs[b, k, : len(response)], separately(lm, row, k), atol=2e-5, rtol=1e-5)


def test_unknown_transformation_of_logits_is_refused() -> None:
    lm = build("llama")
    lm.register_forward_hook(lambda module, args, out: out.__class__(logits=out.logits * 2))
    with pytest.raises(ConfigError, match="transforms its logits"):
        Policy(lm)


NOISY = {
    "gpt2": {},  # its own default is 0.1
    "starcoder2": BASE | {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5},
    "mixtral": BASE | {"num_local_experts": 4, "router_jitter_noise": 0.9},
    "opt": BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5},
    "xglm": BASE | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "activation_dropout": 0.5},
}


def test_a_router_that_evaluates_with_its_noise_keeps_it_and_is_refused() -> None:
    """PhiMoE drops experts by the size of its noise, in evaluation as well, and draws among the others in training."""
    torch.manual_seed(0)
    settings = BASE | {"num_local_experts": 4, "router_jitter_noise": 0.9}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **settings)).eval()
    ids = torch.arange(3, 9)[None]
    expected = lm(input_ids=ids).logits
    with pytest.raises(ConfigError, match="draws random numbers while it trains"):
        Policy(lm)
    assert torch.equal(lm.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", NOISY)
def test_nothing_is_random_in_training_so_that_step_zero_is_the_reference(name: str) -> None:
    config = AutoConfig.for_model(name, **(ARCHITECTURES.get(name, {}) | NOISY[name]))
    before = config.to_dict()
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    batch = collate(ROWS)
    assert not torch.equal(*(lm.train()(input_ids=batch.input_ids).logits for _ in range(2))), "random by itself"
    policy = Policy(lm)
    still, trained = policy.eval()(batch).logprobs, policy.train()(batch).logprobs
    torch.testing.assert_close(trained, still, atol=1e-5, rtol=0)
    assert lm.config.to_dict() == before, "an export has the model's own"


def test_a_model_that_stays_random_in_training_is_refused() -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("persimmon", **BASE | {"attention_dropout": 0.9}))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(10)  # freshly initialised weights barely look at the context
    with pytest.raises(ConfigError, match=r"draws random numbers while it trains.*set dropout"):
        Policy(lm)


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        policy = Policy(build("llama")).train()
        if recompute:
            policy.enable_activation_checkpointing()
        policy(collate(ROWS)).logprobs.sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def exact_kl(of: torch.nn.Module, to: torch.nn.Module, row: Row, k: int) -> torch.Tensor:
    """KL(of ‖ to) before each token of one response, from whole logits."""
    ids = torch.tensor([row.prompt_ids + row.response_ids[k]])
    p, q = (lm(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float().log_softmax(-1) for lm in (of, to))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_kl_to_the_frozen_reference_is_exact_and_only_the_policy_gets_a_gradient(kl: str) -> None:
    lm, frozen = build("llama"), build("llama")
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.3 * torch.randn_like(p))
    policy, batch = Policy(lm, kl=kl, frozen=frozen), collate(ROWS)
    out = policy(batch).kl
    assert (out[~batch.response_mask] == 0).all()
    expected = torch.zeros_like(out)
    for b, row in enumerate(ROWS):
        for k, response in enumerate(row.response_ids):
            of, to = (frozen, lm) if kl == "forward" else (lm, frozen)
            expected[b, k, : len(response)] = exact_kl(of, to, row, k)
    assert expected.max() > 0.05
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    weights = torch.rand(out.shape)
    ours = torch.autograd.grad((out * weights).sum(), list(lm.parameters()))
    plain = torch.autograd.grad((expected * weights).sum(), list(lm.parameters()))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)
    assert all(p.grad is None for p in frozen.parameters())
    assert not any(p is q for p in policy.parameters() for q in frozen.parameters()), "the engine never sees it"


@pytest.mark.parametrize(("name", "lora"), [("granite", None), ("llama", LoraSection(r=4, alpha=8))])
def test_cached_states_give_the_kl_and_the_gradient_of_the_live_reference(name: str, lora: LoraSection | None) -> None:
    frozen, batch = build(name), collate(ROWS)  # granite's head scales the logits
    cached = replace(batch, ref_states=token_states(frozen, batch, "separate").detach())
    found = []
    for given, beside in ((batch, frozen), (cached, OutputHead(frozen))):
        policy = Policy(build(name), lora, kl="forward", frozen=None if lora else beside)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_((1.0 if lora else 0.3) * torch.randn_like(p) * p.requires_grad)
        out = policy(given)
        trained = [p for p in policy.parameters() if p.requires_grad]
        found.append([out.logprobs, out.kl, *torch.autograd.grad(out.kl.sum(), trained)])
    assert found[0][1].max() > 0.01
    for live, read in zip(*found, strict=True):
        torch.testing.assert_close(read, live, atol=2e-5, rtol=1e-4)


def test_lora_trains_adapters_only_and_its_reference_is_the_base_model() -> None:
    base = build("llama")
    policy = Policy(build("llama"), LoraSection(r=4, alpha=8), kl="reverse")
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert policy(collate(ROWS)).kl.abs().max() < 1e-6
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    out = policy(collate(ROWS))
    assert (out.logprobs - Policy(base)(collate(ROWS)).logprobs).abs().max() > 0.1
    out.kl.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad), "the adapter is on again"
    merged = policy.merged()
    torch.testing.assert_close(Policy(merged)(collate(ROWS)).logprobs, out.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.kl[0, 0, :6], exact_kl(merged, base, ROWS[0], 0), atol=2e-4, rtol=1e-3)


def test_lora_on_modules_that_do_not_exist_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules"):
        Policy(build("llama"), LoraSection(target_modules=("no_such_module",)))
