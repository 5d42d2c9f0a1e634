"""Majority vote: of n samples, one whose answer most of them agree on (self-consistency, arXiv 2203.11171).

The answer is what `evaluation.answer_pattern` finds last in a response; a sample without one has no vote. Where a model thinks and
`sampling.thought_noise` is set, each sample has thoughts of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.columns import matches
from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.decoding.sampling import draw


def vote(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """Completion i of a prompt is elected by its samples i·n … i·n + n − 1: the first with the answer that most have.

    Of answers with equal votes the first one; where no sample has an answer, there is no completion.
    """
    n, copies = tools.decoding.n, tools.sampling.per_prompt
    found = draw(tools, prompts, n * copies)
    return [
        _elected(tools, [found[p, i * n + j] for j in range(n)]) for p in range(len(prompts)) for i in range(copies)
    ]


def _elected(tools: Tools, samples: list[Completion]) -> Completion:
    assert tools.answer is not None, "a vote is on answers"
    votes: list[tuple[str, list[int]]] = []  # answers and the samples that have them
    for place, sample in enumerate(samples):
        said = tools.answer(sample.token_ids)
        if said is None:
            continue
        party = next((members for answer, members in votes if matches(said, answer)), None)
        if party is None:
            votes.append((said, [place]))
        else:
            party.append(place)
    if not votes:
        return Completion([], [], failure=f"none of {len(samples)} samples has an answer (evaluation.answer_pattern)")
    members = max((members for _, members in votes), key=len)
    chosen = samples[members[0]]
    details = {"n": float(len(samples)), "votes": float(len(members)), "answers": float(len(votes))}
    return Completion(chosen.token_ids, chosen.logprobs, len(members) / len(samples), details)
