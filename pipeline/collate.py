"""Rows → Batch: each row becomes `[prompt | response 1 | … | response K]`, so that a prompt is computed once.

Pure tensor packing on the CPU; knows neither model nor objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.contracts import Batch, Row


def collate(rows: Sequence[Row], pad_id: int = 0) -> Batch:
    """Pack B rows into one `Batch`, padded on the right to the longest row, most responses and longest response.

    Environment tokens are context: they stand in `input_ids` and have a predictor, and are masked.
    """
    shape = (len(rows), max(len(row.response_ids) for row in rows))
    longest = max(len(response) for row in rows for response in row.response_ids)
    width = max(row.tokens for row in rows)
    has_reference = rows[0].ref_logprobs is not None
    has_rewards = any(row.token_rewards is not None for row in rows)
    has_behaviour = any(row.behaviour_logprobs is not None for row in rows)
    most_steps = max((len(ends) for row in rows for ends in row.step_ends or ()), default=0)

    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segment = torch.full((len(rows), width), -1)
    predictor = torch.zeros(*shape, longest, dtype=torch.long)
    response_ids = torch.full((*shape, longest), pad_id)
    response_mask = torch.zeros(*shape, longest, dtype=torch.bool)
    ref_logprobs = torch.zeros(*shape, longest) if has_reference else None
    token_rewards = torch.zeros(*shape, longest) if has_rewards else None
    behaviour_logprobs = torch.full(shape, math.nan) if has_behaviour else None
    step_ends = torch.full((*shape, most_steps), -1) if most_steps else None
    mismatched = torch.zeros(shape, dtype=torch.bool)

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
            response_mask[b, k, :n] = True if row.trained is None else torch.tensor(row.trained[k])
            if ref_logprobs is not None:
                assert row.ref_logprobs is not None
                ref_logprobs[b, k, :n] = torch.tensor(row.ref_logprobs[k])
            if token_rewards is not None and row.token_rewards is not None:
                token_rewards[b, k, :n] = torch.tensor(row.token_rewards[k])
            if step_ends is not None and row.step_ends is not None:
                step_ends[b, k, : len(row.step_ends[k])] = torch.tensor(row.step_ends[k], dtype=torch.long)
            start += n
        if behaviour_logprobs is not None and row.behaviour_logprobs is not None:
            logged = [math.nan if value is None else value for value in row.behaviour_logprobs]
            behaviour_logprobs[b, : len(logged)] = torch.tensor(logged)
        mismatched[b, len(row.response_ids) - 1] = row.mismatched

    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment=segment,
        predictor=predictor,
        response_ids=response_ids,
        response_mask=response_mask,
        valid=response_mask.any(-1) & ~mismatched,  # a mismatched response is computed, not counted
        weight=torch.tensor([row.weight for row in rows]),
        row_ids=torch.tensor([row.row_id for row in rows]),
        ref_logprobs=ref_logprobs,
        ref_states=torch.cat([row.ref_states for row in rows]) if rows[0].ref_states is not None else None,  # type: ignore[misc]
        token_rewards=token_rewards,
        behaviour_logprobs=behaviour_logprobs,
        step_ends=step_ends,
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
