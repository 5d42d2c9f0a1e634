"""Which tokens carry the credit: implicit rewards, advantages and values token by token, and whether they find planted errors.

Beside each stands −log π_ref, what the reference alone finds surprising: the baseline to beat. Errors that the reference
believes are not surprising to it, so only the log-ratio can show them; random errors are surprising to any model, and there
the baseline is hard to beat.

Left out: where planted errors come from (`planted`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Objective, PolicyOut, Row
from pipeline.evaluation.estimates import auroc
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.held_out import resources
from pipeline.evaluation.planted import Planted, read_planted
from pipeline.evaluation.results import Auroc, CreditResponse, CreditRow, Metric
from pipeline.learner import load_trained
from pipeline.model import load_policy
from pipeline.objectives.bellman import bellman_residuals
from pipeline.order import micro_batches
from pipeline.pretrained import load_tokenizer
from pipeline.rows import Rows
from pipeline.stage import Item, run_stage

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study

PIECE_ROWS = 64
REWARD, SURPRISE, OWN_SURPRISE, ADVANTAGE, VALUE = "implicit reward", "-log π_ref", "-log π", "advantage", "V"
SUSPICION = {f"-{REWARD}": (REWARD, -1.0), SURPRISE: (SURPRISE, 1.0), OWN_SURPRISE: (OWN_SURPRISE, 1.0)}
"""Scores that are to be high at errors: name → (what of `token_values`, sign)."""


# --------------------------------------------------------------------------------------------- arithmetic


def token_values(objective: Objective, out: PolicyOut, batch: Batch) -> dict[str, Tensor]:
    """What is known of each response token, [B, K, R] each, nats or units of reward; meaningless where masked.

    The advantage is r + G^λ(next) − V, of the λ-returns of r − βρ (arXiv 2410.09302): there is one where there are a critic and
    rewards. λ and its target are the objective's, as in its loss; an objective without them has Monte-Carlo returns.
    """
    assert batch.ref_logprobs is not None
    reward = objective.token_reward(out, batch)
    found = {REWARD: reward, SURPRISE: -batch.ref_logprobs, OWN_SURPRISE: -out.logprobs}
    if out.values is not None:
        found[VALUE] = out.values
        if batch.token_rewards is not None:
            settings = {name: getattr(objective, name) for name in ("lam", "q_target") if hasattr(objective, name)}
            left = bellman_residuals(reward, batch.token_rewards, out.values, batch.response_mask, **settings)
            found[ADVANTAGE] = left.advantage
    return found


def find_errors(scores: Sequence[np.ndarray], errors: Sequence[np.ndarray]) -> Auroc:
    """How well a score finds error tokens; one array a response, scores [R] and bool [R]. There have to be both kinds."""
    flat, labels = np.concatenate(scores), np.concatenate(errors)
    with_error = [(s, e) for s, e in zip(scores, errors, strict=True) if e.any()]
    return Auroc(
        value=auroc(flat, labels),
        errors=int(labels.sum()),
        sound=int((~labels).sum()),
        top_1=float(np.mean([e[int(s.argmax())] for s, e in with_error])),
        responses=len(with_error),
    )


# -------------------------------------------------------------------------------------------------- stage


class TokenValues:
    """The actor: rows → the `token_values` of their responses, and their tokens as text."""

    def __init__(self, config: dict[str, Any], model: str, frozen: str, carried: dict[str, float]) -> None:
        self.config: RunConfig = validate(config)
        self.device = torch.device("cuda" if self.config.scaling.gpus_per_worker else "cpu")
        self.carried = carried
        self.forward = load_trained(self.config, model, frozen, self.device)
        # Objectives without a reference have none cached, and planted rows are in no cache.
        settings = self.config.model.model_copy(update={"lora": None, "activation_checkpointing": False})
        self.reference = load_policy(settings, frozen).to(self.device).eval()
        self.tokenizer = load_tokenizer(model, self.config.model.trust_remote_code)

    @torch.inference_mode()
    def __call__(self, item: Item) -> Item:
        rows = [Row(**fields) for fields in json.loads(item["rows"])]
        lengths = np.array([row.tokens for row in rows])
        found: dict[int, dict[str, Any]] = {}
        budget = self.config.train.tokens_per_micro_batch
        for micro in micro_batches(range(len(rows)), lengths, 1, budget, padded=True)[0]:
            found |= zip(micro.rows, self._values([rows[i] for i in micro.rows]), strict=True)
        return {"rows": json.dumps([found[i] for i in range(len(rows))])}  # as text: Arrow would turn None into nan

    def _values(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        batch = replace(collate(rows), carried=self.carried).to(self.device)
        batch = replace(batch, ref_logprobs=self.reference(batch).logprobs)
        values = token_values(self.config.objective, self.forward(batch), batch)
        own = batch.response_mask.tolist()
        cells = {name: value.tolist() for name, value in values.items()}
        for b, row in enumerate(rows):
            responses = []
            for k, ids in enumerate(row.response_ids):
                tokens = [self.tokenizer.decode([token]) for token in ids]
                known = {
                    name: [x if mine else None for x, mine in zip(value[b][k][: len(ids)], own[b][k], strict=False)]
                    for name, value in cells.items()
                    if name != ADVANTAGE or row.token_rewards is not None  # a row beside it may be the one with rewards
                }
                responses.append({"tokens": tokens, "values": known})
            yield {"prompt": self.tokenizer.decode(row.prompt_ids), "responses": responses}


def values_of(
    config: RunConfig,
    model: str,
    frozen: str,
    rows: Sequence[Row],
    local: bool,
    carried: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """For each row its prompt's text and its `responses`: tokens as text, and `values` by name, None where masked."""
    plain = [asdict(row) | {"ref_logprobs": None} for row in rows]
    items = [{"rows": json.dumps(plain[i : i + PIECE_ROWS])} for i in range(0, len(plain), PIECE_ROWS)]
    arguments = {"config": config.dump(), "model": model, "frozen": frozen, "carried": carried or {}}
    done = run_stage(
        TokenValues, arguments, items, label="credit", resources=resources(config), local=local, unit="piece"
    )
    return [row for part in done for row in json.loads(part["rows"])]


