"""What tests share: a tiny language model with a real tokenizer, and one local Ray cluster."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Scorers and objectives of tests are named by dotted path: only what is installed, or named here, may be.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

import torch
from hypothesis import settings

settings.register_profile(
    "qalign", deadline=None, derandomize=True, max_examples=25
)  # a busy machine and chance fail no test
settings.load_profile("qalign")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drills run only when asked for: `-m slow`, or by their own name."""
    if "slow" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    drills = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in set(drills)]
    config.hook.pytest_deselected(items=drills)


def pytest_collection_finish(session: pytest.Session) -> None:
    """A test module may define `warm_up()`: slow imports of its helper processes then go on beside the other tests.

    Not where xdist deals the modules out: most of its processes would warm up for tests that another one runs.
    """
    if not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        for module in {item.module for item in session.items if hasattr(item, "module")}:
            getattr(module, "warm_up", lambda: None)()
    # Each engine ends with a full collection. What the libraries made at import is millions of objects that stay.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models are fastest on one thread, and results don't depend on the machine's cores."""
    torch.set_num_threads(1)


def tiny_tokenizer():
    """Byte-level tokenizer of 259 tokens: every text is representable, no merges, ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny_llama(folder: Path, seed: int = 0, **changes) -> Path:
    """A random Llama of 2 layers × 32 with the tiny tokenizer, as save_pretrained writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


WORDS = [
    "the",
    "film",
    "was",
    "dull",
    "slow",
    "bright",
    "warm",
    "quiet",
    "loud",
    "old",
    "new",
    "long",
    "short",
    "strange",
    "plain",
    "story",
    "scene",
    "actor",
    "end",
    "start",
]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """A jsonl file of preference pairs with ragged lengths; chosen responses say 'good', rejected ones 'bad'."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    lines = []
    for i in range(count):
        record = {"prompt": f"{i}: {words(2, 8)}", "chosen": f" good {words(1, 6)}", "rejected": f" bad {words(1, 6)}"}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 preference pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 24)


@pytest.fixture
def make_config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., object]:
    """make_config("train.epochs=2", …) → a RunConfig of a tiny DPO run in a folder of its own."""
    from pipeline.config_file import load

    def make(*overrides: str):
        base = {
            "storage": str(tmp_path / "outputs"),
            "data": {"kind": "preference", "sources": [{"path": str(pairs_file)}], "max_length": 128},
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "objective": {"name": "dpo", "beta": 0.5},
            "optimizer": {"lr": 1e-3},
            "train": {"rows_per_step": 8, "tokens_per_micro_batch": 1024},
            "checkpoint": {"every": 2},
            "tracking": {"enabled": False},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(base))
        return load(path, overrides)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that are marked `ray`."""
    import logging

    import ray

    from pipeline.cluster import ENVIRONMENT, WORKER_ENVIRONMENT
    from pipeline.forks import ForkServer

    os.environ.update(ENVIRONMENT)
    server = ForkServer(WORKER_ENVIRONMENT)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        logging_level=logging.ERROR,
        runtime_env={"py_executable": server.python},
    )
    yield
    ray.shutdown()
    server.close()


@pytest.fixture
def qalign(make_config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """qalign("train", "key=value", "--flag") → (status, stdout, stderr) of a tiny run."""
    from jobs.cli import main

    make_config()

    def call(job: str, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([job, str(tmp_path / "config.yaml"), "--local", *arguments])
        return status, *capfd.readouterr()

    return call
