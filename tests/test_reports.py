"""Inputs of other projects' bug reports that no other test has, and the table in docs/reports.md, whose tests exist."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from pipeline import checkpoint, data, loop
from pipeline.config import ConfigError
from pipeline.driver import fit
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.records import PreferencePair
from pipeline.rendering import Renderer
from tests.conftest import save_tiny_llama, tiny_tokenizer
from tests.test_loop import assert_same_weights, job_of, train
from tests.tiny_tokenizers import byte_level, chat, config, text_of

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def first_loss(make_config, *overrides: str) -> float:
    return train(job_of(make_config("train.max_steps=1", *overrides)))[0]["loss"]


# ------------------------------------------------------------------------------------------- tokens and ends


def without_metadata(folder: Path) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights)


def padded_with_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def adding_eos_and_cutting(folder: Path) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    backend.enable_truncation(5)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("habit", [without_metadata, padded_with_eos, adding_eos_and_cutting])
def test_habits_of_files_and_tokenizers_change_no_loss(habit, make_config, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    habit(folder)
    sft = ("objective={name: sft}",)
    plain = first_loss(make_config, *sft, f"storage={tmp_path}/plain")
    assert first_loss(make_config, *sft, f"storage={tmp_path}/other", f"model.path={folder}") == pytest.approx(
        plain, rel=1e-6
    )


def test_the_end_is_trained_on_where_padding_is_the_same_token(make_config, tiny_model: Path, tmp_path: Path) -> None:
    """The loss is the mean over each response's tokens, its EOS among them, whatever is padded with."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    padded_with_eos(folder)
    records = [("ab<|im_end|>x", "c"), ("a", "defgh")]  # an earlier turn's end is seen like any token
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in records))
    found = first_loss(
        make_config,
        "objective={name: sft}",
        "data.kind=demonstration",
        f"data.sources=[{{path: {path}}}]",
        f"model.path={folder}",
    )
    lm, tokenizer, total, count = AutoModelForCausalLM.from_pretrained(tiny_model), tiny_tokenizer(), 0.0, 0
    for prompt, response in records:
        ids = tokenizer(prompt + response)["input_ids"] + [2]
        logprobs = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        begin = len(tokenizer(prompt)["input_ids"])
        own = [logprobs[i - 1, ids[i]].item() for i in range(begin, len(ids))]
        total, count = total - sum(own), count + len(own)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_a_template_that_ends_turns_with_the_next_ones_header_gets_an_end() -> None:
    """As GLM's does: nothing of the template's own stops generation."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(byte_level(template), config())
    rendered = renderer(PreferencePair(prompt=chat("hi", "yes", "and?"), chosen="a", rejected="b"))
    assert [text_of(renderer.tokenizer, ids) for ids in rendered.response_ids] == ["a</s>", "b</s>"]
    assert 1 in renderer.stop_ids


# ------------------------------------------------------------------------------------------------- models


def test_a_mixture_of_experts_starts_as_its_reference_whatever_its_configuration_returns(
    make_config, tmp_path: Path
) -> None:
    """`output_router_logits` changes what the model returns; the router's noise would change what it computes."""
    torch.manual_seed(0)
    settings = SMALL | {"num_local_experts": 4, "output_router_logits": True, "router_jitter_noise": 0.5}
    MixtralForCausalLM(MixtralConfig(**settings)).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    assert first_loss(make_config, f"model.path={tmp_path}/moe") == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_on_gpt2_learn_under_recomputed_layers(make_config, tmp_path: Path) -> None:
    """Its projections are Conv1D, and frozen embeddings have no gradient to start the recomputation with."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    lines = []
    for recompute in ("false", "true"):
        job = job_of(
            make_config(
                f"model.path={tmp_path}/gpt2",
                "model.lora={r: 4}",
                "optimizer.lr=0.01",
                f"model.activation_checkpointing={recompute}",
            ),
            recompute,
        )
        lines.append(train(job))
        moved = [
            name
            for name, tensor in checkpoint.read_weights(checkpoint.latest(job.run))
            if "lora_B" in name and tensor.any()
        ]
        assert len(moved) == 2 * 4, "each of the four projections of both layers"
    assert lines[0][-1]["loss"] < math.log(2) - 0.05
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-5)


def test_resumed_adapters_go_on_where_they_were(make_config, monkeypatch) -> None:
    settings = ("model.lora={r: 4, dropout: 0.1}", "optimizer.lr=0.01", "train.epochs=2")
    whole = job_of(make_config(*settings), "whole")
    train(whole)
    broken, real, calls = job_of(make_config(*settings), "broken"), loop.train_step, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(broken)
    monkeypatch.setattr(loop, "train_step", real)
    train(broken)
    assert_same_weights(whole, broken)


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_kto_of_one_class_and_of_single_rows_is_finite(label: bool, rows: int, make_config, tmp_path: Path) -> None:
    path = tmp_path / "unpaired.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}", "label": label}) + "\n" for i in range(4))
    )
    lines = train(
        job_of(
            make_config(
                "objective={name: kto}",
                "data.kind=unpaired",
                f"data.sources=[{{path: {path}}}]",
                f"train.rows_per_step={rows}",
            )
        )
    )
    assert len(lines) == 4 // rows
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6), "1 − σ(0): no response is likelier than at the start"


@pytest.mark.slow
def test_the_evaluated_loss_does_not_depend_on_how_rows_are_batched(make_config, tmp_path: Path) -> None:
    found = []
    for tokens in (64, 1024):
        storage = f"storage={tmp_path}/{tokens}"
        sft = ("objective={name: sft}", "data.eval_fraction=0.3", "train.max_steps=1")
        run = fit(make_config(*sft, storage, f"train.tokens_per_micro_batch={tokens}"), local=True).run
        found.append(read_metrics(run / METRICS_FILE)[-1]["eval/loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_a_generation_config_that_transformers_refuses_to_save_costs_no_run(make_config, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    export = fit(make_config(f"model.path={folder}", "train.max_steps=1"), local=True).export
    assert AutoModelForCausalLM.from_pretrained(export).generation_config.eos_token_id in (2, [2])


def test_what_an_objective_does_not_know_is_refused_and_not_ignored(make_config) -> None:
    with pytest.raises(ConfigError, match=r"^objective\.label_smoothing: "):
        make_config("objective={name: ipo, label_smoothing: 0.1}")


# -------------------------------------------------------------------------------------------------- records


def test_columns_of_many_types_and_templates_that_refuse_cost_their_own_records_alone(
    make_config, tmp_path: Path
) -> None:
    """A column that is a number here, a text or a list there; a template without system text whose turns alternate."""
    path, answer = tmp_path / "pairs.jsonl", {"chosen": "a", "rejected": "b"}
    notes = [3, "three", [3], {"n": 3}, None]
    roles = [["user"], ["system", "user"], ["user", "user"], ["user", "assistant", "user"]]
    records = [
        {"prompt": f"p{i}", "note": note, "id": f"{i}a" if i % 2 else i} | answer for i, note in enumerate(notes)
    ]
    records += [{"prompt": [{"role": role, "content": "x"} for role in turns]} | answer for turns in roles]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = json.dumps(strict)
    made = make_config(
        f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=0.5", f"data.chat_template={template}"
    )
    folder = data.prepare(made, made.model.path, local=True)
    assert data.summary(folder).rows == len(notes) + 2
    refused = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [line["source"].rpartition(":")[2] for line in refused] == ["7", "8"]
    assert all("roles must alternate" in line["reason"] for line in refused)


def test_tokens_that_the_tokenizer_does_not_have_are_drawn_and_end_nothing(qalign, tmp_path: Path) -> None:
    """Vocabularies are padded to a round number; what is drawn there has an id, and no text."""
    folder = save_tiny_llama(tmp_path / "padded", vocab_size=320)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][259:] *= 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out.jsonl"
    settings = (f"checkpoint_from={folder}", f"model.path={folder}", "sampling.limit=2", "sampling.max_new_tokens=6")
    status, _, told = qalign("decode", *settings, f"sampling.output={out}")
    assert status == 0, told
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(row["token_ids"]) for row in rows] == [6, 6]
    assert any(token >= 259 for row in rows for token in row["token_ids"])
    kept = [[token for token in row["token_ids"] if token < 259] for row in rows]
    assert [row["text"] for row in rows] == [tiny_tokenizer().decode(ids) for ids in kept]


# ---------------------------------------------------------------------------------------------------- table


def test_every_test_that_the_table_names_exists() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (root / "docs" / "reports.md").read_text())
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (root / file).read_text()]
    assert not missing
