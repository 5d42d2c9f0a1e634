"""ARGS (Khanov et al., arXiv 2402.01694): a candidate is worth the reward of the text as far as it goes.

No roll-outs, so it costs a scorer's pass over k prefixes per token; but a reward for unfinished text is not what comes of it.
The paper's weight w is 1/α.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.decoding.contract import Completion, Prompt, Tools
from pipeline.decoding.guided import Fork, guided
from pipeline.decoding.prefixes import Prefixes


def decode(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """Completions from the reference, guided by r(prefix ⊕ candidate)."""
    return guided(tools, prompts, prefix_reward, roller="reference", sequences=1)


def prefix_reward(tools: Tools, fork: Fork, prefixes: Prefixes) -> Tensor:
    """Q(s, z) = r(s ⊕ z). [A, k]"""
    rows, width = fork.candidates.shape
    asked = [fork.draws[a].prompt for a in range(rows) for _ in range(width)]
    tokens = fork.candidates.tolist()
    longer = [[*fork.responses[a], token] for a in range(rows) for token in tokens[a]]
    return tools.score(asked, longer).view(rows, width)
