"""`--dry-run`: what a job would read, train and need, without writing or starting anything."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.prepare import describe
from pipeline.config import RunConfig, ScalingConfig

if TYPE_CHECKING:
    from pipeline.data import Summary
    from pipeline.rendering import Rendered
    from pipeline.sources import Chunk

LOOK_AT_BYTES = 16 * 2**20
"""Input that is really read and tokenised; the rest is counted only."""


def preview(config: RunConfig) -> str:
    """A report for people. Raises the errors that the job itself would raise."""
    from pipeline import data, preflight
    from pipeline.export import intact
    from pipeline.order import steps_per_epoch
    from pipeline.pretrained import load_tokenizer
    from pipeline.sources import plan

    preflight.check(config)
    cache = Path(config.storage) / "cache"
    model = intact(config.model.path, cache, "model.path", config.model.trust_remote_code)
    preflight.check_models(config, model)
    tokenizer = load_tokenizer(model, config.model.trust_remote_code)
    with TemporaryDirectory() as work:
        bounds = {"max_record_bytes": config.data.max_record_bytes, "limit": config.data.limit}
        plan(config.data.eval_sources, Path(work), key="data.eval_sources", **bounds)
        reading = plan(config.data.sources, Path(work), chunk_bytes=data.CHUNK_BYTES, **bounds)
        found, lengths, first, warnings = look(config, tokenizer, reading.chunks[: LOOK_AT_BYTES // data.CHUNK_BYTES])
        whole = found.records == reading.records
        if whole or not found.rows:
            data.refuse(config.data, found, "--dry-run writes no quarantine file", reading.chunks)
    lines = [] if whole else [f"looked at the first {found.records:,} of {reading.records:,} records:"]
    lines += [describe(found), *(f"warning    {warning}" for warning in warnings)]
    rows = max(1, round(reading.records * found.rows / found.records * (1 - config.data.eval_fraction)))
    steps = config.train.epochs * steps_per_epoch(rows, config.train.rows_per_step)
    lines.append(
        f"steps      {min(steps, config.train.max_steps or steps):,} of {config.train.rows_per_step} rows each"
    )
    lines += ["", "tokens per row (prompt + all responses)", *histogram(np.array(lengths))]
    if first is not None:
        lines += ["", f"sample     {first[0]}", *first[1]]
    return "\n".join([*lines, "", *memory(config, model, lengths)])


def look(
    config: RunConfig, tokenizer: Any, chunks: Sequence[Chunk]
) -> tuple[Summary, list[int], tuple[str, list[str]] | None, list[str]]:
    """Read and tokenise some chunks: what became of their records, the rows' lengths, a first row with its source, and warnings."""
    from pipeline.data import make_rows, summarise
    from pipeline.layouts import parse
    from pipeline.rendering import Renderer
    from pipeline.rows import weightless
    from pipeline.sources import read

    render = Renderer(tokenizer, config.data)
    shown = [_shown(chunk) for chunk in chunks]
    made = [
        make_rows(chunk, render, config.objective.needed().mismatched, most)
        for chunk, most in zip(chunks, shown, strict=True)
    ]
    rows = [row for part in made for row in part.rows]
    lengths = [len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows]
    found = summarise([part.counts() for part in made])
    if not rows:
        return found, lengths, None, []
    warnings = weightless(config.data, *(np.array([row[name] for row in rows]) for name in ("weight", "source_index")))
    chunk, raw = next((c, raw) for c in chunks for raw in read(c) if raw.row_id == rows[0]["row_id"])
    rendered = render(parse(raw.content(), config.data.kind, config.data.ties))
    fields = mapped_fields(raw.content(), config.data.sources[chunk.source_index].columns, rows[0]["weight"])
    return found, lengths, (raw.source, fields + sample(tokenizer, rendered, config.data.kind)), warnings


def mapped_fields(content: Mapping[str, Any], columns: Mapping[str, str], weight: float) -> list[str]:
    """What each mapped column holds in a record, and the record's weight where it is not 1."""
    lines = [f"  {ours:10} ← {theirs} = {reprlib.repr(content[ours])}" for ours, theirs in columns.items()]
    return lines if weight == 1 or "weight" in columns else [*lines, f"  weight     {weight:g}"]


def _shown(chunk: Chunk) -> int:
    """Records to look at: a compressed file is one chunk, whatever it unpacks to."""
    return math.ceil(chunk.records * min(1.0, LOOK_AT_BYTES / max(1, chunk.stop - chunk.start)))


