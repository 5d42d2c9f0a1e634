"""Scorers in memory: a reward model packed by prompt gives what it gives alone; answers come from the records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.collate import collate
from pipeline.config import ModelConfig
from pipeline.contracts import Row
from pipeline.decoding import scoring
from pipeline.decoding.contract import Prompt
from pipeline.decoding.scoring import LiveScorer, RewardOfTokens, load_scorers
from pipeline.evaluation.classifier import ScoreTexts
from pipeline.evaluation.judging import Texts
from pipeline.pretrained import load_scorer, load_tokenizer

PROMPTS = [Prompt([5, 6, 7], 0), Prompt([40], 1)]
ASKED = [PROMPTS[i] for i in (0, 1, 0, 0, 1, 0)]
RESPONSES = [[20, 21, 22], [30, 31], [23], [24, 25, 26, 27, 2], [32, 33, 34], [28, 29]]


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a random head, and the tokenizer of `tiny_model`."""
    lm = load_scorer(str(tiny_model), torch.float32)
    torch.manual_seed(0)
    torch.nn.init.normal_(lm.score.weight, std=0.5)
    folder = tmp_path_factory.mktemp("reward")
    lm.save_pretrained(folder)
    load_tokenizer(str(tiny_model)).save_pretrained(folder)
    return folder


def test_a_reward_model_shares_the_prompts_forward(make_config, tiny_model, reward_model, monkeypatch):
    config = make_config(f"sampling.scorer=classifier:{reward_model}")
    tokenizer = load_tokenizer(str(tiny_model))
    scorer = load_scorers(config, tokenizer, str(tiny_model), False)["scorer"]
    scorer.begin(PROMPTS, None)
    found = scorer(ASKED, RESPONSES).tolist()
    plain = ScoreTexts(str(reward_model), None, True, ModelConfig(path="x", dtype="float32").model_dump(), False)
    alone = [float(plain.network(_one(p, r)).scores[0, 0]) for p, r in zip(ASKED, RESPONSES, strict=True)]
    assert found == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == 6
    monkeypatch.setattr(scoring, "ROW_TOKENS", 9)  # two or one of them at a time
    assert scorer(ASKED, RESPONSES).tolist() == pytest.approx(alone, abs=1e-5)


def _one(prompt: Prompt, response: list[int]):
    return collate([Row(0, list(prompt.ids), [response])])


def test_rows_hold_as_many_responses_as_fit(monkeypatch):
    texts = [Texts("", "", p.ids, r) for p, r in zip(ASKED, RESPONSES, strict=True)]
    assert list(RewardOfTokens._rows(texts)) == [[0, 2, 3, 5], [1, 4]]
    monkeypatch.setattr(scoring, "ROW_TOKENS", 9)
    assert list(RewardOfTokens._rows(texts)) == [[0, 2], [3], [5], [1, 4]]


def test_right_answers_are_taken_from_the_records(make_config, tiny_model):
    config = make_config("sampling.scorer=verifiable")
    tokenizer = load_tokenizer(str(tiny_model))
    scorer = LiveScorer(config, tokenizer, str(tiny_model), False)
    texts = ["2+3=", "9?", "7?", "7?"]
    prompts = [Prompt(tokenizer(text).input_ids, key) for key, text in enumerate(texts)]
    scorer.begin(prompts, ["5", None, "7", "8"])
    said = [tokenizer(text).input_ids for text in ("the answer is 5", "the answer is 6", "5", "the answer is 7")]
    scores = scorer([prompts[i] for i in (0, 0, 1, 2)], said)
    assert scores[:2].tolist() == [1.0, 0.0]
    assert scores[2:].isnan().all(), "there is no answer for one prompt, and two for the other"
