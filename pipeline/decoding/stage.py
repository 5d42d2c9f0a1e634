"""Sample from many prompts: the model is loaded once per Ray Data actor, or once in this process.

Completion i of prompt p depends on the model, the prompt, the settings, its key and i, not on the number of actors or
the batch (see `sampling`). Left out: where prompts come from, what is done with the completions, and other decoders
(`pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch

from pipeline.config import DecodingConfig, ModelConfig, SamplingConfig
from pipeline.decoding.contract import Prompt, Tools
from pipeline.decoding.sampling import sample
from pipeline.pretrained import load_tokenizer, precision
from pipeline.stage import Item, Resources, run_stage
from pipeline.thinker import load_thinker


class Decoded(TypedDict):
    """One completion of one prompt."""

    prompt: int  # place in the caller's list
    index: int  # which of the prompt's completions, 0 … per_prompt − 1
    text: str  # without special tokens
    token_ids: list[int]  # [R], with the EOS that ended it, if one did
    logprobs: list[float]  # [R] nats, under the model itself


class DecodePrompts:
    """The actor: {"prompts": token ids of some prompts, "keys": one each} → {"completions": prompt-major list}."""

    def __init__(
        self, model: str, config: dict[str, Any], settings: dict[str, Any], stop_ids: list[int], gpu: bool
    ) -> None:
        options = ModelConfig.model_validate(config)
        self.tokenizer = load_tokenizer(model, options.trust_remote_code)
        sampling = SamplingConfig.model_validate(settings)
        loaded = load_thinker(model, precision(options.dtype), options, sampling)
        policy = loaded.to(torch.device("cuda" if gpu else "cpu"))
        self.tools = Tools(sampling, DecodingConfig(), stop_ids, pad_of(self.tokenizer), {"policy": policy})

    def __call__(self, item: Item) -> Item:
        named = zip(item["prompts"], item["keys"], strict=True)
        done = sample(self.tools, [Prompt(list(ids), int(key)) for ids, key in named])
        texts = self.tokenizer.batch_decode(
            [c.token_ids for c in done], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return {
            "completions": [
                {"text": text, "token_ids": c.token_ids, "logprobs": c.logprobs}
                for text, c in zip(texts, done, strict=True)
            ]
        }


def pad_of(tokenizer: Any) -> int:
    """Any token will do: it is masked wherever it stands."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def decode_prompts(
    model: str,
    prompts: Sequence[Sequence[int]],
    settings: SamplingConfig,
    *,
    config: ModelConfig,
    stop_ids: Sequence[int],
    resources: Resources,
    local: bool,
    keys: Sequence[int] | None = None,
    label: str = "decode",
) -> list[Decoded]:
    """`settings.per_prompt` completions of each prompt, sorted by (prompt, index).

    model: what `model_files.locate` gave. prompts: token ids (`Renderer.prompt_ids`); stop_ids: tokens that end a
    completion (`Renderer.stop_ids`). keys: names of the prompts' random streams, by default their places, so that two
    equal prompts get different completions. config: precision, attention and trust of `model`; its path is not read.
    """
    keys = range(len(prompts)) if keys is None else keys
    per_item = max(1, settings.batch_size // settings.per_prompt)
    order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))  # batches of like lengths, longest first
    pieces = [order[start : start + per_item] for start in range(0, len(order), per_item)]
    items = [{"prompts": [list(prompts[p]) for p in piece], "keys": [int(keys[p]) for p in piece]} for piece in pieces]
    arguments = {
        "model": model,
        "config": config.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "stop_ids": sorted(stop_ids),
        "gpu": resources.gpus > 0,
    }
    results = run_stage(DecodePrompts, arguments, items, label=label, resources=resources, local=local, unit="batch")
    found: dict[tuple[int, int], Decoded] = {}
    for piece, result in zip(pieces, results, strict=True):
        names = [(p, i) for p in piece for i in range(settings.per_prompt)]
        for (p, i), completion in zip(names, result["completions"], strict=True):
            found[p, i] = {
                "prompt": p,
                "index": i,
                "text": completion["text"],
                "token_ids": list(completion["token_ids"]),
                "logprobs": list(completion["logprobs"]),
            }
    return [found[name] for name in sorted(found)]
