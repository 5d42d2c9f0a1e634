"""Latent thoughts in the packed forward: where they stand, what they see, and that values and gradients are those of plain rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline import packing, trunk
from pipeline.collate import collate
from pipeline.config import ConfigError, LatentConfig, LoraSection, ModelConfig
from pipeline.contracts import Batch, Needs, Row
from pipeline.latent import (
    PLACE,
    AssistantPrior,
    BlockPrior,
    Prior,
    Steps,
    embeddings,
    insert,
    mean_texts,
    read,
    step_tokens,
)
from pipeline.model import Policy, load_policy
from pipeline.thinker import NewPrior, start_prior
from tests.test_model import build

ROWS = [
    Row(0, [5, 6, 7, 8, 9], [[20, 21, 22, 23, 24, 25], [30, 31]], step_ends=[[0, 2, 5], [1]]),
    Row(1, [40], [[41, 42, 43]], step_ends=[[1, 2]]),
    Row(2, [50, 51], [[61], [62, 63]], step_ends=[[0], [1]], trained=[[True], [True, True]]),
]
WIDTH, N = 32, 3
NEEDS = Needs(records=frozenset({"trajectory"}), latent="steps")


def block(seed: int = 0, positions: bool = False, n: int = N) -> BlockPrior:
    torch.manual_seed(seed)
    return BlockPrior(WIDTH, 48, n, 0.05, positions)


def assisted(seed: int = 0) -> AssistantPrior:
    torch.manual_seed(seed)
    return AssistantPrior(build("llama"), WIDTH, N, 0.05)


def thinking(lm: nn.Module, prior: Prior) -> Policy:
    return Policy(lm, prior=prior, read_steps=True)


def separately(lm: nn.Module, thoughts: Tensor, row: Row, k: int) -> Tensor:
    """Log-probs of one response by the model's own forward on [prompt | thoughts | response], as embeddings."""
    embed = lm.get_input_embeddings()
    prompt, response = (embed(torch.tensor([ids])) for ids in (row.prompt_ids, row.response_ids[k]))
    whole = torch.cat([prompt, thoughts[None].to(prompt.dtype), response], 1)
    start = len(row.prompt_ids) + len(thoughts) - 1
    logprobs = lm(inputs_embeds=whole).logits[0, start:-1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(row.response_ids[k])[:, None])[:, 0]


def thoughts_of(prior: Prior, lm: nn.Module, prompt: list[int], n: int = N) -> Tensor:
    """Of one prompt alone, without padding. [n, D]"""
    return read(prior, lm.get_input_embeddings(), collate([Row(0, prompt, [[1]])]), n, steps=False).thoughts[0]


# ---------------------------------------------------------------------------------------------- in the row


def test_places_stand_between_prompt_and_responses() -> None:
    batch = insert(collate([Row(0, [1, 2], [[3, 4, 5], [6]]), Row(1, [7], [[8]])]), 2)
    P = PLACE
    assert batch.input_ids.tolist() == [[1, 2, P, P, 3, 4, 5, 6], [7, P, P, 8, 0, 0, 0, 0]]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 1, -1, -1, -1, -1]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 4]
    assert batch.position_ids.tolist()[1][:4] == [0, 1, 2, 3]
    assert batch.predictor[0].tolist() == [[3, 4, 5], [3, 0, 0]]
    assert batch.predictor[1, 0, 0] == 2
    same = collate(ROWS)
    assert torch.equal(insert(same, 0).predictor, same.predictor) and torch.equal(insert(same, 0).segment, same.segment)


