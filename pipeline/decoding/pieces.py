"""Prompts in pieces: each is read, decoded and written by one actor, so that rows never pass through the driver.

A row's random streams are named by its place in the source: who decodes it, and beside whom, does not matter.

Left out: which weights there are (`loading`), the files (`output`), the command (`jobs.decode`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.columns import answer_of, column
from pipeline.config import ConfigError, RunConfig
from pipeline.config_file import validate
from pipeline.decoding import DECODERS
from pipeline.decoding.contract import SCORER_FAILED, Completion, Prompt, Tools, context_of, unusable
from pipeline.decoding.loading import load_models
from pipeline.decoding.output import Pieces
from pipeline.decoding.rescoring import token_logprobs
from pipeline.decoding.scoring import load_scorers
from pipeline.decoding.stage import pad_of
from pipeline.decoding.vllm_engine import VllmSampler
from pipeline.generation import own_stop_ids
from pipeline.layouts import parse_prompt
from pipeline.pretrained import load_config, load_tokenizer
from pipeline.rendering import Renderer
from pipeline.rows import Rows
from pipeline.sources import Chunk, Plan, RawRecord, read
from pipeline.stage import Item
from pipeline.thinker import thoughts_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Some prompts: records first … stop − 1 of a chunk, or prompts of prepared rows at these positions."""

    number: int
    chunk: dict[str, Any] | None = None
    first: int = 0
    stop: int = 0
    rows: str = ""
    positions: tuple[int, ...] = ()

    def item(self) -> Item:
        """As text: Arrow would give every piece the fields of all others."""
        return {"piece": json.dumps(asdict(self))}


def pieces_of_source(found: Plan, size: int, limit: int | None) -> list[Piece]:
    """The first `limit` records of a source, `size` at a time."""
    left, pieces = found.records if limit is None else min(limit, found.records), []
    for chunk in found.chunks:
        records = min(chunk.records, left)
        left -= records
        for first in range(0, records, size):
            pieces.append(Piece(len(pieces), asdict(chunk), first, min(first + size, records)))
    return pieces


def pieces_of_rows(folder: Path, positions: Sequence[int], size: int, limit: int | None) -> list[Piece]:
    """The first `limit` different prompts among prepared rows, `size` at a time."""
    hashes = Rows(folder).prompt_hash[np.asarray(positions, dtype=np.int64)]
    first = np.sort(np.unique(hashes, return_index=True)[1])[:limit]
    places = [int(positions[i]) for i in first]
    starts = range(0, len(places), size)
    return [Piece(n, rows=str(folder), positions=tuple(places[start : start + size])) for n, start in enumerate(starts)]


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a piece, or why it cannot be used."""

    source: str  # file:line
    prompt: Prompt | None
    reason: str = ""
    answer: str | None = None
    from_record: bool = False  # with its right answer, where the scorer wants one


class Made(NamedTuple):
    """One completion and what it answers."""

    source: str
    prompt: Prompt
    index: int  # which of the prompt's completions
    completion: Completion

    def scored(self, score: float | None) -> Made:
        """The same with a scorer's verdict; one that is no number is a failure."""
        fails = score is not None and not np.isfinite(score)
        failure = f"{SCORER_FAILED} on it" if fails else self.completion.failure
        return self._replace(completion=replace(self.completion, score=score, failure=failure))


