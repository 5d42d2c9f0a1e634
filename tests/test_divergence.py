"""Sequence KL: against one full forward, and against the enumeration of all responses."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import SamplingConfig
from pipeline.evaluation import divergence
from pipeline.evaluation.divergence import Passes, samples_its_own_distribution, sequence_kl

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11], [12]]
COMPLETIONS = [[3, 4], [5, 6, 7, 8, 9, 10, 11], [8], [9, 9, 9], []]


def tiny(name: str, seed: int, vocabulary: int = 40) -> torch.nn.Module:
    """A random two-layer model with peaked next-token distributions."""
    import transformers as hf

    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "pad_token_id": None,
    }
    config = {
        "llama": lambda: hf.LlamaConfig(**sizes),
        "gemma2-capped": lambda: hf.Gemma2Config(**sizes, final_logit_softcapping=2.0, sliding_window=4),
        "gpt2": lambda: hf.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    }[name]()
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)
    return model


@torch.no_grad()
def full_logprobs(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log π(· | prefix) at the completion's positions, [R, V] float64, one sequence at a time and without a cache."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) + len(completion) - 1]


@pytest.mark.parametrize("name", ["llama", "gemma2-capped", "gpt2"])
@pytest.mark.parametrize(("batch_tokens", "chunk_bytes"), [(1000, 2**26), (1000, 4 * 40 * 10), (1, 1)])
def test_both_estimates_equal_one_full_forward(name, batch_tokens, chunk_bytes, monkeypatch):
    """For one batch, for pieces of two positions, and for one row and one position at a time."""
    monkeypatch.setattr(divergence, "LOGIT_CHUNK_BYTES", chunk_bytes)
    policy, reference = tiny(name, 0), tiny(name, 1)
    found = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, batch_tokens)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_pi, log_ref = full_logprobs(policy, prompt, completion), full_logprobs(reference, prompt, completion)
        chosen = torch.tensor(completion, dtype=torch.long)[:, None]
        assert found.exact[i].item() == pytest.approx((log_pi.exp() * (log_pi - log_ref)).sum().item(), abs=1e-4)
        assert found.sampled[i].item() == pytest.approx((log_pi - log_ref).gather(-1, chosen).sum().item(), abs=1e-4)
    assert found.exact[:4].min() > 0.1
    assert found.exact[4] == found.sampled[4] == 0


def test_no_chunk_of_logits_exceeds_the_bound(monkeypatch):
    monkeypatch.setattr(divergence, "LOGIT_CHUNK_BYTES", 4 * 40 * 5 * 2)
    policy = tiny("llama", 0)
    seen = []
    policy.lm_head.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[0] * out.shape[1]))
    sequence_kl(policy, tiny("llama", 1), PROMPTS, COMPLETIONS, 1000)
    assert sum(seen) == 5 * 7  # every response position once; of the prompts, the last one alone
    assert max(seen) <= 10


def test_expectation_over_all_responses_is_the_sequence_kl():
    """All 27 responses of 3 tokens over 3 words: Σ_y π(y) estimate(y) = Σ_y π(y) log π(y)/π_ref(y)."""
    policy, reference = tiny("llama", 0, vocabulary=3), tiny("llama", 1, vocabulary=3)
    responses = [list(y) for y in itertools.product(range(3), repeat=3)]
    found = sequence_kl(policy, reference, [[0]] * 27, responses, 1000)

    def log_probability(model, response):
        return full_logprobs(model, [0], response).gather(-1, torch.tensor(response)[:, None]).sum()

    log_pi = torch.stack([log_probability(policy, y) for y in responses])
    log_ref = torch.stack([log_probability(reference, y) for y in responses])
    assert log_pi.exp().sum().item() == pytest.approx(1, abs=1e-6)
    sequence = (log_pi.exp() * (log_pi - log_ref)).sum().item()
    assert sequence > 0.1
    assert (log_pi.exp() * found.exact).sum().item() == pytest.approx(sequence, abs=1e-5)
    assert (log_pi.exp() * found.sampled).sum().item() == pytest.approx(sequence, abs=1e-5)
    spread = [(log_pi.exp() * (x - sequence) ** 2).sum().item() for x in (found.exact, found.sampled)]
    assert spread[0] < spread[1] / 2


def test_a_policy_costs_nothing_against_itself():
    policy = tiny("llama", 0)
    found = sequence_kl(policy, policy, PROMPTS, COMPLETIONS, 1000)
    assert found.exact.abs().max() == 0
    assert found.sampled.abs().max() == 0


def test_a_word_that_both_exclude_adds_nothing():
    """Its term is 0 · (−inf + inf)."""
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    before = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, 1000)
    for model in (policy, reference):
        model.lm_head.register_forward_hook(
            lambda _module, _inputs, out: out.index_fill(-1, torch.tensor([0]), -math.inf)
        )
    found = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, 1000)
    assert found.exact.isfinite().all()
    assert (found.exact[:4] != before.exact[:4]).all()


def test_a_forward_that_always_yields_all_logits_gives_the_same():
    """Models with code of their own need not know `logits_to_keep`."""
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    expected = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, 1000)
    for model in (policy, reference):
        model.forward = functools.partial(all_logits, model.forward)
    found = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, 1000)
    torch.testing.assert_close(found.exact, expected.exact)


def all_logits(forward, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=None):
    return forward(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
    )


def test_different_vocabularies_are_refused():
    with pytest.raises(ValueError, match="40 and 41 tokens; use one tokenizer"):
        sequence_kl(tiny("llama", 0), tiny("llama", 0, vocabulary=41), PROMPTS, COMPLETIONS, 1000)


def test_entropy_along_the_completion_equals_one_full_forward():
    policy, reference = tiny("llama", 0), tiny("llama", 1)
    found = sequence_kl(policy, reference, PROMPTS, COMPLETIONS, 40)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_pi = full_logprobs(policy, prompt, completion)
        assert found.entropy[i].item() == pytest.approx(-(log_pi.exp() * log_pi).sum().item(), abs=1e-4)
    assert found.entropy[:4].min() > 0.5


def test_the_other_direction_is_the_models_swapped():
    """KL(π_ref ‖ π) = Σ_y π_ref(y) estimate(y), over all 9 responses of 2 tokens over 3 words; the directions differ."""
    policy, reference = tiny("llama", 0, vocabulary=3), tiny("llama", 1, vocabulary=3)
    responses = [list(y) for y in itertools.product(range(3), repeat=2)]
    forward = sequence_kl(policy, reference, [[0]] * 9, responses, 1000)
    reverse = sequence_kl(reference, policy, [[0]] * 9, responses, 1000)
    log_pi, log_ref = (
        torch.stack([full_logprobs(m, [0], y).gather(-1, torch.tensor(y)[:, None]).sum() for y in responses])
        for m in (policy, reference)
    )
    expected = (log_ref.exp() * (log_ref - log_pi)).sum().item()
    assert (log_ref.exp() * reverse.exact).sum().item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(reverse.sampled, -forward.sampled, atol=1e-5, rtol=0)
    assert abs((log_pi.exp() * forward.exact).sum().item() - expected) > 0.005


def test_numbers_are_averaged_by_prompt_and_by_token():
    """Two prompts × two completions: per completion ((1 + 3)/2 + (2 + 6)/2)/2, per token 12 / (1 + 3 + 2 + 2)."""
    exact, tokens = np.array([[1.0, 3.0], [2.0, 6.0]]), np.array([[1.0, 3.0], [2.0, 2.0]])
    passes = Passes(exact, exact, exact, tokens)
    assert passes.per_completion("exact").value == pytest.approx(3.0)
    assert passes.per_completion("exact").standard_error == pytest.approx(1.0)
    assert passes.per_token("exact").value == pytest.approx(12 / 8)


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.9}, False),
        ({"min_new_tokens": 1}, False),
    ],
)
def test_samples_of_another_distribution_are_no_samples_of_the_model(change, plain):
    assert samples_its_own_distribution(SimpleNamespace(sampling=SamplingConfig(**change))) == plain
