"""The decoding stage: in process and on Ray actors, with equal results in the caller's order."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import DecodingConfig, ModelConfig, SamplingConfig
from pipeline.decoding.contract import Prompt, Tools
from pipeline.decoding.sampling import sample
from pipeline.decoding.stage import Decoded, decode_prompts
from pipeline.pretrained import load_causal_lm, load_tokenizer, precision
from pipeline.stage import Resources

PROMPTS = [[10, 11], [12, 13, 14, 15], [16], [10, 11], [17, 18, 19], [20, 21], [22]]
STOP = frozenset({2, *range(100, 130)})


def run(folder: Path, local: bool, prompts: list[list[int]] = PROMPTS, **changes) -> list[Decoded]:
    settings = SamplingConfig(**({"max_new_tokens": 12, "per_prompt": 2, "batch_size": 4, "seed": 3} | changes))
    config = ModelConfig(path="not read", dtype="float32")
    resources = Resources(cpus=1, actors=2)
    return decode_prompts(
        str(folder), prompts, settings, config=config, stop_ids=STOP, resources=resources, local=local
    )


def test_results_are_the_decoders_own_in_the_callers_order(tiny_model):
    found = run(tiny_model, local=True)
    assert [(d["prompt"], d["index"]) for d in found] == [(p, i) for p in range(7) for i in range(2)]
    model = load_causal_lm(str(tiny_model), precision("float32"))
    settings = SamplingConfig(max_new_tokens=12, per_prompt=2, seed=3)
    tools = Tools(settings, DecodingConfig(), sorted(STOP), 0, {"policy": model})
    direct = sample(tools, [Prompt(ids, key) for key, ids in enumerate(PROMPTS)])
    assert [d["token_ids"] for d in found] == [c.token_ids for c in direct]
    assert [d["logprobs"] for d in found] == [pytest.approx(c.logprobs, abs=1e-5) for c in direct]
    tokenizer = load_tokenizer(str(tiny_model))
    assert [d["text"] for d in found] == [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in direct]


def test_equal_prompts_get_completions_of_their_own(tiny_model):
    found = run(tiny_model, local=True)
    assert len({tuple(found[i]["token_ids"]) for i in (0, 1, 6, 7)}) == 4


def test_more_completions_than_a_batch_holds(tiny_model):
    small = run(tiny_model, True, per_prompt=5, batch_size=2)
    large = run(tiny_model, True, per_prompt=5, batch_size=64)
    assert [d["token_ids"] for d in small] == [d["token_ids"] for d in large]


def test_no_prompts_need_no_model(tmp_path):
    assert run(tmp_path / "nothing", True, prompts=[]) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_actors_give_what_this_process_gives(tiny_model):
    found = run(tiny_model, local=False)
    expected = run(tiny_model, local=True)
    assert [d["token_ids"] for d in found] == [d["token_ids"] for d in expected]
    assert [(d["prompt"], d["index"], d["text"]) for d in found] == [
        (d["prompt"], d["index"], d["text"]) for d in expected
    ]
    assert [d["logprobs"] for d in found] == [pytest.approx(d["logprobs"], abs=1e-5) for d in expected]