class DecodePiece:
    """The actor: a piece → nothing but its number; rows, refused rows and counts are in files when it returns."""

    def __init__(self, config: dict[str, Any], weights: dict[str, str], tokenizer: str, folder: str) -> None:
        self.config: RunConfig = validate(config)
        options = self.config
        gpu, trust = options.scaling.gpus_per_worker > 0, options.model.trust_remote_code
        self.decoder = DECODERS[options.decoding.method]
        self.tokenizer = load_tokenizer(tokenizer, trust)
        self.render = Renderer(self.tokenizer, options.data)
        vllm = options.decoding.engine == "vllm"
        own = {role: path for role, path in weights.items() if not (vllm and role == "policy")}
        self.models = load_models(options, own, torch.device("cuda" if gpu else "cpu"))
        self.scorers = load_scorers(options, self.tokenizer, tokenizer, gpu)
        found = [context_of(load_config(path, trust), thoughts_of(path, options.sampling)) for path in weights.values()]
        self.contexts = [context for context in found if context is not None]
        self.pieces = Pieces(Path(folder))
        self.tools = Tools(
            options.sampling,
            options.decoding,
            sorted(self.render.stop_ids.union(*(own_stop_ids(path, trust) for path in {tokenizer, *weights.values()}))),
            pad_of(self.tokenizer),
            self.models,
            dict(self.scorers),
            beta=options.decoding.beta or getattr(options.objective, "beta", None),
            answer=self._answer,
            sampler=VllmSampler(weights["policy"], options) if vllm else None,
        )

    def __call__(self, item: Item) -> Item:
        piece = Piece(**json.loads(item["piece"]))
        asked = [self._fitting(one) for one in self._read(piece)]
        refused = [{"source": one.source, "reason": one.reason} for one in asked if one.prompt is None]
        usable = [one for one in asked if one.prompt is not None]
        started = time.monotonic()
        rows, failed = self._decode(usable) if usable else ([], [])
        unscored = sum(SCORER_FAILED in line["reason"] for line in failed)
        self.pieces.write(piece.number, rows, refused + failed, time.monotonic() - started, unscored)
        return {"piece": piece.number}

    def _read(self, piece: Piece) -> Iterator[Asked]:
        if piece.chunk is None:
            rows = Rows(Path(piece.rows))
            for position in piece.positions:
                yield Asked(rows.source(position), Prompt(rows[position].prompt_ids, int(rows.row_ids[position])))
            return
        for raw in islice(read(Chunk(**piece.chunk)), piece.first, piece.stop):
            yield self._rendered(raw)

    def _rendered(self, raw: RawRecord) -> Asked:
        answer = None
        try:
            content = raw.content()
            ids = self.render.prompt_ids(parse_prompt(content), self.config.sampling.max_new_tokens)
            if "verifiable" in (self.config.sampling.scorer, self.config.decoding.baseline_scorer):
                answer = str(column(content, self.config.evaluation.answer, "evaluation.answer"))
        except ValueError as error:
            return Asked(raw.source, None, str(error))
        return Asked(raw.source, Prompt(ids, raw.row_id), answer=answer, from_record=True)

    def _fitting(self, one: Asked) -> Asked:
        if one.prompt is None:
            return one
        context = min(self.contexts, default=None)
        reason = unusable(one.prompt.ids, context, self.config.sampling.max_new_tokens)
        return one if reason is None else Asked(one.source, None, reason)

    # ----------------------------------------------------------------------------------------------- decoding

    def _decode(self, asked: list[Asked]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Rows of the output, and completions that failed."""
        prompts = [one.prompt for one in asked if one.prompt is not None]
        answers = [one.answer for one in asked] if asked[0].from_record else None
        for scorer in self.scorers.values():
            scorer.begin(prompts, answers)
        started = time.monotonic()
        found = self.decoder.decode(self.tools, prompts)
        seconds = (time.monotonic() - started) / len(found)
        copies = self.config.sampling.per_prompt
        assert len(found) == copies * len(prompts)
        given = [Made(asked[i // copies].source, prompts[i // copies], i % copies, c) for i, c in enumerate(found)]
        scored = self._scored(given)
        failed = [
            {"source": made.source, "reason": f"completion {made.index}: {self._reason(made.completion.failure)}"}
            for made in scored
            if made.completion.failure is not None
        ]
        return self._columns([made for made in scored if made.completion.failure is None], seconds), failed

    def _reason(self, failure: str) -> str:
        """Of a scorer's failure, with what it raised first."""
        raised = next((scorer.failure for scorer in self.scorers.values() if scorer.failure is not None), None)
        return f"{failure} ({raised})" if raised is not None and failure.startswith(SCORER_FAILED) else failure

    def _scored(self, given: list[Made]) -> list[Made]:
        """The same completions with the scorer's verdict as their score: None without a scorer."""
        if "scorer" not in self.scorers:
            return [made.scored(None) for made in given]
        usable = [made for made in given if made.completion.failure is None]
        if not usable:
            return given
        verdicts = iter(
            self.tools.score([made.prompt for made in usable], [m.completion.token_ids for m in usable]).tolist()
        )
        return [made if made.completion.failure is not None else made.scored(next(verdicts)) for made in given]

    def _columns(self, given: list[Made], seconds: float) -> list[dict[str, Any]]:
        """Rows as `output.SCHEMA` has them."""
        others = self._other_logprobs([m.prompt for m in given], [m.completion for m in given])
        return [
            {
                "source": made.source,
                "prompt": self._text(made.prompt.ids),
                "index": made.index,
                "text": self._text(made.completion.token_ids),
                "token_ids": made.completion.token_ids,
                "logprobs": made.completion.logprobs,
                "policy_logprobs": others["policy"][n],
                "reference_logprobs": others["reference"][n],
                "score": made.completion.score,
                "method": self.config.decoding.method,
                "seconds": seconds,
                "details": dict(made.completion.details),
            }
            for n, made in enumerate(given)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _answer(self, ids: Sequence[int]) -> str | None:
        return answer_of(self._text(ids), self.config.evaluation.answer_pattern)

    def _other_logprobs(
        self, prompts: list[Prompt], found: list[Completion]
    ) -> dict[str, Sequence[list[float] | None]]:
        """Log-probabilities under policy and reference, where they were asked for or are at hand."""
        others: dict[str, Sequence[list[float] | None]] = {}
        for role in ("policy", "reference"):
            if self.decoder.logprobs_of == role:
                others[role] = [c.logprobs for c in found]
            elif role in self.config.decoding.logprobs:
                responses = [c.token_ids for c in found]
                others[role] = token_logprobs(self.models[role], prompts, responses, self.tools.pad_id)
            else:
                others[role] = [None] * len(found)
        return others


def check_room(config: RunConfig, context: int | None) -> None:
    """Raises ConfigError where no prompt could fit."""
    if context is not None and config.sampling.max_new_tokens >= context:
        raise ConfigError(
            f"sampling.max_new_tokens: {config.sampling.max_new_tokens} new tokens exceed the model's context of {context}; "
            "lower it"
        )
