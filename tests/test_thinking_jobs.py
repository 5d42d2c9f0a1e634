"""Thoughts through the command line: train, export, evaluate, decode, go on; and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import ConfigError, ModelConfig, SamplingConfig
from pipeline.driver import fit
from pipeline.errors import UserError
from pipeline.pretrained import load_causal_lm
from pipeline.thinker import PRIOR, Thinker, identity, load_thinker
from tests.conftest import save_tiny_llama
from tune.spaces import Space

EXAMPLES = Path(__file__).parents[1] / "jobs" / "examples"
LTA = (
    "data.kind=trajectory",
    f"data.sources.0.path={EXAMPLES / 'trajectories.jsonl'}",
    "data.max_length=500",
    "objective={name: lta}",
    "latent.n_latents=3",
    "optimizer.lr=0.01",
    "train.max_steps=2",
    "train.rows_per_step=4",
    "checkpoint.every=1",
    "checkpoint.export_dtype=float32",
)
DECODE = ("sampling.limit=3", "sampling.max_new_tokens=6", "sampling.temperature=0")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(make_config, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        fit(make_config(*LTA, *overrides), local=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "lora", "assistant"])
def test_an_export_holds_backbone_and_prior(make_config, tmp_path: Path, tiny_model: Path, kind: str) -> None:
    helper = save_tiny_llama(tmp_path / "helper", seed=6, hidden_size=16)
    changes = {"block": [], "lora": ["model.lora={r: 4}"], "assistant": [f"latent.assistant={helper}"]}[kind]
    result = fit(make_config(*LTA, *changes), local=True)
    saved = dict(checkpoint.read_weights(checkpoint.path_of(result.run, 2)))
    plain, exported = (load_causal_lm(str(p), torch.float32) for p in (tiny_model, result.export))
    same = all(torch.equal(p, q) for p, q in zip(plain.parameters(), exported.parameters(), strict=True))
    assert same == (kind != "lora"), "adapters are merged"
    settings = json.loads((result.export / PRIOR / "settings.json").read_text())
    assert settings["backbone"] == identity(exported)
    model = load_thinker(str(result.export), torch.float32, ModelConfig(path="unused"), SamplingConfig())
    assert isinstance(model, Thinker)
    assert model.n == 3
    for name, p in model.prior.named_parameters():
        assert torch.equal(p, saved[f"prior.{name}"])
    if kind == "lora":
        shutil.copytree(tiny_model, tmp_path / "mixed")
        shutil.copytree(result.export / PRIOR, tmp_path / "mixed" / PRIOR)
        with pytest.raises(ConfigError, match="trained for another backbone"):
            load_thinker(str(tmp_path / "mixed"), torch.float32, ModelConfig(path="unused"), SamplingConfig())


@pytest.mark.slow
def test_decoding_from_the_command_line(qalign, tmp_path: Path, tiny_model: Path) -> None:
    """The number of thoughts, none of them, sampled ones, votes; each task has an output of its own."""

    def decode(name: str, *arguments: str) -> list[dict]:
        out = tmp_path / f"{name}.jsonl"
        status, _, told = qalign("decode", *LTA, *DECODE, f"sampling.output={out}", *arguments)
        assert status == 0, told
        return rows(out)

    assert qalign("train", *LTA)[0] == 0
    usual, fewer, none = (decode(f"n{n}", *([f"sampling.n_latents={n}"] if n != 3 else [])) for n in (3, 1, 0))
    plain = decode("plain", f"checkpoint_from={tiny_model}")
    for key in ("text", "token_ids", "logprobs"):
        assert [row[key] for row in none] == [row[key] for row in plain]
    assert [row["logprobs"] for row in usual] != [row["logprobs"] for row in plain]
    assert [row["logprobs"] for row in usual] != [row["logprobs"] for row in fewer]
    voted = decode(
        "vote",
        "decoding={method: vote, n: 5}",
        "sampling.thought_noise=0.5",
        "sampling.temperature=1",
        r"evaluation.answer_pattern=([\s\S])",
        "decoding.logprobs=[reference]",
    )
    assert all(row["details"]["n"] == 5 and 1 <= row["details"]["votes"] <= 5 for row in voted)
    assert all(len(row["reference_logprobs"]) == len(row["token_ids"]) for row in voted)
    status, _, told = qalign("decode", *LTA, *DECODE, f"checkpoint_from={tiny_model}", "sampling.n_latents=2")
    assert (status, told.count("\n")) == (2, 1)
    assert "sampling.n_latents" in told and "no prior of latent thoughts" in told
    status, _, told = qalign("decode", *LTA, *DECODE, "sampling.n_latents=4")
    assert status == 2 and "has 3 thoughts, not 4; lower it" in told


@pytest.mark.slow
def test_evaluation_reads_thoughts_and_refuses_models_without(qalign, tmp_path: Path, tiny_model: Path) -> None:
    assert qalign("train", *LTA, "data.eval_fraction=0.2")[0] == 0
    few = ("sampling.limit=4", "sampling.max_new_tokens=5", "evaluation.evaluators=[held_out,divergence]")
    status, _, failed = qalign("eval", *LTA, "data.eval_fraction=0.2", *few, "--json", str(tmp_path / "e.json"))
    assert status == 0, failed
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["eval/latent_variance"] > 0.1 and found["samples/kl"] > 0, "its samples come from behind thoughts"
    status, _, failed = qalign(
        "eval", *LTA, "data.eval_fraction=0.2", *few, "sampling.n_latents=0", "--json", str(tmp_path / "n.json")
    )
    assert status == 0, failed
    assert json.loads((tmp_path / "n.json").read_text())["samples/kl"] == pytest.approx(0, abs=1e-6), (
        "a frozen backbone"
    )
    status, _, failed = qalign("eval", *LTA, "data.eval_fraction=0.2", *few, f"checkpoint_from={tiny_model}")
    assert status == 2 and "holds no prior, which this objective is evaluated with" in failed


@pytest.mark.slow
def test_another_objective_goes_on_from_a_thinking_model(make_config, pairs_file: Path) -> None:
    """The prior is part of the model: reference log-probs come from behind thoughts, too, and ρ = 0 at step 1."""
    first = fit(make_config(*LTA), local=True)
    second = fit(
        make_config(f"model.path={first.run}", "train.max_steps=2", "checkpoint.export_dtype=float32"), local=True
    )
    from pipeline.progress import METRICS_FILE, read_metrics

    assert read_metrics(second.run / METRICS_FILE)[0]["log_ratio"] == pytest.approx(0, abs=1e-5)
    assert (second.export / PRIOR).is_dir()
    names = {name for name, _ in checkpoint.read_weights(checkpoint.path_of(second.run, 2))}
    assert any(name.startswith("prior.") for name in names) and any(name.startswith("lm.") for name in names)
    load_thinker(str(second.export), torch.float32, ModelConfig(path="unused"), SamplingConfig())
    with pytest.raises(ConfigError, match="has latent thoughts, behind which there is no exact KL"):
        fit(make_config(f"model.path={first.run}", "objective={name: tdpo}"), local=True)


# ------------------------------------------------------------------------------------------- refused at once


@pytest.mark.slow
def test_trajectories_without_steps(make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No steps at all: quarantined, with its reason. One step: nothing to choose from; without that term it trains."""
    empty, single = tmp_path / "empty.jsonl", tmp_path / "single.jsonl"
    empty.write_text('{"prompt": "p", "trajectories": [{"steps": [], "reward": 1}]}\n')
    message = refused(make_config, f"data.sources.0.path={empty}", "data.max_bad_fraction=1")
    assert message.startswith("data.sources: no usable record among 1") and "steps" in message
    line = '{{"prompt": "p{0}", "trajectories": [{{"steps": [{{"text": "a {0}"}}], "reward": 1}}]}}\n'
    single.write_text("".join(line.format(i) for i in range(8)))
    message = refused(make_config, f"data.sources.0.path={single}")
    assert message.startswith("data.sources: 8 of 8 rows have fewer than two steps before the last one")
    likely = fit(make_config(*LTA, f"data.sources.0.path={single}", "objective.focus_weight=0"), local=True)
    assert likely.metrics["loss/nll"] > 0 and "loss/focus" not in likely.metrics
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(single.read_text() + "".join((EXAMPLES / "trajectories.jsonl").open().readlines()[:4]))
    fit(make_config(*LTA, f"data.sources.0.path={mixed}"), local=True)
    assert "9 of 12 rows have fewer than two steps" in caplog.text


