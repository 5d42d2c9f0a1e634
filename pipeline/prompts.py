"""Prompts to generate from: a source of their own, or those of the held-out rows. The same tokens that training sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError, RunConfig
from pipeline.driver import Prepared
from pipeline.generation import own_stop_ids
from pipeline.layouts import parse_prompt
from pipeline.pretrained import load_tokenizer
from pipeline.rendering import Renderer
from pipeline.rows import Rows
from pipeline.sources import plan, read


@dataclass(frozen=True, slots=True)
class Prompts:
    """What to generate from."""

    ids: list[list[int]]
    texts: list[str]  # as a scorer reads them: without special tokens
    stop_ids: frozenset[int]
    refused: list[dict[str, str]]  # source and reason of those that cannot be used


def read_prompts(config: RunConfig, prepared: Prepared) -> Prompts:
    """The first `sampling.limit` usable prompts. Raises ConfigError when there is none."""
    tokenizer = load_tokenizer(prepared.model, config.model.trust_remote_code)
    render = Renderer(tokenizer, config.data)
    refused: list[dict[str, str]] = []
    ids: list[list[int]] = []
    if config.sampling.prompts is None:
        rows = Rows(prepared.rows)
        split = rows.split(config.data, config.seed)
        positions = split.eval if len(split.eval) else split.train
        ids = list(dict.fromkeys(tuple(rows[int(i)].prompt_ids) for i in positions))
        ids = [list(prompt) for prompt in ids]
    else:
        work, bound = Path(config.storage) / "cache" / "sources", config.data.max_record_bytes
        found = plan([config.sampling.prompts], work, key="sampling.prompts", max_record_bytes=bound)
        for raw in (raw for chunk in found.chunks for raw in read(chunk)):
            try:
                ids.append(render.prompt_ids(parse_prompt(raw.content()), config.sampling.max_new_tokens))
            except ValueError as error:
                refused.append({"source": raw.source, "reason": str(error)})
    ids = ids[: config.sampling.limit]
    if not ids:
        why = f" ({refused[0]['reason']})" if refused else ""
        raise ConfigError(f"sampling.prompts: no usable prompt{why}; check the file and its columns")
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    stops = render.stop_ids | own_stop_ids(prepared.model, config.model.trust_remote_code)
    return Prompts(ids, texts, stops, refused)
