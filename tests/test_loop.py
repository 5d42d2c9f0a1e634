"""The worker, run in this process: the very function that Ray Train runs, without Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline import checkpoint, data, loop, reference
from pipeline.driver import fit
from pipeline.lease import Lease
from pipeline.loop import Diverged, Job, train_worker
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.reference_cost import keeps_states
from tests.conftest import save_tiny_llama


def job_of(config, name: str = "run") -> Job:
    rows = data.prepare(config, config.model.path, local=True)
    frozen, states = None, False
    if config.objective.needed().kl != "none":
        frozen = config.model.reference
        states = keeps_states(config, rows, frozen, local=True)
    scoring = reference.Scoring(config, rows, frozen or config.model.path, local=True, states=states)
    scoring.run(scoring.pieces.of_the_run)
    run = Path(config.storage) / name
    run.mkdir(parents=True)
    return Job(config, run, rows, scoring.folder, config.model.path, frozen, scoring.states)


def train(job: Job) -> list[dict]:
    with Lease(job.run):
        train_worker(job.plain())
    return read_metrics(job.run / METRICS_FILE)


def weights(job: Job) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(job.run)
    assert newest is not None
    return dict(checkpoint.read_weights(newest))


def assert_same_weights(one: Job, other: Job) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_dpo_starts_at_ln_2_and_learns_the_preference(make_config) -> None:
    metrics = train(job_of(make_config("train.epochs=6")))
    assert [line["step"] for line in metrics] == list(range(1, 19))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["reward/margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[0]["accuracy"] <= 1
    assert metrics[-1]["loss"] < 0.3
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["reward/margin"] > 1.0
    assert metrics[-1]["epoch"] == 6.0


@pytest.mark.slow
def test_tdpo_learns_the_same_from_cached_states_as_from_the_live_reference(make_config, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    settings = ["objective={name: tdpo}", f"model.reference={other}", "train.epochs=2"]
    live = job_of(make_config(*settings, "model.reference_states=live"), "live")
    cached = job_of(make_config(*settings, "model.reference_states=cached"), "cached")
    assert live.states is None
    assert cached.states is not None
    assert live.reference == cached.reference, "how the KL is computed is no part of a run's identity"
    keep = ("loss", "grad_norm", "kl/chosen", "kl/rejected")
    lines = [[[line[k] for k in keep] for line in train(job)] for job in (live, cached)]
    assert lines[0][0][2] > 0.1, "two models differ"
    torch.testing.assert_close(*map(torch.tensor, lines), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_cut_off_in_the_middle_of_an_epoch_ends_with_the_same_bits(make_config, monkeypatch) -> None:
    config = make_config("train.epochs=2", "checkpoint.every=2")
    whole, broken = job_of(config, "whole"), job_of(config, "broken")
    reference_lines = train(whole)

    calls = []
    real = loop.train_step

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # step 4 is lost; the newest checkpoint is step 2
            raise RuntimeError("killed")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(broken)
    monkeypatch.setattr(loop, "train_step", real)
    lines = train(broken)
    assert_same_weights(whole, broken)
    keep = ("step", "loss", "grad_norm", "lr", "reward/margin")
    assert [[line[k] for k in keep] for line in lines] == [[line[k] for k in keep] for line in reference_lines]


def test_micro_batches_do_not_change_the_update(make_config) -> None:
    large = job_of(make_config("train.tokens_per_micro_batch=100000"), "large")
    small = job_of(make_config("train.tokens_per_micro_batch=64"), "small")
    a, b = train(large), train(small)
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, tensor in weights(large).items():
        torch.testing.assert_close(tensor, weights(small)[name], atol=2e-4, rtol=1e-3)


def test_layers_are_recomputed_from_the_first_step_on_and_change_no_weight(make_config, monkeypatch) -> None:
    """Layers of transformers recompute in training mode alone; models come out of loading in evaluation mode."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    real, calls = LlamaMLP.forward, []

    def watch(self, states):
        calls.append(torch.is_grad_enabled())
        return real(self, states)

    monkeypatch.setattr(LlamaMLP, "forward", watch)
    jobs, computed = [], []
    for recompute in ("false", "true"):
        job = job_of(make_config(f"model.activation_checkpointing={recompute}", "train.max_steps=1"), recompute)
        calls.clear()
        train(job)
        jobs.append(job)
        computed.append(sum(calls))
    assert computed[1] == 2 * computed[0] > 0
    for name, tensor in weights(jobs[0]).items():
        torch.testing.assert_close(weights(jobs[1])[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_every_row_is_used_once_per_epoch(make_config, monkeypatch) -> None:
    seen: list[int] = []
    real = loop.train_step

    def watch(learner, objective, batches, *rest):
        seen.extend(int(r) for b in batches for r, w in zip(b.row_ids, b.weight, strict=True) if w > 0)
        return real(learner, objective, batches, *rest)

    monkeypatch.setattr(loop, "train_step", watch)
    train(job_of(make_config("train.epochs=2", "train.rows_per_step=7")))
    assert sorted(seen[:24]) == list(range(24))
    assert sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


def poison(monkeypatch, *steps: int) -> None:
    """The loss of these steps, counted from 1, is NaN."""
    real, calls = loop.train_step, []

    def poisoned(learner, objective, batches, *rest):
        calls.append(1)
        if len(calls) in steps:
            batches[0].ref_logprobs[0, 0, 0] = float("nan")
        return real(learner, objective, batches, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_rows(make_config, monkeypatch) -> None:
    job = job_of(make_config("checkpoint.every=1"))
    poison(monkeypatch, 2)
    with pytest.raises(Diverged, match=r"step 2: the loss is nan; .* row ids: \[\d+, "):
        train(job)
    newest = checkpoint.latest(job.run)
    assert newest is not None
    assert newest.name == "step-00000001"  # the last good one is intact


def test_a_step_that_is_left_out_changes_nothing(make_config, monkeypatch, caplog) -> None:
    micro = "train.tokens_per_micro_batch=64"  # several: what the healthy ones accumulated has to go, too
    job = job_of(make_config("checkpoint.every=1", "checkpoint.keep=9", "train.skip_nan=1", micro))
    poison(monkeypatch, 2)
    lines = train(job)
    assert [line["step"] for line in lines if "skipped" in line] == [2]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3]
    one, two, three = (checkpoint.path_of(job.run, step) for step in (1, 2, 3))
    for kind in ("weights", "moments"):
        before, after = dict(checkpoint.read_tensors(one, kind)), dict(checkpoint.read_tensors(two, kind))
        assert all(torch.equal(before[name], after[name]) for name in before)
    moved = dict(checkpoint.read_weights(three))
    assert not torch.equal(moved["lm.lm_head.weight"], dict(checkpoint.read_weights(two))["lm.lm_head.weight"])
    assert all(tensor.isfinite().all() for tensor in moved.values())
    assert checkpoint.read_state(three)["updates"] == {"policy": 2}
    assert "step 2: the loss is nan" in caplog.text and "left out (train.skip_nan)" in caplog.text


@pytest.mark.parametrize(("step", "blamed"), [(1, False), (2, True)])
def test_before_the_first_update_the_learning_rate_is_not_to_blame(
    make_config, monkeypatch, step: int, blamed: bool
) -> None:
    poison(monkeypatch, step)
    with pytest.raises(Diverged, match=f"step {step}: the loss is nan") as told:
        train(job_of(make_config()))
    assert ("optimizer.lr" in str(told.value)) is blamed
    assert ("no update was made yet" in str(told.value)) is not blamed


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_gradient_in_bfloat16_that_is_not_finite_is_told_or_left_out(
    make_config, monkeypatch, caplog, stage: int, skip: int
) -> None:
    """The loss is a number: what is not is the gradient alone. At every stage, as among several workers."""
    micro = ("model.dtype=bfloat16", "train.tokens_per_micro_batch=64", f"scaling.zero_stage={stage}")
    job = job_of(make_config("checkpoint.every=1", "checkpoint.keep=9", f"train.skip_nan={skip}", *micro))
    real, calls = loop.train_step, []

    def poisoned(learner, objective, batches, *rest):
        calls.append(1)
        hook = None
        if len(calls) == 2:
            weight = next(p for p in learner.policy.module.parameters() if p.requires_grad)
            hook = weight.register_hook(lambda gradient: gradient * math.inf)
        try:
            return real(learner, objective, batches, *rest)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(loop, "train_step", poisoned)
    monkeypatch.setattr(loop, "unshared", lambda config, workers: config)
    if not skip:
        with pytest.raises(Diverged, match=r"step 2: the gradient's norm is (nan|inf); .* row ids: \[\d+, "):
            train(job)
        return
    lines = train(job)
    assert [line["step"] for line in lines if "skipped" in line] == [2]
    one, two, three = (dict(checkpoint.read_weights(checkpoint.path_of(job.run, step))) for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["lm.lm_head.weight"], three["lm.lm_head.weight"])
    assert all(tensor.isfinite().all() for tensor in three.values())
    assert "step 2: the gradient's norm is " in caplog.text and "left out (train.skip_nan)" in caplog.text


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(make_config, monkeypatch) -> None:
    config = make_config("train.epochs=2", "train.skip_nan=1")
    poison(monkeypatch, 2, 4, 5)
    with pytest.raises(Diverged, match="step 5: the loss is nan"):
        train(job_of(config))


@pytest.mark.slow
def test_held_out_rows_are_evaluated_and_not_trained_on(make_config) -> None:
    metrics = train(job_of(make_config("data.eval_fraction=0.25", "train.eval_every=2", "train.epochs=4")))
    evaluated = [line["step"] for line in metrics if "eval/loss" in line]
    assert evaluated == [2, 4, 6, 8, 10, 12]
    assert len(metrics) == 12  # 18 of 24 rows in steps of 8: 3 an epoch
    assert metrics[-1]["eval/accuracy"] > 0.9
    first, last = (line["eval/loss"] for line in (metrics[1], metrics[-1]))
    assert last < first < math.log(2)


@pytest.mark.slow
def test_lora_trains_and_saves_adapters_only(make_config) -> None:
    job = job_of(make_config("model.lora={r: 4, alpha: 8}", "optimizer.lr=0.01", "train.epochs=4"))
    metrics = train(job)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[-1]["loss"] < 0.5
    assert all("lora_" in name for name in weights(job))


def test_fit_exports_what_transformers_loads_and_says_when_it_is_finished(make_config) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config()
    result = fit(config, local=True)
    assert not result.already_finished
    lm = AutoModelForCausalLM.from_pretrained(result.export)
    AutoTokenizer.from_pretrained(result.export)
    newest = checkpoint.latest(result.run)
    assert newest is not None
    exported = dict(lm.named_parameters())
    for name, tensor in checkpoint.read_weights(newest):
        assert torch.equal(exported[name.removeprefix("lm.")], tensor)
    again = fit(config, local=True)
    assert again.already_finished
    assert again.run == result.run
    assert again.metrics == result.metrics


@pytest.mark.slow
def test_a_finished_run_whose_end_mlflow_was_not_told_tells_it(make_config) -> None:
    from mlflow import MlflowClient

    run = fit(make_config("train.max_steps=3"), local=True).run  # nobody is told
    config, reported = make_config("tracking.enabled=true", "train.max_steps=3"), []
    client = MlflowClient(tracking_uri=f"sqlite:///{config.storage}/mlflow.db")

    def again() -> dict[str, object]:
        assert fit(config, local=True, report=lambda result, _: reported.append(result.run)).already_finished
        state = json.loads((run / "tracking.json").read_text())
        found = client.get_run(state["run_id"])
        assert found.info.status == "FINISHED"
        assert found.data.tags["model.path"] == str((run / "export").resolve())
        assert found.data.params["train.max_steps"] == "3"
        steps = client.get_metric_history(state["run_id"], "loss")
        assert [metric.step for metric in steps] == [1, 2, 3]
        return state

    state = again()
    # As a driver leaves it that is killed behind the export.
    client.update_run(state["run_id"], status="RUNNING")
    client.delete_tag(state["run_id"], "model.path")
    (run / "tracking.json").write_text(json.dumps(state | {"ended": None}))
    assert again() == state and reported == [run, run]
    assert again() == state and reported == [run, run], "told, and told again"


@pytest.mark.slow
def test_what_changes_the_meaning_changes_the_run_and_nothing_else_does(make_config) -> None:
    first = fit(make_config("train.max_steps=1"), local=True).run
    same = ("train.tokens_per_micro_batch=512", "checkpoint.every=7", "scaling.workers=2", "scaling.zero_stage=1")
    assert fit(make_config("train.max_steps=1", *same), local=True).run == first
    for change in ("objective.beta=0.4", "seed=1", "optimizer.lr=0.5e-3", "train.rows_per_step=4"):
        assert fit(make_config("train.max_steps=1", change), local=True).run != first


@pytest.mark.slow
def test_sft_then_dpo_from_its_run(make_config) -> None:
    sft = fit(make_config("objective={name: sft}", "train.epochs=2"), local=True)
    dpo = fit(make_config(f"model.path={sft.run}", "train.max_steps=1"), local=True)
    assert dpo.metrics["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert json.loads((dpo.run / "run.json").read_text())["model"] == str(sft.export)


@pytest.mark.parametrize(
    ("trained", "asked", "written"),
    [("bfloat16", "auto", "BF16"), pytest.param("float32", "bfloat16", "BF16", marks=pytest.mark.slow)],
)
def test_the_export_has_the_precision_of_training_unless_another_is_named(make_config, trained, asked, written) -> None:
    settings = (f"model.dtype={trained}", f"checkpoint.export_dtype={asked}", "train.max_steps=1")
    result = fit(make_config(*settings), local=True)
    with safe_open(result.export / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {written}  # noqa: SIM118 (no mapping)


@pytest.mark.slow
def test_exported_adapters_are_merged(make_config) -> None:
    result = fit(make_config("model.lora={r: 4, alpha: 8}", "optimizer.lr=0.01"), local=True)
    names = load_file(result.export / "model.safetensors").keys()
    assert not any("lora" in name for name in names)
    base = load_file(Path(make_config().model.path) / "model.safetensors")
    exported = load_file(result.export / "model.safetensors")
    moved = [name for name in base if not torch.equal(base[name], exported[name])]
    assert moved
    assert all("_proj" in name for name in moved)


def test_the_error_that_broke_training_is_told_and_not_that_of_closing() -> None:
    class Broken:
        def close(self) -> None:
            raise AssertionError("there is no process group")

    with pytest.raises(RuntimeError, match="closed by peer"), loop._closed(Broken()):
        raise RuntimeError("closed by peer")
    with pytest.raises(AssertionError, match="no process group"), loop._closed(Broken()):
        pass