def test_settings_that_cannot_work(make_config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^latent\.n_latents: input should be greater than or equal to 1"):
        make_config(*LTA, "latent.n_latents=0")
    message = refused(make_config, "data.max_length=510")
    assert message == "data.max_length: 510 and 3 thoughts exceeds the model's context of 512 tokens; lower it"
    other = save_tiny_llama(tmp_path / "other", vocab_size=300)
    message = refused(make_config, f"latent.assistant={other}")
    assert message.startswith("latent.assistant: its tokenizer differs from the policy's (vocabularies of 300 and 259)")
    assert refused(make_config, f"latent.assistant={tmp_path / 'none'}").startswith("latent.assistant: no folder")


def test_a_sweep_varies_the_number_of_thoughts_and_the_weights(make_config) -> None:
    space = Space(
        make_config(
            *LTA,
            "sweep.space.latent.n_latents=[1,2,4]",
            "sweep.space.objective.align_weight={low: 0, high: 1}",
            "sweep.space.objective.focus_weight=default",
        )
    )
    tried = [space.configure(point)[0] for point in space.grid()]
    assert {config.latent.n_latents for config in tried} == {1, 2, 4}
    assert {config.objective.focus_weight for config in tried} >= {0.1, 1.0}
    assert any("latent" in str(key) for key in space.configure(next(space.grid()))[1])
