"""Models that think: their folder on disk, and decoding with any number of thoughts, none, and sampled ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ConfigError, DecodingConfig, LatentConfig, ModelConfig, SamplingConfig
from pipeline.decoding.contract import Completion, Prompt, Tools, context_of
from pipeline.decoding.rescoring import token_logprobs
from pipeline.decoding.sampling import sample
from pipeline.decoding.vote import vote
from pipeline.evaluation.divergence import sequence_kl
from pipeline.latent import Text
from pipeline.model_files import fingerprint
from pipeline.pretrained import load_causal_lm
from pipeline.thinker import (
    ASSISTANT,
    PRIOR,
    NewPrior,
    Thinker,
    check_thoughts,
    has_prior,
    identity,
    load_prior,
    load_thinker,
    prior_for,
    save_prior,
    start_prior,
    thoughts_of,
)
from tests.conftest import save_tiny_llama

MODEL = ModelConfig(path="unused", dtype="float32")
PROMPTS = [Prompt([40, 41, 42, 43], 0), Prompt([50], 1), Prompt([60, 61, 62, 63, 64, 65], 2)]


def backbone(path: Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_causal_lm(str(path), dtype)


@pytest.fixture(scope="module")
def thoughtful(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a prior of four loud thoughts, in one folder."""
    folder = tmp_path_factory.mktemp("thoughtful") / "model"
    shutil.copytree(tiny_model, folder)
    lm = backbone(folder)
    prior = start_prior(lm, MODEL, NewPrior(LatentConfig(n_latents=4), seed=1))
    prior.size *= 8
    save_prior(prior, lm, folder)
    return folder


def thinker(path: Path, **sampling) -> nn.Module:
    return load_thinker(str(path), torch.float32, MODEL, SamplingConfig(**sampling))


def decode(model: nn.Module, prompts=PROMPTS, method=sample, answer=None, n: int = 3, **sampling) -> list[Completion]:
    settings = SamplingConfig(**({"max_new_tokens": 8, "temperature": 0.0} | sampling))
    return method(Tools(settings, DecodingConfig(n=n), [2], 0, {"policy": model}, answer=answer), prompts)


# ------------------------------------------------------------------------------------------------- on disk


def test_a_prior_comes_back_with_its_backbone(thoughtful: Path) -> None:
    lm = backbone(thoughtful)
    one, two = (load_prior(lm, thoughtful, "sdpa", False) for _ in range(2))
    assert {name for name, _ in one.named_parameters()} == {name for name, _ in two.named_parameters()}
    assert (one.n_latents, one.size, one.up.out_features) == (4, two.size, 64)
    prompt = Text(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    embed = lm.get_input_embeddings()
    assert torch.equal(one(embed, prompt, 4).thoughts, two(embed, prompt, 4).thoughts)
    fresh = start_prior(lm, MODEL, NewPrior(LatentConfig(n_latents=4), seed=1))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), fresh.parameters(), strict=True))


def test_an_assistant_lies_in_the_same_folder(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    lm, helper = backbone(tmp_path / "model"), save_tiny_llama(tmp_path / "helper", seed=5, hidden_size=16)
    prior = start_prior(lm, MODEL, NewPrior(LatentConfig(n_latents=2), str(helper)))
    save_prior(prior, lm, tmp_path / "model")
    shutil.rmtree(helper)
    assert (tmp_path / "model" / PRIOR / ASSISTANT / "config.json").is_file()
    back = load_prior(lm, tmp_path / "model", "sdpa", False)
    prompt = Text(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool))
    made = [p(lm.get_input_embeddings(), prompt, 2).thoughts for p in (prior, back)]
    assert torch.equal(*made)
    more = back(lm.get_input_embeddings(), prompt, 5).thoughts
    torch.testing.assert_close(more[:, :2], made[0])  # an assistant has as many placeholders as tokens


def test_identity_is_the_weights_whatever_their_precision(tiny_model: Path, tmp_path: Path) -> None:
    lm = backbone(tiny_model)
    assert identity(lm) == identity(backbone(tiny_model, torch.bfloat16)) == identity(lm.to(torch.bfloat16))
    assert identity(lm) != identity(backbone(save_tiny_llama(tmp_path / "other", seed=4)))
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert identity(lm) != identity(backbone(tiny_model))


