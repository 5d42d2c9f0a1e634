"""An export is the model that was trained, wherever it is loaded: weights, ends of responses, chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline import checkpoint, export_check, model
from pipeline.collate import collate
from pipeline.config import ConfigError, RunConfig
from pipeline.contracts import Row
from pipeline.export import export
from pipeline.export_check import ExportError
from pipeline.generation import own_stop_ids
from pipeline.learner import load_networks
from pipeline.model import Policy
from pipeline.pretrained import load_tokenizer
from pipeline.records import Message
from pipeline.rendering import Renderer
from pipeline.reward import load_reward_network
from tests.conftest import CHATML, save_tiny_llama, tiny_tokenizer

ROWS = [Row(0, [5, 6, 7, 8], [[20, 21, 22], [30, 31]]), Row(1, [40], [[41, 42, 43], [44]])]


def trained(config: RunConfig, folder: Path, seed: int = 3) -> torch.nn.Module:
    """A network far from where it started, and its checkpoint in `folder`."""
    network, critic = load_networks(config, config.model.path, None)
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    for prefix, module in (("", network), ("critic-", critic)):
        if module is None:
            continue
        moved = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in moved.values():
                p.add_(0.1 * torch.randn_like(p))
        kept = {name: p.detach().float().clone() for name, p in moved.items()}
        checkpoint.write_tensors(folder / f"{prefix}weights-00001-of-00001.safetensors", kept)
    checkpoint.finish(folder, {"step": 1, "best": None})
    return network.eval()


@torch.no_grad()
def logprobs_of(folder: Path) -> torch.Tensor:
    """Of all responses of `ROWS`, by plain transformers. [n]"""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for row in ROWS:
        for response in row.response_ids:
            logits = lm(input_ids=torch.tensor([row.prompt_ids + response])).logits[0, len(row.prompt_ids) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def save_tied_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        ("llama", "[q_proj,lm_head]"),
        ("llama", "[embed_tokens]"),
        ("llama", "[embed_tokens,lm_head,v_proj]"),
        ("llama", "all-linear"),
        ("gpt2", "[lm_head,c_attn]"),
        ("gpt2", "[wte]"),
    ],
)
def test_adapters_on_tied_weights_are_exported_as_trained(make_config, tmp_path: Path, make: str, targets: str) -> None:
    base = tmp_path / "base"
    save_tied_gpt2(base) if make == "gpt2" else save_tiny_llama(base, tie_word_embeddings=True)
    config = make_config(f"model.path={base}", f"model.lora={{r: 4, target_modules: {targets}}}")
    network = trained(config, tmp_path / "step-00000001")
    batch = collate(ROWS)
    expected = network(batch).logprobs[batch.response_mask].detach()
    target = export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")
    assert (expected - logprobs_of(base)).abs().max() > 0.1
    torch.testing.assert_close(logprobs_of(target), expected, atol=1e-4, rtol=1e-4)
    lm = AutoModelForCausalLM.from_pretrained(target)
    tied = lm.get_input_embeddings().weight.data_ptr() == lm.get_output_embeddings().weight.data_ptr()
    assert tied == lm.config.tie_word_embeddings == (targets == "all-linear"), "peft's all-linear leaves the head out"


def test_adapters_on_a_tied_reward_models_embeddings_are_exported_without_a_warning(
    make_config, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    lora = "model.lora={r: 4, target_modules: [embed_tokens]}"
    config = make_config(f"model.path={base}", lora, "objective={name: reward_model}")
    network, batch = trained(config, tmp_path / "step-00000001"), collate(ROWS)
    target = export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")
    exported = load_reward_network(make_config().model, str(target)).eval()
    torch.testing.assert_close(exported(batch).scores, network(batch).scores, atol=1e-4, rtol=1e-4)
    assert [str(warning.message) for warning in recwarn if "tie_word_embeddings" in str(warning.message)] == []


def test_a_tied_head_with_an_adapter_has_the_base_model_as_its_reference(tmp_path: Path) -> None:
    from pipeline.config import LoraSection
    from pipeline.pretrained import load_causal_lm

    base = str(save_tiny_llama(tmp_path, tie_word_embeddings=True))
    lora = LoraSection(r=4, alpha=8, target_modules=("lm_head", "embed_tokens"))
    policy, batch = Policy(load_causal_lm(base, torch.float32), lora, kl="forward"), collate(ROWS)
    before = policy(batch)
    assert before.kl.abs().max() < 1e-6
    torch.testing.assert_close(before.logprobs[batch.response_mask], logprobs_of(tmp_path), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
        out = policy(batch)
        frozen = Policy(load_causal_lm(base, torch.float32))
        beside = Policy(policy.merged(), kl="forward", frozen=frozen.lm)(batch)
    assert out.kl.max() > 0.05
    torch.testing.assert_close(out.kl, beside.kl, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["head", "separate"])
def test_a_critic_is_exported_as_trained(make_config, tmp_path: Path, dtype: str, architecture: str) -> None:
    """`export` compares values itself: the one that is written is that which is loaded here."""
    examples = Path(__file__).parents[1] / "jobs" / "examples" / "trajectories.jsonl"
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    config = make_config(
        "data.kind=trajectory",
        f"data.sources.0.path={examples}",
        "objective={name: dqo}",
        f"critic.architecture={architecture}",
        f"model.path={base}",
        "model.lora={r: 4, target_modules: [q_proj, embed_tokens]}",
        f"checkpoint.export_dtype={dtype}",
    )
    trained(config, tmp_path / "step-00000001")
    target = export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")
    from safetensors import safe_open

    for file in target.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no mapping)
        assert kinds == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    assert (target / "critic" / "config.json").is_file() == (architecture == "separate")


@pytest.mark.parametrize("fault", ["merge", "write", "critic"])
def test_an_export_that_is_not_what_was_trained_fails_and_leaves_nothing(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    overrides = [f"model.path={base}", "model.lora={r: 4, target_modules: [q_proj, lm_head]}"]
    if fault == "merge":
        monkeypatch.setattr(model, "_untie", lambda lm: None)
    elif fault == "write":
        from pipeline import export as module

        written = module.save_model

        def damaged(lm, *others) -> None:
            lm.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
            written(lm, *others)
            lm.model.layers[0].mlp.up_proj.weight.data.div_(1.5)

        monkeypatch.setattr(module, "save_model", damaged)
    else:
        from pipeline import export as module

        written_critic = module.save_critic

        def shifted(critic, target) -> None:
            critic.head.weight.data.add_(1)
            written_critic(critic, target)
            critic.head.weight.data.sub_(1)

        monkeypatch.setattr(module, "save_critic", shifted)
        examples = Path(__file__).parents[1] / "jobs" / "examples" / "trajectories.jsonl"
        overrides += ["data.kind=trajectory", f"data.sources.0.path={examples}", "objective={name: dqo}"]
    config = make_config(*overrides)
    trained(config, tmp_path / "step-00000001")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"^export: the (merged|exported) .* values differ") as error:
        export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_rows_of_the_run_are_what_is_compared(make_config, tmp_path: Path) -> None:
    from pipeline.driver import prepare
    from pipeline.rows import Rows

    config = make_config()
    prepared = prepare(config, local=True)
    rows, own = export_check.probe_rows(config, prepared.rows, 259, None), Rows(prepared.rows)
    assert [row.prompt_ids[-5:] for row in rows] == [own[i].prompt_ids[-5:] for i in (0, len(own) // 2)]
    assert all(
        r[:15] == o[:15]
        for a, i in zip(rows, (0, 12), strict=True)
        for r, o in zip(a.response_ids, own[i].response_ids, strict=True)
    )
    assert max(row.tokens for row in rows) <= export_check.PROMPT + 2 * export_check.RESPONSE
    (prepared.rows / "manifest.json").unlink()
    by_chance = export_check.probe_rows(config, None, 259, None)
    assert export_check.probe_rows(config, prepared.rows, 259, None) == by_chance
    assert [row.tokens > 2 for row in export_check.probe_rows(config, None, 259, None)] == [True, True]


# --------------------------------------------------------------------------------------- ends of responses


def changed(folder: Path, name: str, **values: object) -> Path:
    """A JSON file of a model's with other values."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def chat_model(folder: Path) -> Path:
    """Its EOS ends a text, another token ends a turn."""
    save_tiny_llama(folder, vocab_size=260, eos_token_id=259)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return changed(folder, "generation_config.json", eos_token_id=259)


