"""Rows → Batch: each row becomes `[prompt | response 1 | … | response K]`, so that a prompt is computed once.

Pure tensor packing on the CPU; knows neither model nor objective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.contracts import Batch, Row


def collate(rows: Sequence[Row], pad_id: int = 0) -> Batch:
    """Pack B rows into one `Batch`, padded on the right to the longest row, most responses and longest response."""
    shape = (len(rows), max(len(row.response_ids) for row in rows))
    longest = max(len(response) for row in rows for response in row.response_ids)
    width = max(row.tokens for row in rows)
    has_reference = rows[0].ref_logprobs is not None

    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)
    predictor = torch.zeros(*shape, longest, dtype=torch.long)
    response_ids = torch.full((*shape, longest), pad_id)
    response_mask = torch.zeros(*shape, longest, dtype=torch.bool)
    ref_logprobs = torch.zeros(*shape, longest) if has_reference else None

    for b, row in enumerate(rows):
        prompt = len(row.prompt_ids)
        tokens = [*row.prompt_ids, *(token for response in row.response_ids for token in response)]
        input_ids[b, : row.tokens] = torch.tensor(tokens)
        position_ids[b, :prompt] = torch.arange(prompt)
        segment[b, :prompt] = 0
        start = prompt
        for k, response in enumerate(row.response_ids):
            n = len(response)
            position_ids[b, start : start + n] = torch.arange(prompt, prompt + n)
            segment[b, start : start + n] = k + 1
            predictor[b, k, :n] = torch.arange(start - 1, start + n - 1)
            predictor[b, k, 0] = prompt - 1  # the first token is predicted at the end of the shared prompt
            response_ids[b, k, :n] = input_ids[b, start : start + n]
            response_mask[b, k, :n] = True
            if ref_logprobs is not None:
                assert row.ref_logprobs is not None
                ref_logprobs[b, k, :n] = torch.tensor(row.ref_logprobs[k])
            start += n

    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment=segment,
        predictor=predictor,
        response_ids=response_ids,
        response_mask=response_mask,
        valid=response_mask.any(-1),
        weight=torch.tensor([row.weight for row in rows]),
        row_ids=torch.tensor([row.row_id for row in rows]),
        ref_logprobs=ref_logprobs,
    )


def group_mask(segment: Tensor) -> Tensor:
    """segment [B, T] → [B, 1, T, T] bool, True where query i may look at key j.

    A token sees the prompt and its own response, never a sibling response and never the future. Padding sees itself
    alone: a query without any key would be nan in the softmax.
    """
    width = segment.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    visible = causal & (key >= 0) & ((key == 0) | (key == query))
    return (visible | torch.eye(width, dtype=torch.bool, device=segment.device))[:, None]