def test_a_prior_of_another_backbone_is_refused_in_one_line(thoughtful: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=4)
    shutil.copytree(thoughtful / PRIOR, other / PRIOR)
    with pytest.raises(
        ConfigError, match=r"^checkpoint_from: the prior in .* was trained for another backbone"
    ) as error:
        load_thinker(str(other), torch.float32, MODEL, SamplingConfig(), "checkpoint_from")
    assert "\n" not in str(error.value)


def test_training_goes_on_from_a_prior_of_the_same_kind_only(thoughtful: Path) -> None:
    lm = backbone(thoughtful)
    kept = prior_for(lm, str(thoughtful), MODEL, NewPrior(LatentConfig(n_latents=4), seed=9))
    assert torch.equal(kept.queries.weight, load_prior(lm, thoughtful, "sdpa", False).queries.weight)
    assert prior_for(lm, str(thoughtful), MODEL, None) is not None, "whatever the objective, it is part of the model"
    with pytest.raises(ConfigError, match=r"^latent\.n_latents: the prior in .* has 4 thoughts, not 5; set it to 4$"):
        prior_for(lm, str(thoughtful), MODEL, NewPrior(LatentConfig(n_latents=5)))
    with pytest.raises(ConfigError, match=r"^latent\.assistant: training goes on from the prior"):
        prior_for(lm, str(thoughtful), MODEL, NewPrior(LatentConfig(n_latents=4), "some/model"))


def test_a_prior_changes_the_models_fingerprint(tiny_model: Path, thoughtful: Path, tmp_path: Path) -> None:
    """Caches of samples are named by it, and a frozen backbone's own files are the same before and after."""
    before, after = fingerprint(str(tiny_model), tmp_path), fingerprint(str(thoughtful), tmp_path)
    assert before != after
    copy = tmp_path / "copy"
    shutil.copytree(thoughtful, copy)
    assert fingerprint(str(copy), tmp_path) == after
    settings = copy / PRIOR / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": 1.0}))
    assert fingerprint(str(copy), tmp_path) != after


# ------------------------------------------------------------------------------------------------ decoding


def by_hand(lm: nn.Module, thoughts: Tensor, prompt: Prompt, new: int) -> tuple[list[int], list[float]]:
    """Greedy decoding without a cache, one row, [prompt | thoughts | tokens so far] as embeddings."""
    embed, ids, logprobs = lm.get_input_embeddings(), [], []
    for _ in range(new):
        parts = [embed(torch.tensor([list(prompt.ids)])), thoughts[None], embed(torch.tensor([ids], dtype=torch.long))]
        logp = lm(inputs_embeds=torch.cat(parts, 1)).logits[0, -1].log_softmax(-1)
        ids.append(int(logp.argmax()))
        logprobs.append(float(logp.max()))
        if ids[-1] == 2:
            break
    return ids, logprobs


@torch.no_grad()
def test_decoding_with_thoughts_equals_rows_by_hand(thoughtful: Path) -> None:
    """Batched, left-padded, from a cache; with as many thoughts as in training and with fewer."""
    lm = backbone(thoughtful)
    prior = load_prior(lm, thoughtful, "sdpa", False)
    texts = {}
    for n in (None, 4, 2, 1):
        model, count = thinker(thoughtful, n_latents=n), n or 4
        assert context_of(model.config, thoughts_of(str(thoughtful), SamplingConfig(n_latents=n))) == 512 - count
        texts[n] = decode(model)
        for prompt, found in zip(PROMPTS, texts[n], strict=True):
            ids = torch.tensor([list(prompt.ids)])
            thoughts = prior(lm.get_input_embeddings(), Text(ids, torch.ones_like(ids).bool()), count).thoughts[0]
            expected = by_hand(lm, thoughts, prompt, 8)
            assert found.token_ids == expected[0]
            assert found.logprobs == pytest.approx(expected[1], abs=1e-4)
    assert [c.token_ids for c in texts[None]] == [c.token_ids for c in texts[4]]
    assert [c.logprobs for c in texts[4]] != [c.logprobs for c in texts[1]], "the number makes a difference"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_thoughts_are_plain_decoding_to_the_bit(thoughtful: Path, tiny_model: Path, temperature: float) -> None:
    model = thinker(thoughtful, n_latents=0)
    assert not isinstance(model, Thinker)
    plain, found = (decode(m, temperature=temperature, per_prompt=2) for m in (backbone(tiny_model), model))
    assert found == plain
    assert decode(thinker(thoughtful), temperature=temperature, per_prompt=2) != plain


