"""A tiny random Llama with a tokenizer of bytes, preference pairs, and the configuration of the runs that are broken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ("the", "film", "was", "dull", "slow", "bright", "warm", "quiet", "loud", "old", "new", "long", "story", "end")
ROWS_PER_STEP = 8


def write_model(folder: Path) -> Path:
    """A Llama of 2 layers × 32, as `save_pretrained` writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def write_pairs(path: Path, count: int, words: int = 6) -> Path:
    """Preference pairs of about `words` words a text."""
    chance = random.Random(0)  # noqa: S311 - drawn for a benchmark

    def text() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(max(1, words // 2), words)))

    with path.open("w") as lines:
        for i in range(count):
            pair = {"prompt": f"{i}: {text()}", "chosen": f" good {text()}", "rejected": f" bad {text()}"}
            lines.write(json.dumps(pair) + "\n")
    return path


def settings(model: Path, pairs: Path, steps: int, every: int) -> dict[str, Any]:
    """A configuration of `steps` optimizer steps in two epochs, with a checkpoint after each `every`."""
    return {
        "name": "drill",
        "data": {"kind": "preference", "sources": [{"path": str(pairs)}], "max_length": 256},
        "model": {"path": str(model), "dtype": "float32"},
        "objective": {"name": "benchmarks.faults.witness:Witness", "beta": 0.5},
        "optimizer": {"lr": 1e-3},
        "train": {"rows_per_step": ROWS_PER_STEP, "tokens_per_micro_batch": 4096, "epochs": 2, "max_steps": steps},
        "checkpoint": {"every": every},
        "tracking": {"enabled": False},
    }
