"""Every architecture of transformers: packed rows, and decoding beside others, against its plain forward of one sequence at a time.

The models are tiny, their attention windows and chunks six tokens, and the rows up to forty tokens long.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.collate import collate
from pipeline.config import ConfigError
from pipeline.contracts import Row
from pipeline.decoding.prefixes import Prefixes
from pipeline.model import Policy
from pipeline.packing import PACKS
from tests.tiny_architectures import NAMES, VOCABULARY, tiny_lm


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Rotary positions whose border lies within the rows."""
    plain = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    return {"rope_parameters": plain | settings}


LEFT_OUT = {
    "blt": "bytes in patches, with encoders of its own",
    "cohere_compass_text": "its default configuration does not load",
    "dbrx": "its default configuration does not load",
    "dots3_note": "an audio model of gigabytes",
    "dots3_note_text": "an n-gram table of 38 million weights, whatever the configuration",
    "emu3": "makes images",
    "fuyu": "reads images only together with another package",
    "gemma3n": "needs a vision package",
    "gemma3n_text": "two tiny layers cannot share a cache as it asks",
    "gemma4": "its text model is gemma4_text",
    "gemma4_assistant": "drafts for another model",
    "gemma4_text": "a table of 134 million weights, whatever the configuration",
    "gemma4_unified": "its text model is gemma4_unified_text",
    "gemma4_unified_assistant": "drafts for another model",
    "git": "describes images",
    "got_ocr2": "reads images",
    "inkling_text": "transforms its logits in a way of its own: refused",
    "mllama": "reads images",
    "modernbert-decoder": "transforms its states before the head: refused",
    "moss_transcribe_diarize": "reads audio",
    "musicgen": "makes audio",
    "musicgen_melody": "makes audio",
    "phi4_multimodal": "reads audio and images",
    "phimoe": "its router draws in training: refused",
    "prophetnet": "predicts several tokens at once: refused",
    "qwen4_exp": "its text model has no tiny form",
    "qwen4_exp_text": "has no tiny form by itself",
    "xmod": "asks for the language: refused",
    "zamba": "its shared layers ask for dozens of layers",
}
"""Architectures without a tiny form, or without log-probs of text, and why."""

ENCODERS = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "cpmant",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
    ]
)
"""Models that look ahead as they are configured by default."""

VARIANTS: dict[str, tuple[str, dict]] = {
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "gpt_bigcode with all heads": ("gpt_bigcode", {"multi_query": False}),
    "llama with llama3 rope": ("llama", rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama with yarn": ("llama", rope("yarn", factor=4.0)),
    "llama with dynamic rope": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "phi3 with longrope": ("phi3", rope("longrope", short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0])),
    "qwen2, all layers with windows": ("qwen2", {"layer_types": ["sliding_attention"] * 2}),
}
"""Settings of an architecture that change what a token sees."""

QUICK = (
    "bloom",
    "falcon with ALiBi",
    "gemma3_text",
    "gpt_neo",
    "gpt_oss",
    "llama4_text",
    "mamba",
    "phi3 with longrope",
    "qwen3_5_text",
)
"""Cases of their own kind, for every run of the tests; all the others are drills."""

APART = frozenset({"falcon with ALiBi"})
"""Variants that do not pack, of architectures that do."""

STEPS_DIFFER = frozenset({"nemotron_h", "zamba2"})
"""Models whose step behind a cache bounds time steps where the whole forward does not, in transformers as here."""

CASES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in (*NAMES, *VARIANTS)
    if name not in LEFT_OUT and name not in ENCODERS
]


def drawn(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY - 3, (length,), generator=generator).tolist()


def ragged_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(3)
    lengths = [(17, (14, 9, 1)), (3, (11, 20)), (25, (2,)), (1, (9, 9))]
    return [Row(i, drawn(p, generator), [drawn(r, generator) for r in rs]) for i, (p, rs) in enumerate(lengths)]


def plain_logits(lm: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[T, V]: what transformers computes for this sequence alone."""
    lm(input_ids=torch.tensor([ids[:1]]), use_cache=False)  # dynamic rope forgets the sequence before
    return lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def packed_gap(lm: torch.nn.Module, plain: torch.nn.Module) -> tuple[str, float]:
    policy, rows, worst = Policy(lm), ragged_rows(), 0.0
    found = policy(collate(rows)).logprobs
    for b, row in enumerate(rows):
        for k, response in enumerate(row.response_ids):
            logprobs = plain_logits(plain, row.prompt_ids + response)[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            own = logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]
            worst = max(worst, float((found[b, k, : len(response)] - own).abs().max()))
    return policy.layout, worst


@torch.no_grad()
def decoding_gap(lm: torch.nn.Module, plain: torch.nn.Module, steps: int = 12) -> float:
    """Forks of three prompts grow side by side, change places, and leave."""
    generator, worst = torch.Generator().manual_seed(5), 0.0
    prompts = [drawn(length, generator) for length in (5, 21, 13)]
    prefixes = Prefixes.of(lm, prompts, 0)
    sequences, forks = prompts, {0: [0, 0, 1, 2, 2], 4: [4, 0, 1, 3], 8: [3, 3, 0, 2, 1]}
    for step in range(steps):
        if (take := forks.get(step)) is not None:
            fork, prefixes = prefixes, prefixes.select(torch.tensor(take))
            fork.append(torch.full((len(fork),), 7))  # must not be seen by the other
            sequences = [list(sequences[i]) for i in take]
        elif step == 6:
            prefixes.keep(torch.tensor([1, 1, 2, 3]))
            sequences = [list(sequences[i]) for i in (1, 1, 2, 3)]
        tokens = drawn(len(prefixes), generator)
        prefixes.append(torch.tensor(tokens))
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        exact = torch.stack([plain_logits(plain, sequence)[-1] for sequence in sequences])
        worst = max(worst, float((prefixes.logprobs - exact.log_softmax(-1)).abs().max()))
    return worst


def built(case: str) -> torch.nn.Module:
    name, changes = VARIANTS.get(case, (case, {}))
    return tiny_lm(name, **changes)


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_decoding_are_those_of_one_sequence_at_a_time(case: str) -> None:
    plain = built(case)
    layout, gap = packed_gap(built(case), plain)
    assert gap < 1e-4
    assert (layout in ("flat", "rows")) == (VARIANTS.get(case, (case,))[0] in PACKS and case not in APART)
    assert decoding_gap(built(case), plain) < (2e-3 if case in STEPS_DIFFER else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_models_that_look_ahead_are_refused_wherever_they_are_used(name: str) -> None:
    lm = tiny_lm(name)
    for use in (Policy, lambda lm: Prefixes.of(lm, [[5, 6]], 0)):
        with pytest.raises(ConfigError, match=r"^model\.path: \w+ looks ahead") as caught:
            use(lm)
        assert "\n" not in str(caught.value)


def test_every_architecture_is_tried_or_left_out_for_a_reason() -> None:
    tried = {case.values[0] for case in CASES}
    assert tried | set(LEFT_OUT) | ENCODERS == set(NAMES) | set(VARIANTS)
    assert set(LEFT_OUT) <= set(NAMES) and set(NAMES) >= ENCODERS
    assert tried >= PACKS, "what is said to pack is proven"
