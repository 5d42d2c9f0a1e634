"""Controlled decoding (Mudgal et al., arXiv 2310.17022): a candidate is worth what the reference makes of it.

Q^{π_ref}(s, z) = E_{τ ~ π_ref(·|s, z)}[r(s, z, τ)], here by roll-outs of the reference itself (the paper also trains a prefix
scorer, which is left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.decoding.guided import Fork, guided
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.rollouts import RollOut, mean_by_owner, roll_out, scored


def decode(tools: Tools, prompts: Sequence[Prompt], rolled: RollOut = roll_out) -> list[Completion]:
    """Completions from the reference, guided by the mean reward of its own roll-outs."""
    sequences = tools.decoding.candidates * tools.decoding.rollouts
    return guided(tools, prompts, partial(value, rolled=rolled), roller="reference", sequences=sequences)


def value(tools: Tools, fork: Fork, prefixes: Prefixes, rolled: RollOut = roll_out) -> Tensor:
    """Q^{roller}(s, z): the mean reward of each candidate's roll-outs. [A, k]"""
    found = rolled(tools, fork, prefixes)
    rewards = scored(tools, fork, found)
    return mean_by_owner(rewards, found.log_share, found.owner, fork.candidates.numel()).view(fork.candidates.shape)
