"""The benchmark of decoders: its measures by hand, curves at equal KL, and the whole of it in small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.decoding import __main__ as program
from benchmarks.decoding import beams, report, world
from benchmarks.decoding import points as points_module
from benchmarks.decoding.measures import Embedder, Measured, by_prompt, divergence, diversity, read_rows
from benchmarks.decoding.points import Point, points
from benchmarks.decoding.world import FULL, QUICK, World, emotion
from tests.oracle.mdp import TokenMdp


def test_diversity_is_the_product_over_orders():
    """a b a b c: 4 bigrams of which 3 differ, 3 trigrams and 2 4-grams that all do."""
    assert diversity("A b a b c") == pytest.approx(3 / 4)
    assert diversity("a a a a a") == pytest.approx(1 / 4 * 1 / 3 * 1 / 2)
    assert diversity("one, two. three") == 1.0, "signs are words"
    assert math.isnan(diversity("too short"))


def test_divergence_of_draws_points_and_bounds():
    row = {"logprobs": [-1.0, -2.0], "reference_logprobs": [-1.5, -4.0], "details": {"kl_bound": 0.7}}
    assert divergence(row, "draws") == pytest.approx(2.5)
    assert divergence(row, "point") == pytest.approx(5.5)
    assert divergence(row, "bound") == 0.7


def test_completions_of_a_prompt_are_averaged_first():
    rows = [{"source": name} for name in ("a", "a", "a", "b")]
    mean, error = by_prompt(rows, [1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (4.0, pytest.approx(2.0))
    assert by_prompt(rows, [1.0, math.nan, 3.0, math.nan])[0] == 2.0


def measured(reward: float, kl: float, error: float = 0.1) -> Measured:
    return Measured((reward, error), (kl, 0.0), (1.0, 0.0), (1.0, 0.0), 8.0, 100.0)


FOUND = {
    "SFT-sampled": (Point("SFT sampled", "", {}), measured(0.2, 0.0)),
    "CD-1": (Point("CD", "α=1", {}), measured(0.4, 1.0)),
    "CD-2": (Point("CD", "α=0.5", {}), measured(0.8, 3.0)),
    "proxy-1": (Point("proxy", "w=1", {}), measured(0.4, 1.0)),
}


def test_rewards_at_equal_kl_lie_between_settings():
    assert report.reward_at(FOUND, "proxy", 0.5) == (pytest.approx(0.3), pytest.approx(math.hypot(0.05, 0.05)))
    assert report.reward_at(FOUND, "CD", 2.5)[0] == pytest.approx(0.7)
    assert report.reward_at(FOUND, "CD", 0.5) is None, "a guided decoder does not start at the SFT model"
    assert report.reward_at(FOUND, "CD", 3.5) is None, "nothing is guessed beyond the last setting"
    assert report.reward_at(FOUND, "ARGS", 0.5) is None


@pytest.mark.parametrize(
    ("gain", "word"), [((0.3, 0.1), "**seen**"), ((-0.3, 0.1), "**contradicted**"), ((0.15, 0.1), "not separable")]
)
def test_verdicts(gain: tuple[float, float], word: str):
    assert report.verdict(gain) == word


def test_points_are_files_of_their_own_and_cover_every_decoder():
    for size in (QUICK, FULL):
        found = points(World("x", size, "/sft", "/aligned", "/emotional", Path("p")))
        assert len({p.name for p in found}) == len(found)
        assert all(p.name.isascii() and not set(p.name) & set(" /*=") for p in found)
        assert {p.changes["decoding"]["method"] for p in found} == set(every_decoder()) - {"vote"}, (
            "reviews have no answer"
        )
    indirect = next(p for p in found if p.curve == "TQ* indirect")
    assert indirect.changes["decoding"]["baseline_scorer"] == world.EMOTION


def every_decoder() -> list[str]:
    from pipeline.decoding import DECODERS

    return list(DECODERS)


def test_emotion_has_no_sign():
    assert emotion("a table ", "with four legs") == 0.0
    assert emotion("a wonderful ", "table") > 0.3 and emotion("a horrible ", "table") > 0.3


@pytest.mark.slow
def test_beams_gain_on_the_exact_optimum_what_enumeration_says():
    found = beams.tabular(60)
    fixed, free = found["all of 4 tokens, β = 1"], found["1 to 4 tokens, β = 1"]
    assert fixed["5"][0] - fixed["1"][0] == pytest.approx(fixed["5 − 1"][0])
    assert fixed["5 − 1"][0] > 0 > free["5 − 1"][0], "a short response has a large π_ref"
    mdp = TokenMdp(vocabulary=4, horizon=4, beta=1.0, prompts=60, seed=0, stops=False)
    likeliest = mdp.reward.gather(-1, mdp.optimum.argmax(-1, keepdim=True)).mean()
    assert fixed["10"][0] == pytest.approx(float(likeliest), abs=0.02)


@pytest.mark.slow
def test_the_whole_in_small(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With an untrained review model: what has to be equal is, and a second call decodes nothing."""
    monkeypatch.setattr(world, "review_model", lambda storage, quick: tiny_model)
    monkeypatch.setattr(world, "SCORER", "tests.decoding.test_pieces:vowels")
    monkeypatch.setattr(world, "emotion", lambda prompt, response: float(len(set(response))))
    monkeypatch.setattr(points_module, "QUICK_ALPHAS", (0.5,))
    small = replace(QUICK, training_prompts=24, steps=2, prompts=2, copies=2)
    folder = program.run(str(tmp_path), small, "python -m benchmarks.decoding --quick")
    page, results = (folder / "report.md").read_text(), json.loads((folder / "results.json").read_text())
    assert all(f"### {title}" in page for title in ("Every decoder", "Reward at equal KL", "Beams", "Claims"))
    found = results["points"]
    assert found["SFT-sampled"]["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert found["aligned-sampled"]["kl"][0] != 0.0, "training moved it"
    assert found["best-of-n-n8"]["reward"][0] >= found["best-of-n-n2"]["reward"][0], (
        "among more samples, the first included"
    )
    assert found["best-of-n-n2"]["kl"][0] == pytest.approx(math.log(2) - 0.5)
    texts = {name: [row["text"] for row in read_rows(folder / f"{name}.jsonl")] for name in found}
    assert texts["proxy-w1"] == texts["aligned-sampled"], "w = 1 on the reference is the policy, with the same streams"
    assert len(texts["aligned-sampled"]) == 4 and len(texts["CD-alpha0.5"]) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.jsonl") if path.stem in texts}
    assert len(before) == len(texts)
    assert program.run(str(tmp_path), small, "again") == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_embeddings_tell_like_from_unlike():
    embed = Embedder()
    first = ["The film was a delight from beginning to end"] * 2
    alike, unlike = embed.similarity(
        first, ["I enjoyed every minute of this movie", "Interest rates fell by a quarter"]
    )
    assert alike > 0.4 > 0.2 > unlike
    assert np.linalg.norm(embed.embed(first), axis=-1) == pytest.approx([1.0, 1.0], abs=1e-5)
    batch = [*first, "short", "a rather longer text than the others, to be padded to"]
    assert embed.embed(batch)[2] == pytest.approx(Embedder().embed(["short"])[0], abs=1e-5)
