"""What a judge is: completions in, scores and failures out. Between the scorers' names and the classifiers, which know no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Texts(NamedTuple):
    """One completion to score."""

    prompt: str
    response: str
    prompt_ids: Sequence[int]  # tokens of the model that sampled
    response_ids: Sequence[int]


Failure = tuple[int, str]
"""Place among what was scored, and the reason."""
Scores = tuple[np.ndarray, list[Failure]]
"""[n] float64, nan where the scorer failed, and the failures."""
Judge = Callable[[Sequence[Texts], bool], Scores]
"""(completions, whether to stay in this process) → scores."""