def histogram(lengths: np.ndarray, bins: int = 8) -> list[str]:
    """A text histogram."""
    counts, edges = np.histogram(lengths, bins=bins)
    width = 40 / max(1, counts.max())
    return [
        f"  {int(low):>6}–{int(high):<6} {'█' * round(count * width):40} {count:,}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]


def sample(tokenizer: Any, rendered: Rendered, kind: str) -> list[str]:
    """One rendered and tokenised record: [trained on], {the environment's}, ⟨the reward that lands on the token before⟩."""
    prompt = tokenizer.decode(rendered.prompt_ids)
    lines = [f"  prompt     {prompt!r} ({len(rendered.prompt_ids)} tokens, not trained on)"]
    for k, response in enumerate(rendered.response_ids):
        trained = rendered.trained[k] if rendered.trained else [True] * len(response)
        rewards = rendered.token_rewards[k] if rendered.token_rewards else [0.0] * len(response)
        ends = rendered.step_ends[k] if rendered.step_ends else []
        pieces = []
        for i, token in enumerate(response):
            text = tokenizer.decode([token]).replace("\n", "⏎")
            pieces.append(f"[{text}]" if trained[i] else f"{{{text}}}")
            if rewards[i] or i in ends:
                pieces.append(f"⟨{rewards[i]:+g}⟩")
        about = [f"{len(response)} tokens"]
        if not all(trained):
            about.append(f"{trained.count(False)} of them the environment's")
        if kind == "unpaired":
            about.append("good" if sum(rewards) > 0 else "bad")
        elif rendered.token_rewards:
            about.append(f"{len(ends)} steps, return {sum(rewards):g}")
        if rendered.behaviour_logprobs and rendered.behaviour_logprobs[k] is not None:
            about.append(f"behaviour log-prob {rendered.behaviour_logprobs[k]:g}")
        lines.append(f"  response {k + 1} {''.join(pieces)} ({', '.join(about)})")
    return lines


def _workers(scaling: ScalingConfig) -> str:
    """How many, in words; an elastic run needs most memory per worker where it has the fewest."""
    if not scaling.elastic:
        return "one worker" if scaling.workers == 1 else f"{scaling.workers} workers"
    return f"with {scaling.least_workers} of at most {scaling.most_workers} workers"


def memory(config: RunConfig, model: str, lengths: list[int]) -> list[str]:
    """Parameter count and an estimate of one worker's memory.

    Weights, gradients and optimizer: `estimate.state_bytes`. Activations: about
    16 bytes·hidden·layers per token in float32 (half in bfloat16, hidden·layers·4 with activation checkpointing); logits: one chunk.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.estimate import state_bytes
    from pipeline.ops import LOGIT_CHUNK_BYTES
    from pipeline.pretrained import precision
    from pipeline.zero import unshared

    settings = AutoConfig.from_pretrained(model, trust_remote_code=config.model.trust_remote_code)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.model.trust_remote_code)
        if config.model.lora is not None:
            from pipeline.model import add_lora

            add_lora(lm, config.model.lora)
        prior = _prior(config, settings.get_text_config())
    frozen_lm = prior > 0 and config.latent.backbone == "frozen" and config.model.lora is None
    total = prior + sum(p.numel() for p in lm.parameters())
    trained = prior + sum(p.numel() for p in lm.parameters() if p.requires_grad and not frozen_lm)
    workers = config.scaling.least_workers
    stage = unshared(config, workers).scaling.zero_stage
    size = torch.finfo(precision(config.model.dtype)).bits // 8
    offload = config.scaling.offload_optimizer
    state = state_bytes(total, trained, size, stage, workers, offload)
    text = settings.get_text_config()
    tokens = min(config.train.tokens_per_micro_batch, sum(sorted(lengths)[-config.train.rows_per_step :]) or 1)
    per_token = (4 if config.model.activation_checkpointing else 16) * size * text.hidden_size * text.num_hidden_layers
    needs = config.objective.needed()
    critic = needs.critic and config.critic.architecture == "separate"
    frozen = needs.kl != "none" and (config.model.lora is None or config.model.reference is not None)
    head_alone = config.model.reference_states == "cached"
    beside = text.vocab_size * text.hidden_size if head_alone else total
    networks = 2 if critic else 1
    parts = {
        **{part: networks * held for part, held in state.items()},
        "reference": beside * size if frozen else 0.0,  # on every worker
        "activations": networks * tokens * per_token,
        "logits": 3 * LOGIT_CHUNK_BYTES,
    }
    lines = [
        f"model      {model}",
        f"           {total:,} parameters, {trained:,} trained, {precision(config.model.dtype)}",
        *(["           and as many of a critic"] if critic else []),
        *([f"           and {'the head of ' if head_alone else ''}a frozen reference beside it"] if frozen else []),
        f"memory     about {sum(parts.values()) / 2**30:.1f} GiB per worker ({_workers(config.scaling)}, ZeRO-{stage}):",
    ]
    return lines + [f"             {name:12} {value / 2**30:8.2f} GiB" for name, value in parts.items()]


def _prior(config: RunConfig, text: Any) -> int:
    """Parameters of the prior of latent thoughts, where the objective has them; without an assistant's, which is small."""
    from pipeline.latent import BlockPrior

    if config.objective.needed().latent == "none":
        return 0
    width, latent = text.hidden_size, config.latent
    if latent.assistant is not None:
        return width * (width + 1)
    inner = latent.inner or getattr(text, "intermediate_size", None) or 4 * width
    return sum(p.numel() for p in BlockPrior(width, inner, latent.n_latents, 1.0).parameters())