def exported(make_config, tmp_path: Path, base: Path, *overrides: str) -> Path:
    config = make_config(f"model.path={base}", *overrides)
    trained(config, tmp_path / "step-00000001")
    return export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")


def test_generate_stops_where_decoding_stops(make_config, tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base")
    target = exported(make_config, tmp_path, base)
    render = Renderer(load_tokenizer(str(base)), make_config().data)
    assert render.stop_ids == {2, 259} == own_stop_ids(str(target))
    lm = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():  # a model that says the end of a turn and nothing else
        states = lm.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        lm.lm_head.weight[2] = 100 * states / states.norm() ** 2
    assert lm.generate(torch.tensor([[5, 6]]), max_new_tokens=6, do_sample=False)[0, 2:].tolist() == [2]
    assert lm.generation_config.pad_token_id == 0


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 17, "repetition_penalty": 1.1},
        {"do_sample": False, "temperature": 0.6, "top_p": 0.95},  # what transformers loads but saves unchanged only
        {"eos_token_id": [259, 7], "pad_token_id": 5},
    ],
)
def test_a_models_own_generation_settings_survive(make_config, tmp_path: Path, own: dict) -> None:
    base = changed(chat_model(tmp_path / "base"), "generation_config.json", **own)
    found = GenerationConfig.from_pretrained(exported(make_config, tmp_path, base))
    for name, value in own.items():
        if name != "eos_token_id":
            assert getattr(found, name) == value
    assert set(found.eos_token_id) == {2, 259, *own.get("eos_token_id", [])}
    assert "_from_model_config" not in json.loads((tmp_path / "export" / "generation_config.json").read_text())