@pytest.mark.parametrize("prior", [block, assisted])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa"), ("gpt2", "sdpa")]
)
def test_packed_rows_with_thoughts_equal_plain_ones(name: str, attention: str, prior) -> None:
    lm, maker = build(name, attention=attention), prior()
    policy, batch = thinking(lm, maker), collate(ROWS)
    assert policy.layout == ("flat" if attention == "sdpa" else "rows")
    out = policy(batch)
    torch.manual_seed(5)
    weights, total = torch.randn(out.logprobs.shape), torch.zeros(())
    for b, row in enumerate(ROWS):
        thoughts = thoughts_of(maker, lm, row.prompt_ids)
        torch.testing.assert_close(out.thoughts[b], thoughts.float(), atol=1e-5, rtol=1e-4)
        for k, response in enumerate(row.response_ids):
            expected = separately(lm, thoughts, row, k)
            torch.testing.assert_close(out.logprobs[b, k, : len(response)], expected, atol=5e-5, rtol=1e-4)
            total = total + (expected * weights[b, k, : len(response)]).sum()
    leaves = [p for p in policy.parameters() if p.requires_grad]
    packed = torch.autograd.grad((out.logprobs * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    plain = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    for one, two in zip(packed, plain, strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=2e-3)
    prior_grads = torch.autograd.grad((policy(batch).logprobs * weights).sum(), list(maker.parameters()))
    assert all(grad.abs().max() > 0 for grad in prior_grads), "every parameter of the prior makes a difference"


def test_separate_rows_read_the_same_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, maker = build("llama"), block()
    packed = thinking(lm, maker)(collate(ROWS)).logprobs
    monkeypatch.setattr(packing, "_candidates", lambda lm: [])
    policy = thinking(lm, maker)
    assert policy.layout == "separate"
    torch.testing.assert_close(policy(collate(ROWS)).logprobs, packed, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prior", [block, assisted])
def test_gradients_of_a_prior_against_finite_differences(prior) -> None:
    lm = build("gpt2").double().requires_grad_(False)  # a Llama's norms compute in float32
    maker = prior().double()
    policy = thinking(lm, maker)
    batch = collate(ROWS[:2])

    def loss() -> Tensor:
        embed = lm.get_input_embeddings()
        reading = read(maker, embed, batch, N, steps=True)
        rows = insert(batch, N)
        states = trunk.token_states(lm, rows, policy.layout, embeddings(embed, rows.input_ids, reading.thoughts))
        assert reading.steps is not None
        return states.square().sum() + 3 * reading.question.sum() + (reading.steps**3).sum() * 1e3

    for name, p in maker.named_parameters():
        (grad,) = torch.autograd.grad(loss(), p)
        torch.manual_seed(len(name))
        direction = torch.randn_like(p)
        with torch.no_grad():
            p.add_(1e-5 * direction)
            up = loss()
            p.add_(-2e-5 * direction)
            down = loss()
            p.add_(1e-5 * direction)
        assert ((up - down) / 2e-5).item() == pytest.approx((grad * direction).sum().item(), rel=1e-4, abs=1e-6), name


# ----------------------------------------------------------------------------------------- what thoughts see


@pytest.mark.parametrize("prior", [block, assisted])
def test_the_solution_never_reaches_the_thoughts(prior) -> None:
    """In value and in gradient: other steps, other rewards, no steps at all."""
    lm, maker = build("llama"), prior()
    policy = thinking(lm, maker)
    other = [replace(row, response_ids=[[90 - i for i in ids] for ids in row.response_ids]) for row in ROWS]
    first, second = policy(collate(ROWS)), policy(collate(other))
    assert torch.equal(first.thoughts, second.thoughts) and torch.equal(first.question, second.question)
    assert (first.steps - second.steps).abs().max() > 1e-4
    seen = {}

    def embed(ids: Tensor) -> Tensor:
        seen[ids.shape] = lm.get_input_embeddings()(ids).detach().requires_grad_()
        return seen[ids.shape]

    batch = collate(ROWS)
    reading = read(maker, embed, batch, N, steps=True)
    for shape, leaf in seen.items():
        (grad,) = torch.autograd.grad(
            reading.thoughts.sum() + reading.question.sum(), leaf, allow_unused=True, retain_graph=True
        )
        assert shape == batch.response_ids[:, 0].shape or grad.any()
        assert shape != batch.response_ids[:, 0].shape or grad is None or not grad.any()


@pytest.mark.parametrize("prior", [block, assisted])
def test_fewer_thoughts_are_the_first_ones(prior) -> None:
    lm, maker = build("llama"), prior()
    whole = thoughts_of(maker, lm, [5, 6, 7])
    for n in (1, 2):
        torch.testing.assert_close(thoughts_of(maker, lm, [5, 6, 7], n), whole[:n])
    assert (whole[0] - whole[1]).abs().max() > 1e-3, "they differ"


def test_a_step_sees_the_prompt_and_itself() -> None:
    """Tokens 0 | 1 2 | 3 4 5: token 1 is of the second step, token 4 of the third, a token of the prompt is of all."""
    lm, maker = build("llama"), block()

    def steps(prompt: list[int], response: list[int]) -> Tensor:
        batch = collate([replace(ROWS[0], prompt_ids=prompt, response_ids=[response, [1]])])
        return read(maker, lm.get_input_embeddings(), batch, N, steps=True).steps[0]

    prompt, response = ROWS[0].prompt_ids, ROWS[0].response_ids[0]
    base = steps(prompt, response)
    for place, moved in ((0, [0]), (1, [1]), (4, [2])):
        changed = [*response]
        changed[place] = 77
        assert ((steps(prompt, changed) - base).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == moved
    assert ((steps([*prompt[:-1], 77], response) - base).abs().amax(-1) > 1e-6).all()


def test_without_positions_a_prompt_is_a_bag_of_tokens() -> None:
    lm = build("llama")
    for positions in (False, True):
        one, other = (thoughts_of(block(positions=positions), lm, prompt) for prompt in ([5, 6, 7, 8], [6, 7, 5, 8]))
        assert torch.allclose(one, other, atol=1e-6) == (not positions)


def test_steps_of_a_response_and_their_mean_embeddings() -> None:
    embed = nn.Embedding(100, 4)
    batch = collate(ROWS)
    steps = Steps(batch.response_ids[:, 0], batch.step_ends[:, 0])
    own = step_tokens(steps).int().tolist()
    assert own[0] == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert own[2] == [[1, 0, 0, 0, 0, 0], [0] * 6, [0] * 6]
    means = mean_texts(embed, steps)
    torch.testing.assert_close(means[0, 1], embed.weight[[21, 22]].mean(0).detach())
    assert not means.requires_grad and (means[2, 1:] == 0).all()


def test_thoughts_start_at_the_embeddings_size_and_differ() -> None:
    lm = build("llama")
    size = lm.get_input_embeddings().weight.square().mean().sqrt().item()
    prior = start_prior(lm, ModelConfig(path="unused"), NewPrior(LatentConfig(), seed=3))
    thoughts = thoughts_of(prior, lm, [5, 6, 7], 4)
    assert 0.5 < thoughts.square().mean().sqrt().item() / size < 2
    again = start_prior(lm, ModelConfig(path="unused"), NewPrior(LatentConfig(), seed=3))
    assert torch.equal(thoughts, thoughts_of(again, lm, [5, 6, 7], 4))


# ------------------------------------------------------------------------------------------- what is trained


def outputs(path: Path, batch: Batch, **changes) -> Policy:
    latent = LatentConfig(n_latents=2, **{k: v for k, v in changes.items() if k == "backbone"})
    model = ModelConfig(path=str(path), dtype="float32", lora=changes.get("lora"))
    return load_policy(model, str(path), NEEDS, new=NewPrior(latent, changes.get("assistant")))


def trained(policy: Policy) -> set[str]:
    policy(collate(ROWS)).logprobs.sum().backward()
    named = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert named == {name for name, p in policy.named_parameters() if p.grad is not None}
    return named


def test_who_learns(tiny_model: Path) -> None:
    """The prior always; adapters with LoRA; the backbone only when asked; an assistant never."""
    batch = collate(ROWS)
    alone = trained(outputs(tiny_model, batch))
    assert alone and all(name.startswith("prior.") for name in alone)
    lora = trained(outputs(tiny_model, batch, lora=LoraSection(r=2)))
    assert {name.partition(".")[0] for name in lora} == {"prior", "lm"}
    assert all("lora_" in name for name in lora if name.startswith("lm."))
    assert any(name.startswith("lm.model.layers") for name in trained(outputs(tiny_model, batch, backbone="trained")))
    assistant = outputs(tiny_model, batch, assistant=str(tiny_model))
    assert trained(assistant) == {"prior.project.weight", "prior.project.bias"}
    assert {name for name, _ in assistant.named_parameters() if name.startswith("prior.")} == trained(assistant)
    assert assistant.to(torch.bfloat16).prior.assistant.dtype == torch.bfloat16, "it goes where the prior goes"


def test_a_backbone_that_reads_no_embeddings_is_refused_in_one_line() -> None:
    lm = build("llama")
    inner = lm.model.forward

    def tokens_only(input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        if input_ids is None:
            raise ValueError("give input_ids")
        return inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    lm.model.forward = tokens_only
    with pytest.raises(ConfigError, match=r"^model\.path: LlamaForCausalLM reads no embeddings.*use another model$"):
        start_prior(lm, ModelConfig(path="unused"), NewPrior(LatentConfig()))
    lm.model.forward = lambda input_ids=None, inputs_embeds=None, **others: inner(
        **({"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds * 2}), **others
    )
    with pytest.raises(ConfigError, match="they change what it computes"):
        start_prior(lm, ModelConfig(path="unused"), NewPrior(LatentConfig()))


def test_activation_checkpointing_changes_no_gradient_of_the_prior(tiny_model: Path) -> None:
    grads = []
    for recompute in (False, True):
        policy = outputs(tiny_model, collate(ROWS)).train()
        if recompute:
            policy.enable_activation_checkpointing()
        policy(collate(ROWS)).logprobs.sum().backward()
        grads.append([p.grad for p in policy.prior.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
