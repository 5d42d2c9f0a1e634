"""Beam search: the oracle's true optimum, greedy decoding as its smallest case, and transformers' own results."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import DecodingConfig, SamplingConfig
from pipeline.decoding import beam, sampling
from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.errors import UserError
from tests.decoding.tabular import prompts_of, tools
from tests.oracle.cases import larger, small
from tests.test_sampling import PROMPTS, tiny


def test_as_many_beams_as_leaves_find_every_response_in_order_of_probability():
    mdp = small()
    logprob = mdp.sequence_logprob(mdp.ref_logits)
    count = 3**3
    wide = tools(mdp, {"policy": mdp.ref_logits}, beams=count, per_prompt=mdp.size, length_penalty=0.0)
    found = beam.search(wide, prompts_of(mdp))
    for x in range(mdp.prompts):
        own = found[x * mdp.size : (x + 1) * mdp.size]
        order = logprob[x].argsort(descending=True).tolist()
        assert [tuple(c.token_ids) for c in own] == [mdp.responses[n] for n in order]
        scores = torch.tensor([c.score for c in own], dtype=torch.float64)
        torch.testing.assert_close(scores, logprob[x][order], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            torch.tensor([sum(c.logprobs) for c in own], dtype=torch.float64), logprob[x][order], rtol=0, atol=1e-12
        )


def test_likelihood_under_the_optimum_finds_the_response_of_highest_regularised_reward():
    """argmax π* = argmax r + β log π_ref (arXiv 2404.12358, Eq. 12–13)."""
    mdp = larger()
    policy = mdp.conditionals(mdp.optimum)
    found = beam.search(tools(mdp, {"policy": policy}, beams=81, length_penalty=0.0), prompts_of(mdp))
    best = (mdp.reward + mdp.beta * mdp.ref_logprob).argmax(-1).tolist()
    assert [tuple(c.token_ids) for c in found] == [mdp.responses[n] for n in best]
    length = tools(mdp, {"policy": policy}, beams=81, length_penalty=1.0)
    mean = (mdp.optimum / mdp.length).argmax(-1).tolist()
    assert [tuple(c.token_ids) for c in beam.search(length, prompts_of(mdp))] == [mdp.responses[n] for n in mean]


def test_one_beam_is_greedy_decoding():
    mdp = larger()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(mdp.ref_logits.shape, generator=generator, dtype=torch.float64)
        one = beam.search(tools(mdp, {"policy": logits}, beams=1), prompts_of(mdp))
        greedy = sampling.sample(tools(mdp, {"policy": logits}, temperature=0), prompts_of(mdp))
        assert [c.token_ids for c in one] == [c.token_ids for c in greedy]
        assert [c.logprobs for c in one] == [pytest.approx(c.logprobs, abs=1e-12) for c in greedy]


def searched(model: torch.nn.Module, prompts: list[list[int]], ends: list[int], **settings) -> list[Completion]:
    given = {"max_new_tokens": 12, "batch_size": 1000} | settings
    own = {name: given.pop(name) for name in list(given) if name in SamplingConfig.model_fields}
    kit = Tools(SamplingConfig(**own), DecodingConfig(**given), ends, 0, {"policy": model})
    return beam.search(kit, [Prompt(ids, key) for key, ids in enumerate(prompts)])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny()


def test_with_fewer_sequences_at_a_time_than_beams_each_prompt_is_searched_alone(model):
    prompts = [ids for ids in PROMPTS if len(ids) > 1]
    at_once = searched(model, prompts, [2], beams=4)
    for size in (1, 2, 3, 4):
        found = searched(model, prompts, [2], beams=4, batch_size=size)
        assert [c.token_ids for c in found] == [c.token_ids for c in at_once]
        assert [c.score for c in found] == [pytest.approx(c.score, abs=1e-5) for c in at_once]


@pytest.mark.parametrize("penalty", [-50, 50])
@pytest.mark.parametrize("early", [False, "never"])
def test_a_length_penalty_at_its_bounds_scores_every_length(model, penalty, early):
    for completion in searched(model, PROMPTS[:3], [2], beams=2, length_penalty=penalty, early_stopping=early):
        expected = sum(completion.logprobs) / len(completion.token_ids) ** penalty
        assert completion.score == pytest.approx(expected, rel=1e-4)


EARLY = [False, True, "never"]
MANY = [2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("early", "penalty", "ends"),
    [(False, 1.0, [2]), *((early, penalty, MANY) for penalty in (-0.7, 0.0, 1.0) for early in EARLY)],
)
def test_results_are_those_of_transformers(model, early, penalty, ends):
    """Tokens and scores of the 3 best of 4 beams, for prompts of several lengths in one batch."""
    width = max(map(len, PROMPTS))
    theirs = model.generate(
        torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        max_new_tokens=12,
        min_new_tokens=2,
        num_beams=4,
        num_return_sequences=3,
        do_sample=False,
        length_penalty=penalty,
        early_stopping=early,
        eos_token_id=ends,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = searched(
        model,
        PROMPTS,
        ends,
        min_new_tokens=2,
        beams=4,
        per_prompt=3,
        length_penalty=penalty,
        early_stopping=early,
    )
    lengths = (theirs.beam_indices >= 0).sum(-1).tolist()
    whole = zip(found, theirs.sequences[:, width:].tolist(), lengths, theirs.sequences_scores, strict=True)
    for completion, tokens, length, score in whole:
        assert completion.token_ids == tokens[:length]
        assert completion.score == pytest.approx(float(score), abs=1e-4)
    if len(ends) > 1 and penalty <= 0:
        assert len({len(c.token_ids) for c in found}) > 1, "some end before the last token"


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt2"])
def test_a_result_does_not_depend_on_its_batch(name):
    model, ends = tiny(name), [2, 3, 4, 5]
    together = searched(model, PROMPTS, ends, beams=3, per_prompt=2)
    apart = [c for prompt in PROMPTS for c in searched(model, [prompt], ends, beams=3, per_prompt=2)]
    small_batches = searched(model, PROMPTS, ends, beams=3, per_prompt=2, batch_size=7)
    for found in (apart, small_batches):
        assert [c.token_ids for c in found] == [c.token_ids for c in together]
        assert [c.score for c in found] == [pytest.approx(c.score, abs=1e-4) for c in together]


def test_what_cannot_be_found_is_said():
    mdp = small()
    with pytest.raises(UserError, match=r"2 beams find no 3 responses; raise decoding\.beams"):
        beam.search(tools(mdp, {"policy": mdp.ref_logits}, beams=2, per_prompt=3), prompts_of(mdp))
    found = beam.search(tools(mdp, {"policy": mdp.ref_logits}, beams=30, per_prompt=16), prompts_of(mdp)[:1])
    assert [c.failure is None for c in found] == [True] * 15 + [False]
    assert "only 15 responses" in str(found[-1].failure)