def test_a_model_without_generation_settings_stops_at_its_configurations_token(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", eos_token_id=[7, 2])
    (base / "generation_config.json").unlink()
    assert own_stop_ids(str(base)) == {7, 2}
    changed(base, "config.json", eos_token_id=[7, 100_000, -1])
    assert own_stop_ids(str(base)) == {7}, "a token that there is"
    (base / "generation_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"^model\.path: .*generation_config\.json is no JSON object"):
        own_stop_ids(str(base))


@pytest.mark.parametrize("decoding", ["{method: sampling}", "{method: beam, beams: 2}"])
def test_decoding_stops_where_a_models_own_settings_say(qalign, tmp_path: Path, decoding: str) -> None:
    base = save_tiny_llama(tmp_path / "base")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the film"}\n')

    def decode(name: str) -> list[int]:
        out = tmp_path / f"{name}.jsonl"
        status, _, told = qalign(
            "decode",
            f"checkpoint_from={base}",
            f"sampling={{prompts: {{path: {prompts}}}, output: {out}, max_new_tokens: 8, temperature: 0}}",
            f"decoding={decoding}",
        )
        assert status == 0, told
        return json.loads(out.read_text())["token_ids"]

    whole = decode("whole")
    stop = next(token for i, token in enumerate(whole[1:], 1) if token not in whole[:i])
    assert len(whole) == 8
    changed(base, "generation_config.json", eos_token_id=[2, stop])
    stopped = decode("stopped")
    assert stopped != whole and stop not in stopped[:-1]
    assert "beam" in decoding or stopped == whole[: whole.index(stop) + 1]


# ------------------------------------------------------------------------------------------- chat template

OTHER = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"


@pytest.mark.parametrize("own", [None, CHATML, {"default": CHATML, "tool_use": CHATML}])
def test_the_configurations_chat_template_is_the_exports(make_config, tmp_path: Path, own: object) -> None:
    base = save_tiny_llama(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(base)
    config = make_config(f"model.path={base}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": OTHER})})
    trained(config, tmp_path / "step-00000001")
    target = export(config, tmp_path / "step-00000001", str(base), tmp_path / "export")
    later = load_tokenizer(str(target))
    assert later.chat_template == OTHER
    said, plain = [Message(role="user", content="hi")], make_config().data
    first = Renderer(load_tokenizer(str(base)), config.data)
    assert Renderer(later, plain).prompt_ids(said) == first.prompt_ids(said)
    assert Renderer(later, plain).stop_ids == first.stop_ids


def test_without_one_in_the_configuration_the_models_own_stays(make_config, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    assert load_tokenizer(str(exported(make_config, tmp_path, base))).chat_template == CHATML