@torch.no_grad()
def test_other_forwards_agree_with_decoding(thoughtful: Path, tiny_model: Path) -> None:
    """Rescoring, and the KL to a reference without thoughts: on its sampled side Σ log π − log π_ref."""
    model, reference = thinker(thoughtful), backbone(tiny_model)
    found = decode(model, temperature=1.0, per_prompt=2)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    responses = [c.token_ids for c in found]
    for own, again in zip(found, token_logprobs(model, prompts, responses, 0), strict=True):
        assert again == pytest.approx(own.logprobs, abs=1e-4)
    theirs = token_logprobs(reference, prompts, responses, 0)
    kl = sequence_kl(model, reference, [p.ids for p in prompts], responses, 64)
    expected = [sum(own.logprobs) - sum(other) for own, other in zip(found, theirs, strict=True)]
    assert kl.sampled.tolist() == pytest.approx(expected, abs=1e-3)
    assert (kl.exact > 0).all() and sequence_kl(
        model, model, [p.ids for p in prompts], responses, 64
    ).exact.abs().max() < 1e-6


def test_sampled_thoughts_belong_to_their_completion(thoughtful: Path) -> None:
    """Each one has its own; who shares its batch changes nothing; greedy tokens then differ by the thoughts alone."""
    model = thinker(thoughtful, thought_noise=2.0)
    found = decode(model, per_prompt=4)
    assert len({tuple(c.logprobs) for c in found[:4]}) == 4
    small = decode(model, per_prompt=4, batch_size=3)
    alone = decode(model, PROMPTS[1:2], per_prompt=4)
    for one, other in zip([*found, *found[4:8]], [*small, *alone], strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    quiet = decode(thinker(thoughtful), per_prompt=4)
    assert len({tuple(c.logprobs) for c in quiet[:4]}) == 1


def test_more_thoughts_than_there_are_and_thoughts_of_models_without_are_refused(thoughtful: Path, tiny_model) -> None:
    with pytest.raises(ConfigError, match=r"^sampling\.n_latents: the prior in .* has 4 thoughts, not 5; lower it$"):
        thinker(thoughtful, n_latents=5)
    for key in ({"n_latents": 2}, {"thought_noise": 0.5}):
        check_thoughts(SamplingConfig(**key), [str(tiny_model), str(thoughtful)])
        with pytest.raises(ConfigError, match=rf"^sampling\.{next(iter(key))}: .* no prior of latent thoughts; remove"):
            check_thoughts(SamplingConfig(**key), [str(tiny_model)])
    check_thoughts(SamplingConfig(n_latents=0), [str(tiny_model)])
    assert has_prior(thoughtful) and not has_prior(tiny_model)


# --------------------------------------------------------------------------------------------------- vote


def test_a_vote_elects_the_first_of_the_commonest_answer(tiny_model: Path) -> None:
    """Answers are read off the samples' number: 7, none, 3.0 and 3 are three votes and two parties."""
    model, asked = backbone(tiny_model), iter(["7", None, "3.0", "3", None, "5", "7", "7"])
    samples = decode(model, PROMPTS[:2], temperature=1.0, per_prompt=4)
    found = decode(model, PROMPTS[:2], method=vote, answer=lambda ids: next(asked), n=4, temperature=1.0)
    assert [c.token_ids for c in found] == [samples[2].token_ids, samples[6].token_ids]
    assert [c.score for c in found] == [0.5, 0.5]
    assert dict(found[0].details) == {"n": 4.0, "votes": 2.0, "answers": 2.0}
    (none,) = decode(model, PROMPTS[:1], method=vote, answer=lambda ids: None, n=4)
    assert none.failure == "none of 4 samples has an answer (evaluation.answer_pattern)"
