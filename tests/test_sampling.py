"""Sampling: against the uncached model, against exact distributions, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config import DecodingConfig, SamplingConfig
from pipeline.decoding import sampling
from pipeline.decoding.choice import Filters, _nucleus_border, next_tokens, stream
from pipeline.decoding.contract import Completion, Prompt, Tools

VOCABULARY = 50
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6], [20, 21, 22, 23], [30], [31, 32, 33], [34, 35]]
KEYS = list(range(100, 108))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(name: str = "llama") -> torch.nn.Module:
    """A random model whose next-token distributions are far from uniform and differ from prefix to prefix."""
    import transformers as hf

    config = {
        "llama": lambda: hf.LlamaConfig(**SIZES),
        "qwen3": lambda: hf.Qwen3Config(**SIZES),
        "mistral-sliding": lambda: hf.MistralConfig(**SIZES, sliding_window=4),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        "gpt2": lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }[name]()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)
    return model


@pytest.mark.parametrize("filters", [Filters(temperature=2e-38), Filters(top_p=1e-37), Filters(1e-30, top_p=1e-37)])
def test_filters_at_the_edge_of_float32_leave_the_likeliest_token(filters):
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)) * 10
    streams = [stream(0, i, 0, logits.device) for i in range(len(logits))]
    token, logprob = next_tokens(logits, filters, torch.tensor([2]), 0, streams)
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).amax(-1))


def sample(model, prompts, config: SamplingConfig, ends, pad, keys, progress=None, min_p=0.0) -> list[Completion]:
    """The decoder `sampling` with a model of its own."""
    tools = Tools(config, DecodingConfig(min_p=min_p), ends, pad, {"policy": model}, progress=progress)
    return sampling.sample(tools, [Prompt(ids, key) for ids, key in zip(prompts, keys, strict=True)])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny()


@torch.no_grad()
def uncached_logprobs(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """log π(· | prefix) at each response position from one full forward, [R, V]."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) + len(response) - 1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding", "gemma3", "gpt2"])
def test_greedy_decoding_equals_the_uncached_model(name):
    model = tiny(name)
    out = sample(model, PROMPTS, SamplingConfig(max_new_tokens=12, temperature=0, batch_size=5), [], 0, KEYS)
    for prompt, completion in zip(PROMPTS, out, strict=True):
        exact = uncached_logprobs(model, prompt, completion.token_ids)
        assert completion.token_ids == exact.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), exact.max(-1).values, atol=2e-5, rtol=0)


def test_greedy_decoding_equals_transformers_generate(model):
    batch = torch.tensor([PROMPTS[0], PROMPTS[6]])
    theirs = model.generate(batch, max_new_tokens=10, do_sample=False, eos_token_id=[], pad_token_id=0)[:, 3:].tolist()
    ours = sample(model, batch.tolist(), SamplingConfig(max_new_tokens=10, temperature=0), [], 0, [0, 1])
    assert [c.token_ids for c in ours] == theirs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_completion_does_not_depend_on_its_batch(name):
    """Several EOS ids make rows end at different steps, so that the batch is also thinned out on the way."""
    model, ends = tiny(name), [2, 3, 4, 5, 6, 7]
    shape = {"max_new_tokens": 20, "per_prompt": 3, "seed": 7}
    together = sample(model, PROMPTS, SamplingConfig(**shape, batch_size=24), ends, 0, KEYS)
    assert len({len(c.token_ids) for c in together}) > 4
    for size in (1, 5):
        apart = sample(model, PROMPTS, SamplingConfig(**shape, batch_size=size), ends, 0, KEYS)
        assert [c.token_ids for c in apart] == [c.token_ids for c in together]
        for a, b in zip(apart, together, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-5, rtol=0)
    backwards = sample(model, PROMPTS[::-1], SamplingConfig(**shape, batch_size=7), ends, 0, KEYS[::-1])
    expected = [c.token_ids for p in range(7, -1, -1) for c in together[3 * p : 3 * p + 3]]
    assert [c.token_ids for c in backwards] == expected


def test_keys_copies_and_seeds_name_different_streams(model):
    config = SamplingConfig(max_new_tokens=16, per_prompt=2)
    first = sample(model, [PROMPTS[0]] * 2, config, [], 0, [1, 2])
    other_seed = sample(model, [PROMPTS[0]], config.model_copy(update={"seed": 1}), [], 0, [1])
    assert len({tuple(c.token_ids) for c in first + other_seed}) == 6
    assert sample(model, [PROMPTS[0]], config, [], 0, [2])[1].token_ids == first[3].token_ids


