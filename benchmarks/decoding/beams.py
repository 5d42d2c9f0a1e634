"""What beams gain over greedy decoding where the answer is known: the exact optimum of tabular MDPs, and chain arithmetic.

On the optimum π* of random tabular MDPs the reward of each response is known; on chain arithmetic a response is right or wrong.
Both run through the decoders as they are. The likeliest response under π* maximises r + β log π_ref, and a short response has a
large π_ref: where lengths differ, more likelihood need not be more reward, so that fixed lengths and free ones are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.chain_arithmetic import RESPONSE_TOKENS, is_correct
from benchmarks.credit import CHECKPOINT, trained
from benchmarks.decoding.measures import read_rows
from benchmarks.reasoning import runs
from benchmarks.reasoning.records import write
from jobs.decode import decoded
from pipeline.config_file import validate
from pipeline.decoding import beam
from pipeline.evaluation.estimates import mean_se
from tests.decoding.tabular import prompts_of, tools
from tests.oracle.mdp import TokenMdp

BEAMS = (1, 2, 5, 10)
BETAS = (2.0, 1.0, 0.5, 0.2)
LENGTHS = (("all of 4 tokens", False, 0.0), ("1 to 4 tokens", True, 0.0), ("1 to 4, mean log π", True, 1.0))
"""Title, whether a response may end early, and the beams' length penalty."""

Gain = dict[str, tuple[float, float]]
"""beams → mean reward, or share of right answers, ± standard error; "5 − 1": their difference."""


def tabular(mdps: int) -> dict[str, Gain]:
    """Reward of the response that beams find under π*, by lengths and β; 4 tokens, 4 steps."""
    found = {}
    for title, stops, penalty in LENGTHS:
        for beta in BETAS:
            mdp = TokenMdp(vocabulary=4, horizon=4, beta=beta, prompts=mdps, seed=0, stops=stops)
            policy = mdp.conditionals(mdp.optimum)
            rewards = {beams: _rewards(mdp, policy, beams, penalty) for beams in BEAMS}
            found[f"{title}, β = {beta:g}"] = _gain(rewards)
    return found


def _rewards(mdp: TokenMdp, policy: torch.Tensor, beams: int, penalty: float) -> list[float]:
    own = tools(mdp, {"policy": policy}, beams=beams, length_penalty=penalty)
    names = [mdp.responses.index(tuple(c.token_ids)) for c in beam.search(own, prompts_of(mdp))]
    return [float(mdp.reward[x, n]) for x, n in enumerate(names)]


def arithmetic(storage: str, prompts: int, align: bool) -> dict[str, Gain]:
    """Share of right answers of the shipped checkpoint and, if `align`, of what DQO makes of it."""
    models = {"before": str(CHECKPOINT)}
    if align:
        models["DQO"] = trained(runs.Place(storage, local=True), "dqo", None)[1]
    folder = Path(storage).absolute() / "decoding" / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    asked = runs.test_prompts()[:prompts]
    write(folder / f"prompts-{prompts}.jsonl", ({"prompt": prompt} for prompt in asked))
    found = {}
    for name, model in models.items():
        right = {beams: _right(storage, folder, name, model, prompts, beams) for beams in (1, 5)}
        found[name] = _gain(right)
    return found


def _right(storage: str, folder: Path, name: str, model: str, prompts: int, beams: int) -> list[float]:
    config = {
        "storage": storage,
        "checkpoint_from": model,
        "model": {"path": str(CHECKPOINT), "dtype": "float32"},
        "data": {"kind": "preference", "sources": [{"path": "unused"}]},
        "objective": {"name": "dpo"},
        "sampling": {
            "prompts": {"path": str(folder / f"prompts-{prompts}.jsonl")},
            "max_new_tokens": RESPONSE_TOKENS,
            "batch_size": 512,
            "output": str(folder / f"{name}-{prompts}-beams{beams}.jsonl"),
        },
        "decoding": {"method": "beam", "beams": beams, "rows_per_piece": 200},
        "tracking": {"enabled": False},
    }
    task, _ = decoded(validate(config), local=True)
    return [float(is_correct(row["prompt"], row["text"])) for row in read_rows(task.output)]


def _gain(values: dict[int, Sequence[float]]) -> Gain:
    shown = {str(beams): mean_se(found) for beams, found in values.items()}
    pairs = zip(values[5], values[1], strict=True)
    return shown | {"5 − 1": mean_se([five - one for five, one in pairs])}
