"""Scores by classifiers: our reward models by tokens, others by text and label, and what cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.evaluation.classifier import label_index
from pipeline.evaluation.judging import Texts
from pipeline.evaluation.scorers import judge_for
from tests.conftest import tiny_tokenizer


def save_classifier(folder: Path, labels: list[str], extra: str | None = None) -> Path:
    """A random Llama classifier with the tiny tokenizer (and one more token where its own should differ)."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    if extra:
        tokenizer.add_tokens([extra])
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts(*pairs: tuple[str, str]) -> list[Texts]:
    tokenizer = tiny_tokenizer()
    return [Texts(p, r, tokenizer(p)["input_ids"], [*tokenizer(r)["input_ids"], 2]) for p, r in pairs]


PAIRS = [("ab", "c"), ("a", "longer text"), ("x", "yz")]


def expected(folder: Path, ids: list[list[int]]) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([own])).logits for own in ids])


def test_a_reward_model_scores_the_sampled_tokens(make_config, tiny_model: Path, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "rm", ["LABEL_0"])
    samples = texts(*PAIRS)
    scores, failures = judge_for(make_config(f"sampling.scorer='classifier:{folder}'"), str(tiny_model))(samples, True)
    whole = expected(folder, [[*t.prompt_ids, *t.response_ids] for t in samples])[:, 0]
    assert scores == pytest.approx(whole.tolist(), abs=1e-4)
    assert failures == [] and abs(scores[0] - scores[1]) > 1e-3


def test_positions_that_begin_behind_paddings_are_not_exceeded(make_config, tiny_model: Path, tmp_path: Path) -> None:
    """RoBERTa declares 34 positions for 32 tokens."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    own = {"max_position_embeddings": 34, "pad_token_id": 1, "initializer_range": 0.5, "num_labels": 2}
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=260, **own, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "roberta")
    config = make_config(f"sampling.scorer='classifier:{tmp_path / 'roberta'}'", "evaluation.label=1")
    scores, failed = judge_for(config, str(tiny_model))(texts(("a" * 40, "b"), ("a" * 33, "c"), ("b" * 33, "c")), True)
    assert not failed
    assert scores[0] == pytest.approx(scores[1], abs=1e-6), "cut after 32 tokens"
    assert scores[0] != pytest.approx(scores[2], abs=1e-4)


def test_another_classifier_reads_texts_ended_as_in_training(make_config, tiny_model: Path, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "sentiment", ["NEGATIVE", "POSITIVE"], extra="<more>")
    config = make_config(f"sampling.scorer='classifier:{folder}'", "evaluation.label=POSITIVE")
    scores, _ = judge_for(config, str(tiny_model))(texts(*PAIRS), True)
    tokenizer = tiny_tokenizer()
    whole = expected(folder, [[*tokenizer(p + r)["input_ids"], 2] for p, r in PAIRS]).softmax(-1)[:, 1]
    assert scores == pytest.approx(whole.tolist(), abs=1e-4)
    by_index = make_config(f"sampling.scorer='classifier:{folder}'", "evaluation.label=0")
    assert judge_for(by_index, str(tiny_model))(texts(*PAIRS), True)[0] == pytest.approx((1 - whole).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "label", "found"),
    [(["A"], None, None), (["A"], "A", None), (["A", "B"], "B", 1), (["A", "B"], 0, 0), (["A", "B"], "1", 1)],
)
def test_labels_by_name_and_index(labels, label, found) -> None:
    from transformers import LlamaConfig

    assert label_index(LlamaConfig(id2label=dict(enumerate(labels))), label) == found


def test_what_cannot_score_is_told_before_any_work(make_config, tiny_model: Path, tmp_path: Path) -> None:
    two = save_classifier(tmp_path / "two", ["NEGATIVE", "POSITIVE"])
    for name, overrides, message in [
        ("classifier", [], "write classifier:NAME"),
        (f"classifier:{tmp_path}/none/at/all", [], r"sampling\.scorer: no folder"),
        (f"classifier:{tiny_model}", [], "is no sequence classifier"),
        (f"classifier:{two}", [], r"evaluation\.label: name the label .* 0 \(NEGATIVE\), 1 \(POSITIVE\)"),
        (f"classifier:{two}", ["evaluation.label=SAD"], "has no label 'SAD'"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            judge_for(make_config(f"sampling.scorer='{name}'", *overrides), None)
        assert "\n" not in str(caught.value)