def test_logprobs_are_the_models_own_whatever_the_temperature_and_filters(model):
    config = SamplingConfig(max_new_tokens=10, temperature=0.6, top_k=20, top_p=0.8, min_new_tokens=4)
    for prompt, completion in zip(PROMPTS, sample(model, PROMPTS, config, [2, 3], 0, KEYS), strict=True):
        exact = uncached_logprobs(model, prompt, completion.token_ids)
        chosen = exact.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.9},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_frequencies_are_those_of_the_filtered_distribution(model, filters):
    """5000 draws of one token; each probability within four standard errors of the exact one."""
    draws = 5000
    min_p = filters.get("min_p", 0.0)
    others = {name: value for name, value in filters.items() if name != "min_p"}
    config = SamplingConfig(max_new_tokens=1, per_prompt=draws, batch_size=draws, **others)
    drawn = torch.tensor([c.token_ids[0] for c in sample(model, [[5, 6, 7]], config, [], 0, [0], min_p=min_p)])
    exact = brute_force(uncached_logprobs(model, [5, 6, 7], [0])[0], config, min_p)
    frequency = drawn.bincount(minlength=VOCABULARY).float() / draws
    assert (frequency[exact == 0] == 0).all()
    assert ((frequency - exact).abs() <= 4 * (exact * (1 - exact) / draws).sqrt() + 1e-9).all()


def brute_force(logprobs: Tensor, config: SamplingConfig, min_p: float) -> Tensor:
    """The distribution that the settings ask for, [V], token by token."""
    ranked = sorted(range(VOCABULARY), key=lambda v: -logprobs[v])
    if config.top_k:
        ranked = ranked[: config.top_k]
    weights = (logprobs[ranked] / config.temperature).exp()
    weights = weights / weights.sum()
    kept = next(n for n in range(1, len(ranked) + 1) if n == len(ranked) or weights[:n].sum() >= config.top_p)
    kept = min(kept, int((weights >= min_p * weights[0]).sum()))
    exact = torch.zeros(VOCABULARY)
    exact[ranked[:kept]] = weights[:kept] / weights[:kept].sum()
    return exact


def test_eos_ends_a_completion_but_not_before_the_minimum(model):
    ends = list(range(2, 30))
    config = SamplingConfig(max_new_tokens=30, min_new_tokens=5, per_prompt=4)
    lengths = []
    for completion in sample(model, PROMPTS, config, ends, 0, KEYS):
        assert not set(completion.token_ids[:5]) & set(ends)
        assert not set(completion.token_ids[:-1]) & set(ends)
        assert completion.token_ids[-1] in ends or len(completion.token_ids) == 30
        assert len(completion.logprobs) == len(completion.token_ids)
        lengths.append(len(completion.token_ids))
    assert min(lengths) == 6
    assert max(lengths) < 30


def test_progress_counts_every_completion(model):
    seen: list[int] = []
    config = SamplingConfig(max_new_tokens=1, per_prompt=3, batch_size=5)
    sample(model, PROMPTS, config, [], 0, KEYS, progress=seen.append)
    assert seen == [5, 5, 5, 5, 4]


@given(seed=st.integers(0, 10**6), mass=st.floats(0.01, 0.999), spread=st.floats(0, 4), size=st.integers(2, 3000))
@settings(max_examples=40, deadline=None)
def test_nucleus_is_the_smallest_set_that_holds_the_mass(seed, mass, spread, size):
    """Also where the set is wider than the first search (spread 0: a uniform distribution)."""
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * spread
    probs = logits.double().softmax(-1)
    for row, border in zip(probs, _nucleus_border(probs, mass), strict=True):
        ranked = row.sort(descending=True).values
        count = int((ranked.cumsum(-1) - ranked < mass).sum())
        assert border.item() == ranked[count - 1].item()


def test_noise_in_the_logits_rarely_changes_a_token():
    """Logits differ between batch shapes by rounding. The same streams must give the same tokens all the same: at most
    3 of 3,200 draws from a vocabulary of 5,000 change. (Inverting the cumulative distribution: about 40.)"""
    rows, steps, vocabulary = 64, 50, 5000
    noise = torch.Generator().manual_seed(0)
    changed = 0
    plain, shaken = ([stream(0, r, 0, torch.device("cpu")) for r in range(rows)] for _ in range(2))
    for step in range(steps):
        logits = torch.randn(rows, vocabulary, generator=noise) * 3
        moved = logits + torch.randn(rows, vocabulary, generator=noise) * 1e-4
        none = torch.tensor([], dtype=torch.long)
        token = next_tokens(logits, Filters(), none, step, plain)[0]
        changed += int((token != next_tokens(moved, Filters(), none, step, shaken)[0]).sum())
    assert changed <= 3


def test_unusable_prompts_and_models_are_refused(model):
    config = SamplingConfig(max_new_tokens=10)
    with pytest.raises(ValueError, match=r"prompt 1: it has no tokens.*BOS"):
        sample(model, [[5], []], config, [], 0, [0, 1])
    with pytest.raises(ValueError, match=r"prompt 0: 55 tokens \+ 10 new ones exceed.*64.*max_new_tokens"):
        sample(model, [[5] * 55], config, [], 0, [0])
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="nan or infinite"):
        sample(broken, [[5]], config, [], 0, [0])
