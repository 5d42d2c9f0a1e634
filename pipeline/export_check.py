"""Whether an export is the model that was trained: both are read on the same few rows, the export by transformers alone.

Each step of an export is compared in float32 with the one before it (merged with trained, loaded with rounded), so that the
tolerance is that of float32 whatever the precision of the export.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import ModelConfig, RunConfig
from pipeline.contracts import Batch, PolicyOut, Row
from pipeline.critic import Critic
from pipeline.errors import UserError
from pipeline.model import Policy
from pipeline.pretrained import load_causal_lm, load_scorer
from pipeline.reward import RewardNetwork
from pipeline.rows import Rows, StaleCache

PROMPT, RESPONSE = 32, 16
"""Tokens of a row that are read, at most: what a check costs grows with them."""
TOLERANCE = 2e-3
"""Of a log-probability or score, absolute and relative: sums in another order differ by less, a lost adapter by more."""


class ExportError(UserError):
    """An export that is not the model that was trained: what differs, and by how much."""


def probe_rows(config: RunConfig, rows: Path | None, vocabulary: int, pad: int | None) -> list[Row]:
    """Two short rows: of the prepared rows in the folder `rows` where that is there, else of tokens by chance.

    pad: a token that no response ends with, as a classifier of transformers would look past it.
    """
    try:
        prepared = None if rows is None else Rows(rows)
    except StaleCache:  # not there, or not whole
        prepared = None
    if prepared is not None:
        given = [prepared[i] for i in sorted({0, len(prepared) // 2})]
    else:
        draw = torch.Generator().manual_seed(0)
        sizes = [max(1, min(12, config.data.max_length // 2)), max(1, min(8, config.data.max_length // 2))]

        def tokens(count: int) -> list[int]:
            return torch.randint(vocabulary, (count,), generator=draw).tolist()

        given = [Row(i, tokens(sizes[0]), [tokens(sizes[1]) for _ in range(2)]) for i in range(2)]
    return [Row(i, _ends(row.prompt_ids), [_cut(r, pad) for r in row.response_ids[:2]]) for i, row in enumerate(given)]


def _ends(prompt: list[int]) -> list[int]:
    """Its first token, which may be BOS, and its last ones."""
    return prompt if len(prompt) <= PROMPT else [prompt[0], *prompt[1 - PROMPT :]]


def _cut(response: list[int], pad: int | None) -> list[int]:
    kept = response[:RESPONSE]
    return [*kept[:-1], next(token for token in (kept[-1], 0, 1) if token != pad)]


@torch.no_grad()
def read(network: Policy | RewardNetwork, batch: Batch) -> PolicyOut:
    """What the network makes of the rows."""
    return network.eval()(batch)


def trained_values(out: PolicyOut, batch: Batch) -> Tensor:
    """Scores of all responses, or log-probs of all their tokens, one after the other. [n] float32"""
    return out.scores[batch.valid] if out.scores is not None else out.logprobs[batch.response_mask]


@torch.no_grad()
def critic_values(critic: Critic, out: PolicyOut, batch: Batch) -> Tensor:
    """V(s) before all tokens of all responses. [n] float32"""
    return critic.eval()(batch, out)[batch.response_mask]


@torch.no_grad()
def exported_values(folder: Path, settings: ModelConfig, rows: list[Row], scores: bool) -> Tensor:
    """The same as `trained_values` by transformers' own forward, text by text, of the model in `folder`."""
    load, found = load_scorer if scores else load_causal_lm, []
    lm = load(str(folder), torch.float32, settings.unpacked_attention, settings.trust_remote_code, "export")
    for row in rows:
        for response in row.response_ids:
            logits = lm(input_ids=torch.tensor([row.prompt_ids + response])).logits[0].float()
            if scores:
                found.append(logits)
                continue
            logprobs = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            found.append(logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def compare(expected: Tensor, found: Tensor, whose: str) -> None:
    """Raises ExportError unless both are equal to rounding; `whose` the values `found` are."""
    if torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        return
    gap = (expected - found).abs().nan_to_num(torch.inf)
    worst = int(gap.argmax())
    raise ExportError(
        f"export: {whose} values differ from the checkpoint's by up to {gap[worst]:.3g} ({found[worst]:.4g} instead of "
        f"{expected[worst]:.4g}); nothing was exported, the checkpoint stays; please report it with model.path and model.lora"
    )
