"""Forked caches, and guided decoding on them, against models that recompute everything."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoding_speed import Work, ours, recompute, restart
from pipeline.decoding import cache
from pipeline.decoding.prefixes import Prefixes
from tests.test_sampling import PROMPTS, tiny, uncached_logprobs

NAMES = ["llama", "qwen3", "mistral-sliding", "gemma3", "gpt2"]


@pytest.mark.parametrize("name", NAMES)
def test_forks_grow_apart_and_agree_with_the_uncached_model(name):
    """Rows taken twice, left out and reordered; both the fork and the original go on, each with tokens of its own."""
    model, generator = tiny(name), torch.Generator().manual_seed(0)
    histories = [list(prompt) for prompt in PROMPTS]
    with torch.inference_mode():
        prefixes = Prefixes.of(model, histories, 0)
        for take in ([3, 3, 0, 6], [2, 1, 1, 0, 3], [4, 0]):
            fork = prefixes.select(torch.tensor(take))
            forked = [list(histories[i]) for i in take]
            for sequences, own in ((forked, fork), (histories, prefixes)):
                for _ in range(3):
                    tokens = torch.randint(3, 50, (len(own),), generator=generator)
                    own.append(tokens)
                    for history, token in zip(sequences, tokens.tolist(), strict=True):
                        history.append(token)
            _agree(model, forked, fork)
            _agree(model, histories, prefixes)
            prefixes, histories = fork, forked
        prefixes.keep(torch.tensor([1, 1, 0]))
        prefixes.append(torch.tensor([5, 6, 7]))
        _agree(model, [[*histories[i], t] for i, t in ((1, 5), (1, 6), (0, 7))], prefixes)


def _agree(model: torch.nn.Module, histories: list[list[int]], prefixes: Prefixes) -> None:
    exact = torch.cat([uncached_logprobs(model, history, [0]) for history in histories])
    torch.testing.assert_close(prefixes.logprobs, exact, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gpt2"])
def test_rows_of_one_prompt_change_places_where_they_are(name):
    """Three rows of two prompts grow apart, are exchanged and go on; what they share, and a fork, stay as they were. In the
    end rows of one prompt take the places of the other's."""
    model, generator = tiny(name), torch.Generator().manual_seed(3)
    with torch.inference_mode():
        prefixes = Prefixes.of(model, [PROMPTS[0], PROMPTS[2]], 0)
        prefixes.keep(torch.tensor([0, 0, 0, 1, 1, 1]))
        histories = [list(PROMPTS[0])] * 3 + [list(PROMPTS[2])] * 3
        for rows in (None, [1, 1, 0, 5, 3, 3], [2, 2, 2, 4, 5, 3], None, [5, 0, 1, 2, 2, 4]):
            if rows is not None:
                fork, before = prefixes.select(torch.arange(6)), list(histories)
                place = prefixes._cache.layers[0].keys.data_ptr()
                prefixes.keep(torch.tensor(rows))
                if name == "llama":
                    stayed = prefixes._cache.layers[0].keys.data_ptr() == place
                    assert stayed == (rows[0] < 3), "what is exchanged within a prompt is not copied"
                histories = [histories[row] for row in rows]
                fork.append(torch.full((6,), 9))
                _agree(model, [[*history, 9] for history in before], fork)
            tokens = torch.randint(3, 50, (6,), generator=generator)
            prefixes.append(tokens)
            histories = [[*history, token] for history, token in zip(histories, tokens.tolist(), strict=True)]
            _agree(model, histories, prefixes)


def test_room_is_made_again_behind_a_full_buffer(monkeypatch):
    monkeypatch.setattr(cache, "ROOM", 7)
    model, tokens = tiny(), torch.randint(3, 50, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        prefixes = Prefixes.of(model, [[5]], 0)
        for n, token in enumerate(tokens, start=1):
            prefixes.append(torch.tensor([token]))
            if n % 5 == 0:
                _agree(model, [[5, *tokens[:n]]], prefixes)


@pytest.mark.parametrize("name", NAMES)
def test_cached_guided_decoding_equals_the_straightforward_algorithm(name):
    """Candidates from one model, greedy roll-outs by another, some ending early: the same tokens."""
    reference, baseline = tiny(name), tiny(name)
    with torch.no_grad():
        for parameter in baseline.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.7)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[7]]
    work = Work(reference, baseline, prompts, new=6, candidates=4, rollout=3, alpha=0.02, ends=(2, 3, 4, 5, 6, 7))
    found = ours(work)
    assert found == recompute(work)
    if name == "llama":
        assert found == restart(work)
        unguided = ours(work._replace(alpha=1e6))
        assert unguided != found, "the value decided something"
