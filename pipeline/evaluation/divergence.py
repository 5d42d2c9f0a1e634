"""KL and entropy of whole responses, on a model's own samples: what a reward was bought with, and what it left of diversity.

Two estimates of KL(π ‖ π_ref) per response y ~ π(· | x): the sum over its positions of the exact KL between the two next-token
distributions, and the plain log-ratio log π(y|x) − log π_ref(y|x). Both have the sequence KL as their expectation; the
first has the smaller variance and is never negative. On responses that π did not sample, neither is a KL: the other
direction, KL(π_ref ‖ π), is measured on samples of π_ref.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ModelConfig, RunConfig, SamplingConfig
from pipeline.decoding.prefixes import last_logits_only
from pipeline.evaluation.estimates import mean, ratio
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.held_out import resources
from pipeline.evaluation.results import Metric
from pipeline.ops import LOGIT_CHUNK_BYTES
from pipeline.pretrained import precision
from pipeline.stage import Item, run_stage
from pipeline.thinker import load_thinker, with_places

if TYPE_CHECKING:
    from pipeline.evaluation.samples import Samples
    from pipeline.evaluation.study import Study

PIECE_PROMPTS = 32


class SequenceKL(NamedTuple):
    """Estimates in nats, one per response, for the model that sampled it (policy) and the other one (reference)."""

    exact: Tensor  # [n] float64: Σ_t Σ_v π(v|s_t) · (log π(v|s_t) − log π_ref(v|s_t))
    sampled: Tensor  # [n] float64: Σ_t ρ_t
    entropy: Tensor  # [n] float64: −Σ_t Σ_v π(v|s_t) · log π(v|s_t)


class _Batch(NamedTuple):
    """B responses behind their prompts: columns [P of prompts, padded left | R of responses, padded right]."""

    input_ids: Tensor  # [B, P + R] int64
    mask: Tensor  # [B, P + R] int64
    prompt_width: int  # P


@torch.inference_mode()
def sequence_kl(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_tokens: int,
) -> SequenceKL:
    """Estimates for n responses that `policy` sampled at temperature 1, unfiltered; swap the models for the other direction.

    prompts, completions: token ids, one prompt per completion. batch_tokens: padded tokens of one forward. Both are
    Hugging Face causal models on one device; their own logits are used, so that what an architecture does after its
    output head counts. Raises ValueError when their vocabularies differ.
    """
    assert len(prompts) == len(completions)
    assert not policy.training
    assert not reference.training
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"policy and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens; use one tokenizer"
        )
    result = SequenceKL(*torch.zeros(3, len(prompts), dtype=torch.float64))
    device = next(policy.parameters()).device
    for places in _batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], batch_tokens):
        said = [completions[i] for i in places]
        batches = [
            _padded([with_places(model, prompts[i]) for i in places], said, device) for model in (policy, reference)
        ]
        for whole, part in zip(result, _batch_kl(policy, reference, *batches, sizes[0]), strict=True):
            whole[places] = part.cpu()
    return result


def _batch_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, batch: _Batch, its: _Batch, vocabulary: int
) -> SequenceKL:
    """The estimates for a batch, [B] float64 each; `its`: the same responses as the reference reads them."""
    rows = len(batch.input_ids)
    exact, sampled, entropy = torch.zeros(3, rows, dtype=torch.float64, device=batch.mask.device)
    width = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary * rows))
    column = batch.prompt_width
    for ours, theirs in zip(_logits(policy, batch, width), _logits(reference, its, width), strict=True):
        log_pi, log_ref = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        span = slice(column, column + ours.shape[1])
        ids, valid = batch.input_ids[:, span], batch.mask[:, span].bool()
        log_ratio = log_pi - log_ref
        # where(): a token that π excludes adds nothing, but 0 · inf would be nan.
        pi = log_pi.exp()
        terms = torch.where(log_pi > -math.inf, pi * log_ratio, 0.0).sum(-1)
        surprise = torch.where(log_pi > -math.inf, -pi * log_pi, 0.0).sum(-1)
        chosen = log_ratio.gather(-1, ids[..., None]).squeeze(-1)
        exact += torch.where(valid, terms, 0.0).double().sum(-1)
        sampled += torch.where(valid, chosen, 0.0).double().sum(-1)
        entropy += torch.where(valid, surprise, 0.0).double().sum(-1)
        column = span.stop
    return SequenceKL(exact, sampled, entropy)


def _logits(model: torch.nn.Module, batch: _Batch, width: int) -> Iterator[Tensor]:
    """Logits that predict the responses' columns, in order: [B, 1, V] for the first, then [B, ≤ width, V].

    The responses go through the model in pieces behind the prompts' key-value cache: nothing is computed twice, and
    the logits of all positions never exist together.
    """
    position = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    total, cache = batch.input_ids.shape[1], None
    # The last column predicts nothing. The prompts are one piece, of which the last column alone is wanted.
    edges = [0, *range(batch.prompt_width, total - 1, width), total - 1]
    for start, stop in pairwise(edges):
        out = model(
            input_ids=batch.input_ids[:, start:stop],
            attention_mask=batch.mask[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **(last_logits_only(model) if start == 0 else {}),
        )
        cache = out.past_key_values
        yield out.logits[:, -1:] if start == 0 else out.logits


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of the sequences, longest first, in batches of at most `batch_tokens` padded tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def _padded(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> _Batch:
    assert all(prompts), "a response's first token needs a prompt token that predicts it"
    left, right = max(map(len, prompts)), max(1, *map(len, completions))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, stop = left - len(prompt), left + len(completion)
        ids[row, start:stop] = torch.tensor([*prompt, *completion])
        mask[row, start:stop] = 1
    return _Batch(ids.to(device), mask.to(device), left)


# -------------------------------------------------------------------------------------------------- stage


@dataclass(frozen=True, slots=True)
class Passes:
    """What two models' forwards over one's samples gave; all [prompts, per_prompt] float64."""

    exact: np.ndarray
    sampled: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray

    def per_completion(self, name: str) -> Metric:
        """Mean of a quantity over completions; prompts are the independent units."""
        return mean(getattr(self, name).mean(axis=1), lowest=-math.inf if name == "sampled" else 0.0)

    def per_token(self, name: str) -> Metric:
        """Sum of a quantity that is never negative over all tokens, divided by their number."""
        return ratio(getattr(self, name).sum(axis=1), self.tokens.sum(axis=1), lowest=0.0)


class MeasureKL:
    """The actor: samples of a model → estimates against the other one."""

    def __init__(
        self, sampler: str, other: str, config: dict[str, Any], n_latents: int | None, budget: int, gpu: bool
    ) -> None:
        own = ModelConfig.model_validate(config)
        place, dtype = "cuda" if gpu else "cpu", precision(own.dtype)
        models = [
            load_thinker(p, dtype, own, SamplingConfig(n_latents=n_latents)).to(place).eval() for p in (sampler, other)
        ]
        self.sampler, self.other, self.budget = models[0], models[1], budget

    def __call__(self, item: Item) -> Item:
        found = sequence_kl(self.sampler, self.other, item["prompts"], item["completions"], self.budget)
        return {name: values.tolist() for name, values in found._asdict().items()}


def measure_passes(config: RunConfig, sampler: str, other: str, samples: Samples, local: bool) -> Passes:
    """Estimates for all completions that the weights at `sampler` drew, against the weights at `other`."""
    assert samples_its_own_distribution(config)
    pairs = [(p, c["token_ids"]) for p, group in zip(samples.prompts, samples.completions, strict=True) for c in group]
    size = PIECE_PROMPTS * config.sampling.per_prompt
    pieces = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    items = [{"prompts": [p for p, _ in piece], "completions": [c for _, c in piece]} for piece in pieces]
    arguments = {
        "sampler": sampler,
        "other": other,
        "config": config.model.model_dump(mode="json"),
        "n_latents": config.sampling.n_latents,
        "budget": config.train.tokens_per_micro_batch,
        "gpu": config.scaling.gpus_per_worker > 0,
    }
    found: dict[str, list[float]] = {name: [] for name in SequenceKL._fields}
    for part in run_stage(
        MeasureKL, arguments, items, label="KL", resources=resources(config), local=local, unit="piece"
    ):
        for name in found:
            found[name] += list(part[name])
    shape = len(samples.prompts), -1
    tokens = np.array([len(completion) for _, completion in pairs], dtype=np.float64)
    return Passes(**{name: np.reshape(values, shape) for name, values in found.items()}, tokens=tokens.reshape(shape))


def samples_its_own_distribution(config: RunConfig) -> bool:
    """Whether sampling is at temperature 1 and unfiltered, its thoughts the prior's own: of other samples the estimates
    would be no KL."""
    s = config.sampling
    return s.temperature == 1.0 and not s.top_k and s.top_p == 1.0 and not s.min_new_tokens and not s.thought_noise


# ---------------------------------------------------------------------------------------------- evaluator


def measure(study: Study) -> Findings:
    """KL in both directions, each on the samples of the model that it is the expectation of."""
    found: dict[str, Metric] = {}
    for who, passes in (("samples", study.passes), ("reference", study.reference_passes)):
        found |= {
            f"{who}/kl": passes.per_completion("exact"),
            f"{who}/kl_monte_carlo": passes.per_completion("sampled"),
            f"{who}/kl_per_token": passes.per_token("exact"),
        }
    return Findings(metrics=found)


def kl_to_reference(config: RunConfig, model: str, reference: str, samples: Samples, local: bool) -> dict[str, float]:
    """KL(π ‖ π_ref) in nats per response on samples that the weights at `model` drew, with standard errors over prompts.

    Empty where sampling changed the distribution.
    """
    if not samples_its_own_distribution(config):
        return {}
    passes = measure_passes(config, model, reference, samples, local)
    found = {"samples/kl": passes.per_completion("exact"), "samples/kl_monte_carlo": passes.per_completion("sampled")}
    errors = {f"{name}_se": math.nan if m.standard_error is None else m.standard_error for name, m in found.items()}
    return {name: m.value for name, m in found.items()} | errors
