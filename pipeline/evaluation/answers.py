"""The right answers of the prompts that were sampled from: a column of the records that the prompts came from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

from pipeline.columns import column
from pipeline.config import ConfigError, RunConfig
from pipeline.layouts import parse_prompt
from pipeline.pretrained import load_tokenizer
from pipeline.rendering import Renderer
from pipeline.sources import RawRecord, plan, read

FIRST = 100
"""Records that are looked at before any work."""


def read_answers(config: RunConfig, model: str, wanted: Collection[str]) -> dict[str, str]:
    """Prompt text → answer, for those of the `wanted` prompts that have one.

    Reads `sampling.prompts`, or else the sources of the held-out rows, column `evaluation.answer`. Prompts are compared as
    texts, cut and decoded as they were for sampling. Raises ConfigError where two records answer one prompt differently.
    """
    tokenizer = load_tokenizer(model, config.model.trust_remote_code)
    render = Renderer(tokenizer, config.data)
    answers: dict[str, str] = {}
    for raw in _records(config):
        try:
            content = raw.content()
            answer = column(content, config.evaluation.answer, "evaluation.answer")
            ids = render.prompt_ids(parse_prompt(content), config.sampling.max_new_tokens)
        except ValueError:  # it could not be a prompt, or has no answer: such a prompt counts as failed
            continue
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text in wanted and answers.setdefault(text, str(answer)) != str(answer):
            raise ConfigError(
                f"evaluation.answer: {raw.source} answers a prompt with {str(answer)!r} that another record answers with "
                f"{answers[text]!r}; remove one"
            )
    return answers


def check_column(config: RunConfig) -> None:
    """Raises ConfigError where none of the first records has the column `evaluation.answer`."""
    reason = "there is no record"
    for raw in islice(_records(config), FIRST):
        try:
            column(raw.content(), config.evaluation.answer, "evaluation.answer")
            return
        except ValueError as error:
            reason = str(error)
    raise ConfigError(f"evaluation.answer: no answer in the first records ({reason}); name the prompts' column with it")


def _records(config: RunConfig) -> Iterator[RawRecord]:
    asked = config.sampling.prompts
    sources = [asked] if asked is not None else list(config.data.eval_sources or config.data.sources)
    key = (
        "sampling.prompts" if asked is not None else "data.eval_sources" if config.data.eval_sources else "data.sources"
    )
    work, bound = Path(config.storage) / "cache" / "sources", config.data.max_record_bytes
    for chunk in plan(sources, work, key=key, max_record_bytes=bound).chunks:
        yield from read(chunk)
