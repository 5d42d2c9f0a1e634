"""What a metric means: looked up where it is defined, so that the page and the code cannot disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"<\w+>")


def definition(name: str) -> str:
    """The meaning of an evaluation's metric; empty where nobody defines it (an evaluator of the user's own)."""
    from pipeline.evaluation.findings import METRICS as measured
    from pipeline.metrics import METRICS as trained

    if name.startswith("eval/") and (found := look_up(trained, name.removeprefix("eval/"))):
        return f"{found}; on held-out rows"
    return look_up(measured, name)


def look_up(definitions: Mapping[str, str], name: str) -> str:
    """`definitions[name]`, or that of the first key whose <placeholders> fit the name; empty if none does."""
    if name in definitions:
        return definitions[name]
    patterns = ((".+".join(map(re.escape, _PLACEHOLDER.split(key))), meaning) for key, meaning in definitions.items())
    return next((meaning for pattern, meaning in patterns if re.fullmatch(pattern, name)), "")
