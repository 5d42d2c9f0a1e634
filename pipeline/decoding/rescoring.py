"""Log-probabilities of finished responses under any model: one forward each, no cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.decoding.contract import Prompt
from pipeline.decoding.prefixes import last_logits_only
from pipeline.ops import LOGIT_CHUNK_BYTES
from pipeline.thinker import with_places


@torch.inference_mode()
def token_logprobs(
    model: nn.Module, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], pad_id: int
) -> list[list[float]]:
    """log π(token | what is before it) of each response's tokens, n × [R] nats. No response may be empty."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids) - len(responses[i]))
    found: list[list[float]] = [[] for _ in prompts]
    longest = max(map(len, responses), default=0)
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary * (longest + 1)))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        sequences = [[*with_places(model, prompts[i].ids), *responses[i]] for i in places]
        rows = _batch(model, sequences, longest + 1, pad_id)
        for i, row in zip(places, rows, strict=True):
            found[i] = row[len(row) - len(responses[i]) :].tolist()
    return found


def _batch(model: nn.Module, sequences: list[list[int]], kept: int, pad_id: int) -> torch.Tensor:
    """Log-probabilities of the last kept − 1 tokens of sequences padded on the left, [B, kept − 1]."""
    device, width = next(model.parameters()).device, max(map(len, sequences))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences], device=device)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in sequences], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    only = dict.fromkeys(last_logits_only(model), kept)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **only)
    logits = out.logits[:, -kept:-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, ids[:, -logits.shape[1] :, None]).squeeze(-1) - logits.logsumexp(-1)
