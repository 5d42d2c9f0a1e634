"""One side of the `prepare` measurement in its own process: `python -m benchmarks.throughput.tokenise SIDE FOLDER [quick]`.

Reads pairs.jsonl in FOLDER, writes rows below it, and prints one JSON line: seconds, how many of them went into loading the
file before any row was tokenised (for `datasets`), and what the rows hold.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROCESSES = 2
COMPARED_ROWS = 100


def ours(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """`pipeline.data.prepare` on a cluster of its own, started before the clock."""
    from pipeline import cluster, data
    from pipeline.config_file import validate
    from pipeline.order import MicroBatch
    from pipeline.rows import Rows

    config = validate(
        {
            "storage": str(folder / "ours"),
            "data": {"kind": "preference", "sources": [{"path": str(folder / "pairs.jsonl")}], "max_length": 4096},
            "model": {"path": str(tokenizer)},
            "objective": {"name": "dpo"},
        }
    )
    cluster.connect(config)
    started = time.perf_counter()
    made = data.prepare(config, str(tokenizer))
    seconds = time.perf_counter() - started
    rows = Rows(made)
    first = rows.take(MicroBatch(tuple(range(min(COMPARED_ROWS, len(rows.lengths))))))
    texts = ([row.prompt_ids, *row.response_ids] for row in first)
    return {"seconds": seconds, "loading": 0.0, "tokens": int(rows.lengths.sum()), "digest": _digest(texts)}


def with_datasets(folder: Path, tokenizer: Path, batched: bool) -> dict[str, Any]:
    """`load_dataset`, `map` in two processes, `save_to_disk`: the same three columns of token ids."""
    from datasets import load_dataset, load_from_disk
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    end = [encode.eos_token_id]

    def one(row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen, rejected = (
            encode(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "chosen", "rejected")
        )
        return {"prompt_ids": prompt, "chosen_ids": chosen + end, "rejected_ids": rejected + end}

    def many(rows: dict[str, list[Any]]) -> dict[str, Any]:
        prompt, chosen, rejected = (
            encode(rows[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "chosen", "rejected")
        )
        return {
            "prompt_ids": prompt,
            "chosen_ids": [ids + end for ids in chosen],
            "rejected_ids": [ids + end for ids in rejected],
        }

    name = "batched" if batched else "single"
    started = time.perf_counter()
    texts = load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / f"cache-{name}")
    )
    loading = time.perf_counter() - started
    rows = texts.map(many if batched else one, batched=batched, num_proc=PROCESSES, remove_columns=texts.column_names)
    rows.save_to_disk(folder / name)
    seconds = time.perf_counter() - started
    saved = load_from_disk(folder / name)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    first = saved.select(range(min(COMPARED_ROWS, len(saved))))
    total = sum(_items(saved.data.column(column)) for column in columns)
    digest = _digest([row[column] for column in columns] for row in first)
    return {"seconds": seconds, "loading": loading, "tokens": total, "digest": digest}


def _items(column: Any) -> int:
    """Entries of all lists of an Arrow column."""
    import pyarrow.compute as compute

    return compute.sum(compute.list_value_length(column)).as_py()


SIDES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "ours": ours,
    "map": lambda folder, tokenizer: with_datasets(folder, tokenizer, batched=False),
    "map_batched": lambda folder, tokenizer: with_datasets(folder, tokenizer, batched=True),
}


def _digest(rows: Iterable[list[list[int]]]) -> str:
    """Hash of the token ids of some rows, each prompt, chosen, rejected."""
    text = json.dumps([[list(map(int, ids)) for ids in row] for row in rows])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _tokenizer(folder: Path, quick: bool) -> Path:
    """SmolLM2's (49,152 entries); quick: one of single bytes."""
    if not quick:
        from pipeline.model_files import locate

        return Path(locate("package:smollm2", folder / "cache"))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = folder / "bytes"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(made)
    return made


def main() -> int:
    """Prints the answer on the last line of standard output."""
    side, folder, quick = sys.argv[1], Path(sys.argv[2]), "quick" in sys.argv[3:]
    print(json.dumps(SIDES[side](folder, _tokenizer(folder, quick))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
