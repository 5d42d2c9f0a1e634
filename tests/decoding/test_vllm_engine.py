"""vLLM: when it is chosen, what it is asked, and how its answers are read. The engine is a stand-in with vLLM's documented types
around a model of ours: the real one needs a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.config import DecodingConfig, SamplingConfig
from pipeline.decoding import best_of_n, sampling, vllm_engine
from pipeline.decoding.choice import stream_seed
from pipeline.decoding.contract import Prompt, Tools
from pipeline.decoding.rescoring import token_logprobs
from pipeline.decoding.vllm_engine import VllmSampler, choose
from pipeline.errors import UserError
from pipeline.pretrained import load_causal_lm

PROMPTS = [Prompt([10, 11, 12], 7), Prompt([20], 8)]
ENDS = list(range(2, 90))  # a third of the vocabulary: some responses end early


@dataclass
class SamplingParams:
    """Names and defaults of vLLM's."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class LLM:
    """Greedy, or by a plain softmax draw from `seed`, over the uncached model."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, model: str, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.network = load_causal_lm(model, getattr(torch, settings["dtype"])).eval()
        LLM.asked: list[SamplingParams] = []

    @torch.inference_mode()
    def generate(
        self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        LLM.asked += sampling_params
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: list[int], s: SamplingParams) -> RequestOutput:
        generator, ids, told = torch.Generator().manual_seed(s.seed), [], []
        while len(ids) < s.max_tokens and not (ids and ids[-1] in s.stop_token_ids):
            logprobs = self.network(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float().log_softmax(-1)
            if s.temperature:
                token = int(torch.multinomial((logprobs / s.temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logprobs.argmax())
            others = {int(logprobs.argmax()): Logprob(float(logprobs.max()), 1)}
            told.append(others | {token: Logprob(float(logprobs[token]))})
            ids.append(token)
        return RequestOutput(prompt, [CompletionOutput(0, "", tuple(ids), told if s.logprobs is not None else None)])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    known = vllm_engine.find_spec
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: object() if name == "vllm" else known(name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def tools(sampler: VllmSampler, **settings: Any) -> Tools:
    return Tools(SamplingConfig(max_new_tokens=6, **settings), DecodingConfig(n=4), ENDS, 0, {}, {}, sampler=sampler)


@pytest.mark.usefixtures("vllm")
def test_completions_are_those_of_our_own_loop_where_nothing_is_random(make_config, tiny_model: Path):
    """Greedy: the same tokens and log-probabilities, the token that ends a response included."""
    sampler = VllmSampler(str(tiny_model), make_config("model.dtype=float32"))
    model = load_causal_lm(str(tiny_model), torch.float32).eval()
    for ends in (ENDS, [2]):
        own = Tools(SamplingConfig(max_new_tokens=6, temperature=0.0), DecodingConfig(), ends, 0, {"policy": model})
        theirs = Tools(own.sampling, own.decoding, ends, 0, {}, sampler=sampler)
        found, expected = sampling.sample(theirs, PROMPTS), sampling.sample(own, PROMPTS)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.logprobs for c in found] == [pytest.approx(c.logprobs, abs=1e-5) for c in expected]


@pytest.mark.usefixtures("vllm")
def test_every_completion_has_a_request_with_our_settings_and_a_seed_of_its_own(make_config, tiny_model: Path):
    config = make_config("model.dtype=float32", "decoding.engine_memory=0.5")
    sampler = VllmSampler(str(tiny_model), config)
    assert sampler._engine.settings["gpu_memory_utilization"] == 0.5
    assert sampler._engine.settings["logprobs_mode"] == "raw_logprobs"
    given = tools(sampler, temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=2, seed=3, per_prompt=2)
    found = sampling.sample(given, PROMPTS)
    seeds = [stream_seed(3, key, copy) for key in (7, 8) for copy in range(2)]
    assert LLM.asked == [SamplingParams(1, 0.7, 0.9, 5, 0.0, seed, ENDS, True, 6, 2, 0, False) for seed in seeds]
    responses = [c.token_ids for c in found]
    exact = token_logprobs(sampler._engine.network, [p for p in PROMPTS for _ in range(2)], responses, 0)
    assert [c.logprobs for c in found] == [pytest.approx(e, abs=1e-5) for e in exact], "without the temperature"
    alone = sampling.sample(given, PROMPTS[1:])
    assert found[2:] == alone, "a completion does not depend on its batch"
    assert len({tuple(c.token_ids) for c in found}) > 1
    LLM.asked.clear()
    sampling.sample(tools(sampler), PROMPTS[:1])
    assert LLM.asked[0].top_k == -1, "off"


@pytest.mark.usefixtures("vllm")
def test_best_of_n_chooses_among_its_draws(make_config, tiny_model: Path):
    sampler = VllmSampler(str(tiny_model), make_config("model.dtype=float32"))
    score = {"scorer": lambda prompts, responses: torch.tensor([float(sum(r)) for r in responses])}
    own = tools(sampler)
    scored = Tools(own.sampling, own.decoding, ENDS, 0, {}, score, sampler=sampler)
    drawn = sampling.draw(own, PROMPTS, 4)
    for p, best in enumerate(best_of_n.best_of_n(scored, PROMPTS)):
        assert best.score == max(sum(drawn[p, i].token_ids) for i in range(4))


@pytest.mark.usefixtures("vllm", "cuda")
def test_auto_takes_vllm_only_where_everything_is_there(make_config, monkeypatch: pytest.MonkeyPatch):
    gpu = "scaling.gpus_per_worker=1"
    assert choose(make_config("decoding.engine=auto", gpu), local=True) == "vllm"
    assert choose(make_config("decoding.engine=auto", gpu, "decoding.method=best_of_n"), local=True) == "vllm"
    assert choose(make_config("decoding.engine=auto", gpu, "decoding.method=beam"), local=True) == "transformers"
    assert choose(make_config("decoding.engine=auto"), local=True) == "transformers"
    assert choose(make_config(gpu), local=True) == "transformers", "the default"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(make_config("decoding.engine=auto", gpu), local=True) == "transformers"
    assert choose(make_config("decoding.engine=auto", gpu), local=False) == "vllm", "the workers have the GPUs"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["decoding.method=transfer_q"],
            "vllm cannot do transfer_q; it is for sampling and best_of_n, or take transformers",
        ),
        ([], "vllm needs a GPU; set scaling.gpus_per_worker=1, or take transformers"),
        (["scaling.gpus_per_worker=1"], "vllm is not installed; pip install 'qalign[vllm]', or take transformers"),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_what_is_missing_is_one_line(make_config, settings: list[str], message: str):
    with pytest.raises(UserError) as caught:
        choose(make_config("decoding.engine=vllm", *settings), local=True)
    assert str(caught.value) == f"decoding.engine: {message}"


def test_no_cuda_is_one_line(make_config):
    with pytest.raises(UserError, match=r"^decoding\.engine: vllm needs a GPU, and CUDA finds none; leave out --local"):
        choose(make_config("decoding.engine=vllm", "scaling.gpus_per_worker=1"), local=True)
