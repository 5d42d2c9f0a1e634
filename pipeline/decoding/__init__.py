"""Decoding: from prompts to completions.

A decoder is a function of the signature of `sampling.sample`. `stage` runs one over many prompts, in this process or
as Ray Data actors. Adding a decoder is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.decoding.sampling import Completion, sample

DECODERS: dict[str, Callable[..., list[Completion]]] = {"sampling": sample}
