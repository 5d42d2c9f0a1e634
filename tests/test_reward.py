"""The reward model gives transformers' own scores, packed, and is trained from a zero head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.collate import collate
from pipeline.config import ConfigError
from pipeline.contracts import Row
from pipeline.driver import fit
from pipeline.pretrained import load_causal_lm
from pipeline.reward import load_reward_network

ROWS = [Row(0, [5, 6, 7], [[20, 21, 22, 23], [30, 2]]), Row(1, [40], [[41, 42, 2]])]


def own_score(lm: torch.nn.Module, row: Row, k: int) -> torch.Tensor:
    """What the classifier itself says of [prompt | response]."""
    return lm(input_ids=torch.tensor([row.prompt_ids + row.response_ids[k]])).logits[0, 0]


@pytest.mark.parametrize("lora", [(), ("model.lora={r: 4, alpha: 8}",)])
def test_scores_are_the_classifiers_own_and_start_at_zero(make_config, lora) -> None:
    config = make_config("objective={name: reward_model}", *lora)
    network, batch = load_reward_network(config.model, config.model.path), collate(ROWS)
    assert (network(batch).scores == 0).all()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    out = network(batch)
    assert out.scores[1, 1] == 0, "there is no second response"
    for b, row in enumerate(ROWS):
        for k in range(len(row.response_ids)):
            torch.testing.assert_close(out.scores[b, k], own_score(network.lm, row, k), atol=1e-5, rtol=1e-4)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert "lm.score.weight" in trained
    assert bool(lora) == all("lora_" in name or name == "lm.score.weight" for name in trained)
    before = out.scores.detach().clone()
    alone = network.merged()
    torch.testing.assert_close(own_score(alone, ROWS[0], 1), before[0, 1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_training_separates_the_pairs_and_the_export_scores_alike_anywhere(make_config) -> None:
    config = make_config(
        "objective={name: reward_model}",
        "train.epochs=4",
        "optimizer.lr=0.01",
        "data.eval_fraction=0.2",
    )
    result = fit(config, local=True)
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["eval/accuracy"] == 1.0
    assert "logprob/chosen" not in result.metrics, "it has no log-probs"
    tokenizer = AutoTokenizer.from_pretrained(result.export)
    lm = AutoModelForSequenceClassification.from_pretrained(result.export)
    texts = ["3: the film good warm", "3: the film bad warm"]
    ids = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    scores = lm(**ids).logits[:, 0]
    assert scores[0] > scores[1] + 1
    whole = [Row(0, row[:5].tolist(), [row[5:].tolist()]) for row in ids["input_ids"][:1]]
    assert ids["attention_mask"][0].all()
    ours = load_reward_network(config.model, str(result.export))(collate(whole)).scores
    torch.testing.assert_close(ours[0, 0], scores[0], atol=1e-4, rtol=1e-4)
    # A reward model goes on from itself, head included, and is no language model.
    again = load_reward_network(config.model, str(result.export))
    assert torch.equal(again.lm.score.weight, lm.score.weight)
    with pytest.raises(ConfigError, match="is a reward model, which has no words to say"):
        load_causal_lm(str(result.export), torch.float32)


@pytest.mark.parametrize(("labels", "cause"), [(1, "no linear head `score`; use a decoder-only"), (2, "has 2 labels")])
def test_what_scores_nothing_is_refused(tmp_path: Path, make_config, labels, cause) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=99, num_labels=labels)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=cause):
        load_reward_network(make_config().model, str(tmp_path))


def test_transformers_reads_the_exported_score_at_the_end_even_where_padding_was_eos(
    make_config, tmp_path: Path
) -> None:
    """Llama-like tokenizers often pad with EOS; transformers skips padding, and would read one token too early."""
    from transformers import AutoModelForCausalLM

    base = make_config().model.path
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    config = make_config(
        "objective={name: reward_model}",
        f"model.path={tmp_path / 'model'}",
        "train.max_steps=3",
        "optimizer.lr=0.01",
    )
    export = fit(config, local=True).export
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    lm = AutoModelForSequenceClassification.from_pretrained(export)
    texts = [f"{text}{tokenizer.eos_token}" for text in ("a film good", "a film bad and long")]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    network = load_reward_network(config.model, str(export), trained=True)
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        ours = network(collate([Row(0, ids[:3], [ids[3:]])])).scores[0, 0]
        torch.testing.assert_close(lm(**batch).logits[i, 0], ours, atol=1e-4, rtol=1e-4)


def test_a_language_model_is_not_evaluated_as_a_reward_model(make_config) -> None:
    config = make_config("objective={name: reward_model}")
    with pytest.raises(ConfigError, match=r"^checkpoint_from: .* is no reward model"):
        load_reward_network(config.model, config.model.path, trained=True)
