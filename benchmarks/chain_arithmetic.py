"""Chain arithmetic: a reasoning task that one CPU core learns, with answers written out line by line.

A prompt is a chain such as `7+5*3-4*2+9:`, computed strictly from left to right, modulo 10. A response writes one line per
operation and ends with EOS: `7+5=2⏎2*3=6⏎6-4=2⏎2*2=4⏎4+9=3⏎`. Here are the task, how a response is judged, demonstrations that
are wrong on purpose, the tokenizer (a token per character) and the model (a Llama of 125,504 parameters).

Left out: training and sampling, which are the pipeline's.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATIONS = 5
"""Of a chain, and so lines of a response."""
OPERATORS = "+-*"
CHARACTERS = "0123456789+-*=:\n"
EOS, EOS_ID = "<eos>", len(CHARACTERS)
PROMPT_TOKENS = 2 * OPERATIONS + 2
RESPONSE_TOKENS = 6 * OPERATIONS + 1
"""Of a right response, with EOS."""

Fact = tuple[int, str, int]
FACTS: tuple[Fact, ...] = tuple((a, op, b) for a in range(10) for op in OPERATORS for b in range(10))


@dataclass(frozen=True, slots=True)
class Teacher:
    """Writes the demonstrations: firmly believes some wrong facts, and now and then slips on others.

    The share of wrong beliefs sets the accuracy of a model that learned from it; how often a belief is acted on sets how
    seldom its samples are right nevertheless, that is, how hard it is to do better with nothing but those samples.
    """

    misconceived: float = 0.14  # share of the facts with one fixed wrong result
    wrong: float = 0.65  # probability that a misconceived fact is written with its wrong result
    slip: float = 0.04  # probability of a random digit otherwise


MID = Teacher()
HARD = Teacher(wrong=0.85, slip=0.03)


# ---------------------------------------------------------------------------------------------------- task


def result(a: int, op: str, b: int) -> int:
    """`a op b` modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


def draw_prompts(count: int, stream: str, besides: Collection[str] = ()) -> list[str]:
    """`count` different prompts that are not in `besides`; a function of the arguments alone."""
    chance, taken = random.Random(stream), set(besides)  # noqa: S311
    found: list[str] = []
    while len(found) < count:
        chain = "".join(chance.choice(OPERATORS) + str(chance.randrange(10)) for _ in range(OPERATIONS))
        prompt = f"{chance.randrange(10)}{chain}:"
        if prompt not in taken:
            taken.add(prompt)
            found.append(prompt)
    return found


def operations(prompt: str) -> list[tuple[str, int]]:
    """[(operator, operand), …] of a prompt, behind its first digit."""
    return [(prompt[i], int(prompt[i + 1])) for i in range(1, len(prompt) - 1, 2)]


def answer(prompt: str) -> int:
    """The chain's value."""
    value = int(prompt[0])
    for op, operand in operations(prompt):
        value = result(value, op, operand)
    return value


# ----------------------------------------------------------------------------------------------- judgement


def split_lines(response: str) -> list[str]:
    """A response's lines, each with its line feed: the steps of a trajectory."""
    return response.splitlines(keepends=True)


def is_correct(prompt: str, response: str) -> bool:
    """Whether the last line ends with the right result, however it was found. The response has to have ended by itself."""
    return response.endswith(f"={answer(prompt)}\n")


def sound_lines(prompt: str, response: str) -> list[bool]:
    """For each operation of the prompt: does its line go on from the value written before, copy it, and compute right?"""
    written = split_lines(response)
    verdicts, value = [], prompt[0]
    for place, (op, operand) in enumerate(operations(prompt)):
        line = written[place] if place < len(written) else ""
        verdicts.append(value.isdigit() and line == f"{value}{op}{operand}={result(int(value), op, operand)}\n")
        value = line[4:5]
    return verdicts


def is_strict(prompt: str, response: str) -> bool:
    """Whether every line is right and nothing follows."""
    return len(split_lines(response)) == OPERATIONS and all(sound_lines(prompt, response))


# ------------------------------------------------------------------------------------------ demonstrations


def misconceptions(teacher: Teacher, seed: int) -> dict[Fact, int]:
    """The teacher's wrong beliefs: fact → its one wrong result."""
    chance = random.Random(f"misconceptions/{seed}")  # noqa: S311
    wrong = chance.sample(FACTS, round(teacher.misconceived * len(FACTS)))
    return {fact: chance.choice([digit for digit in range(10) if digit != result(*fact)]) for fact in wrong}


def demonstrations(teacher: Teacher, prompts: Collection[str], seed: int) -> list[str]:
    """One response to each prompt, as the teacher writes it; after an error it goes on from what it wrote."""
    beliefs = misconceptions(teacher, seed)
    chance = random.Random(f"demonstrations/{seed}")  # noqa: S311
    return [_demonstration(prompt, teacher, beliefs, chance) for prompt in prompts]


def _demonstration(prompt: str, teacher: Teacher, beliefs: dict[Fact, int], chance: random.Random) -> str:
    value, written = int(prompt[0]), ""
    for op, operand in operations(prompt):
        fact = (value, op, operand)
        found = result(*fact)
        if fact in beliefs and chance.random() < teacher.wrong:
            found = beliefs[fact]
        elif chance.random() < teacher.slip:
            found = chance.randrange(10)
        written += f"{value}{op}{operand}={found}\n"
        value = found
    return written


# ----------------------------------------------------------------------------------- tokenizer and model


def tokenizer() -> Any:
    """A fast tokenizer with a token per character; EOS also stands for unknown characters, which the pipeline refuses."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate([*CHARACTERS, EOS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=EOS))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS, unk_token=EOS)


def write_model(folder: Path, seed: int) -> Path:
    """A random model with its tokenizer, as transformers loads them. Returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(CHARACTERS) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
