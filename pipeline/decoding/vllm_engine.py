"""vLLM in place of our own sampling loop, for plain sampling and best-of-n on a GPU: the only importer of vLLM.

Same interface, same settings, same columns. Each completion is a request with a seed of its own, so that it does not depend on
its batch beyond rounding; but vLLM draws with other random numbers than `sampling`, so that the engine is part of what names an
output. Log-probabilities are the model's own, without temperature and filters.

Left out: models spread over several GPUs, and every decoder that looks at whole distributions or forks caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config import ConfigError, RunConfig
from pipeline.decoding.choice import stream_seed
from pipeline.decoding.contract import Completion, Prompt, Tools, check_lengths
from pipeline.pretrained import load_config, precision

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

METHODS = ("sampling", "best_of_n")
"""Decoders that only draw from the policy."""


def choose(config: RunConfig, local: bool, thoughts: int = 0) -> str:
    """The engine that decodes: `transformers` or `vllm`. Raises ConfigError where vLLM is asked for and cannot be had.

    thoughts: latent ones that the policy reads behind each prompt.
    """
    asked, reason = config.decoding.engine, unavailable(config, local, thoughts)
    if asked == "vllm" and reason is not None:
        raise ConfigError(f"decoding.engine: {reason}, or take transformers")
    return "transformers" if asked == "transformers" or reason is not None else "vllm"


def unavailable(config: RunConfig, local: bool, thoughts: int = 0) -> str | None:
    """Why vLLM cannot decode this, with what would help; None: it can."""
    if thoughts:
        return "vllm knows no latent thoughts; set sampling.n_latents=0"
    if config.decoding.method not in METHODS:
        return f"vllm cannot do {config.decoding.method}; it is for {' and '.join(METHODS)}"
    if config.scaling.gpus_per_worker == 0:
        return "vllm needs a GPU; set scaling.gpus_per_worker=1"
    if local and not torch.cuda.is_available():
        return "vllm needs a GPU, and CUDA finds none; leave out --local on a cluster that has some"
    if find_spec("vllm") is None:
        return "vllm is not installed; pip install 'qalign[vllm]'"
    return None


class VllmSampler:
    """The policy, loaded by vLLM; a `contract.Sampler`."""

    def __init__(self, path: str, config: RunConfig) -> None:
        from vllm import LLM

        options = config.model
        self._config = load_config(path, options.trust_remote_code)
        self._engine: LLM = LLM(
            model=path,
            tokenizer=path,
            dtype=str(precision(options.dtype)).removeprefix("torch."),
            trust_remote_code=options.trust_remote_code,
            gpu_memory_utilization=config.decoding.engine_memory,
            enable_prefix_caching=True,  # completions of one prompt share it
            logprobs_mode="raw_logprobs",
        )

    def __call__(self, tools: Tools, prompts: Sequence[Prompt], copies: int) -> dict[tuple[int, int], Completion]:
        """Completions 0 … copies − 1 of each prompt, by (place of the prompt, copy)."""
        check_lengths(self._config, prompts, tools.sampling.max_new_tokens)
        names = [(p, i) for p in range(len(prompts)) for i in range(copies)]
        asked = [{"prompt_token_ids": list(prompts[p].ids)} for p, _ in names]
        settings = [settings_of(tools, prompts[p], i) for p, i in names]
        found = self._engine.generate(asked, settings, use_tqdm=False)
        tools.told(len(names))
        return {name: completion_of(output) for name, output in zip(names, found, strict=True)}


def settings_of(tools: Tools, prompt: Prompt, copy: int) -> SamplingParams:
    """The settings of one completion, in vLLM's words."""
    from vllm import SamplingParams

    own = tools.sampling
    return SamplingParams(
        max_tokens=own.max_new_tokens,
        min_tokens=own.min_new_tokens,
        temperature=own.temperature,
        top_k=own.top_k or -1,
        top_p=own.top_p,
        min_p=tools.decoding.min_p,
        seed=stream_seed(own.seed, prompt.key, copy),
        stop_token_ids=list(tools.stop_ids),
        ignore_eos=True,  # the stop tokens are ours alone
        logprobs=0,  # of the token that was drawn
        detokenize=False,
    )


def completion_of(output: RequestOutput) -> Completion:
    """A finished request's only completion; the token that ended it is part of it, as everywhere here."""
    (made,) = output.outputs
    ids = list(made.token_ids)
    assert made.logprobs is not None and len(made.logprobs) == len(ids)
    return Completion(ids, [_own(drawn, token) for drawn, token in zip(made.logprobs, ids, strict=True)])


def _own(drawn: Mapping[int, Any], token: int) -> float:
    return float(drawn[token].logprob)