# ---------------------------------------------------------------------------------------------- evaluator


def measure(study: Study) -> Findings:
    """Credit of the first held-out rows, and the AUROC on planted errors where `evaluation.planted` names some."""
    config = study.config
    rows = Rows(study.prepared.rows, study.prepared.reference)
    shown = [rows[int(position)] for position in study.positions[: config.evaluation.credit_rows]]
    planted = read_planted(config, study.prepared.model) if config.evaluation.planted is not None else []
    everything = [*shown, *(case.row for case in planted)]
    found = values_of(config, study.weights, study.prepared.frozen, everything, study.local, dict(study.carried))
    credit = [_shown(row, labels(row), values) for row, values in zip(shown, found, strict=False)]
    behind = found[len(shown) :]
    credit += [
        _shown(case.row, ["planted error"], values, case.errors)
        for case, values in zip(planted[: config.evaluation.credit_rows], behind, strict=False)
    ]
    aurocs = planted_aurocs(planted, behind)
    metrics = {f"credit/auroc/{name}": Metric(value=a.value, n=a.errors + a.sound) for name, a in aurocs.items()}
    return Findings(metrics=metrics, credit=credit, credit_auroc=aurocs)


def planted_aurocs(planted: Sequence[Planted], values: Sequence[dict[str, Any]]) -> dict[str, Auroc]:
    """Each score of `SUSPICION` on planted errors; `values` as `values_of` gives them. Empty where nothing was planted."""
    if not planted:
        return {}
    errors = [np.array(case.errors) for case in planted]
    return {
        name: find_errors([sign * np.array(row["responses"][0]["values"][what]) for row in values], errors)
        for name, (what, sign) in SUSPICION.items()
    }


def labels(row: Row) -> list[str]:
    """What the heatmap calls a row's responses."""
    count = len(row.response_ids) - row.mismatched
    if row.token_rewards is not None:
        names = [f"return {sum(rewards):g}" for rewards in row.token_rewards]
    elif count == 2:
        names = ["chosen", "rejected"]
    else:
        names = [f"rank {i + 1}" for i in range(count)] if count > 1 else ["response"]
    return [*names[:count], *(["response to another prompt"] * row.mismatched)]


def _shown(row: Row, names: Sequence[str], found: dict[str, Any], errors: list[bool] | None = None) -> CreditRow:
    responses = [
        CreditResponse(label=name, tokens=r["tokens"], values=r["values"], planted=errors)
        for name, r in zip(names, found["responses"], strict=True)
    ]
    return CreditRow(row_id=row.row_id, prompt=found["prompt"], responses=responses)
