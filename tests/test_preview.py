"""What `--dry-run` shows of a record: whose each token is, where steps end and rewards land, labels."""

from __future__ import annotations

import json
from pathlib import Path

from jobs.preview import memory, preview, sample
from pipeline.config import DataConfig, Source
from pipeline.layouts import parse
from pipeline.rendering import Renderer
from tests.conftest import tiny_tokenizer


def shown(value: dict, kind: str) -> list[str]:
    tokenizer = tiny_tokenizer()
    render = Renderer(tokenizer, DataConfig(kind=kind, sources=(Source(path="x"),)))
    return sample(tokenizer, render(parse(value, kind)), kind)


def test_a_trajectory_shows_authors_steps_and_rewards():
    steps = [{"text": "a\n"}, {"text": "=", "role": "environment"}, {"text": "b", "reward": 0.25}]
    value = {"prompt": "p", "steps": steps, "reward": 1, "step_logprobs": [-1, None, -2]}
    assert shown(value, "trajectory") == [
        "  prompt     'p' (1 tokens, not trained on)",
        "  response 1 [a][⏎]⟨+0⟩{=}⟨+0⟩[b]⟨+0.25⟩[<|im_end|>]⟨+1⟩ "
        "(5 tokens, 1 of them the environment's, 3 steps, return 1.25, behaviour log-prob -3)",
    ]


def test_labels_and_plain_records():
    value = {"prompt": "p", "response": "a"}
    assert shown(value | {"label": True}, "unpaired")[1] == "  response 1 [a][<|im_end|>]⟨+1⟩ (2 tokens, good)"
    assert shown(value | {"label": False}, "unpaired")[1] == "  response 1 [a][<|im_end|>]⟨-1⟩ (2 tokens, bad)"
    assert shown(value, "demonstration")[1] == "  response 1 [a][<|im_end|>] (2 tokens)"


def test_the_sample_is_the_first_usable_record(make_config, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    pairs = [{"prompt": "p"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    report = preview(make_config(f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=0.5"))
    assert "sample     a.jsonl:2\n  prompt     'q'" in report
    assert "[y][e][s][<|im_end|>] (4 tokens)" in report


def test_of_a_reference_whose_states_are_cached_the_head_alone_takes_memory(make_config):
    live, cached = (
        preview(make_config("objective={name: tdpo}", f"model.reference_states={choice}"))
        for choice in ("live", "cached")
    )
    assert "           and a frozen reference beside it" in live
    assert "           and the head of a frozen reference beside it" in cached


def test_an_elastic_run_shows_the_memory_of_its_fewest_workers(make_config, tmp_path: Path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=1024, num_hidden_layers=4).save_pretrained(tmp_path / "model")

    def shown(workers: str) -> tuple[str, str]:
        config = make_config(f"scaling.workers={workers}", "scaling.zero_stage=3", "model.dtype=float32")
        lines = memory(config, str(tmp_path / "model"), [100])
        head = next(line for line in lines if line.startswith("memory"))
        return head.partition("per worker ")[2], next(line.split("weights")[1] for line in lines if "weights " in line)

    assert shown("1")[0] == "(one worker, ZeRO-0):", "nobody to share with"
    assert shown("[2,8]") == ("(with 2 of at most 8 workers, ZeRO-3):", shown("2")[1])
    assert shown("[2,8]")[1] != shown("8")[1]
