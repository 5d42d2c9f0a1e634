"""The benchmark of latent thoughts: its data and settings by worked examples, its tables from made-up scores."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.chain_arithmetic import is_strict
from benchmarks.latent import runs
from benchmarks.latent.methods import ASSISTANT, BASE, DECODED, METHODS, NUMBERS, QUICK
from benchmarks.latent.report import CLAIMS, claims_table, page, table
from benchmarks.reasoning.methods import merge
from benchmarks.reasoning.runs import Place, configure
from pipeline.config import LatentConfig, ModelConfig
from pipeline.pretrained import load_causal_lm
from pipeline.thinker import NewPrior, save_prior, start_prior

CHECKPOINT = Path(__file__).parent / "data" / "chain-arithmetic-mid"
PROMPT = "7+5*3-4*2+9:"


def test_solutions_are_right_and_their_steps_are_lines() -> None:
    (text,) = runs.demonstrations(runs.RIGHT, [PROMPT], 0)
    record = runs.solution(PROMPT, text)
    assert "".join(step["text"] for step in record["steps"]) == text
    assert len(record["steps"]) == 5 and is_strict(PROMPT, text)


def test_every_setting_is_a_valid_configuration() -> None:
    found = {}
    for name, method in METHODS.items():
        changes = json.loads(json.dumps(merge(BASE, method.config)).replace(ASSISTANT, str(CHECKPOINT)))
        found[name] = configure(Place("unused", local=True), name, "m", "trajectory", Path("d"), changes, 0)
    assert {c.train.epochs for c in found.values()} == {BASE["train"]["epochs"]}, "all learn in as many steps"
    assert all(c.latent.backbone == "frozen" for c in found.values())
    assert {c.latent.n_latents for name, c in found.items() if name.startswith("lta")} == set(NUMBERS)
    assert found["softcot"].latent.assistant == str(CHECKPOINT) and found["nll"].latent.assistant is None
    for term in ("nll", "align", "focus"):
        weights = found["no_" + term].objective.model_dump()
        assert [k for k, v in weights.items() if k.endswith("_weight") and v == 0] == [f"{term}_weight"]
    assert DECODED in METHODS and set(QUICK) < set(METHODS)
    assert {method for _, _, *both in CLAIMS for method in both} <= {*METHODS, "before"}


def test_spread_tells_variance_within_a_prompt_from_that_between_prompts(tmp_path: Path) -> None:
    """A prior whose attention and feed-forward are silent gives every prompt the same thoughts."""
    lm = load_causal_lm(str(CHECKPOINT), torch.float32)
    lm.save_pretrained(tmp_path / "model")
    from pipeline.pretrained import load_tokenizer

    load_tokenizer(str(CHECKPOINT)).save_pretrained(tmp_path / "model")
    prior = start_prior(lm, ModelConfig(path="unused"), NewPrior(LatentConfig(n_latents=3)))
    with torch.no_grad():
        prior.out.weight.zero_()
    save_prior(prior, lm, tmp_path / "model")
    found = runs.spread(str(tmp_path / "model"))
    assert found["between"] < 1e-10 and found["within"] > 0.2
    assert found["parameters"] == sum(p.numel() for p in prior.parameters())
    assert runs.spread(str(CHECKPOINT)) == {}


def scores(*greedy: float, **more: float) -> list[dict]:
    shared = {"strict": 0.5, "sampled": 0.5, "steps": 9, "train_seconds": 7.0}
    return [{"greedy": value} | shared | more for value in greedy]


def test_tables_show_seeds_means_and_verdicts() -> None:
    rows = {"before": scores(0.5, 0.5, 0.5), "lta": scores(0.6, 0.7, 0.8, within=0.25, vote=0.75, vote_noise=0.5)}
    line = table(rows, (0, 1, 2)).splitlines()[-1]
    assert line.startswith(
        "| LTA: all three terms (`lta`) | 0.600 | 0.700 | 0.800 | **0.700** | 0.500 | 0.500 | 0.250 | –"
    )
    claims = claims_table(rows).splitlines()
    assert len(claims) == 3 and claims[2].endswith("| `lta` 0.700, `before` 0.500 | **seen** |")
    assert "Vote of 8 samples (n = 4): 0.750; each with thoughts of its own (noise 0.5): 0.500." in page(
        rows, (0,), "x"
    )
