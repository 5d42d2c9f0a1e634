"""`qalign eval`: what is missing is one line before any work; a tiny run is measured whole, on samples and on planted errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.eval import evaluate
from pipeline.evaluation import EVALUATORS
from pipeline.evaluation.findings import METRICS
from pipeline.evaluation.results import read
from pipeline.evaluation.study import Study


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint_from: this configuration (run) has no run in"),
        (["checkpoint_from=/no/such/run"], "checkpoint_from: no folder"),
        (["sampling.scorer=vadr"], "'vadr' is none of"),
        (["sampling.scorer=verifiable"], "evaluation.answer: no answer in the first records"),
        (["evaluation.evaluators=[heldout]"], "there is no 'heldout'; known are held_out"),
        (
            ["evaluation.against=/no/such/run", "sampling.scorer='tests.evaluation.test_eval_job:letters'"],
            "evaluation.against: no folder",
        ),
        (["evaluation.against=/no/such/run"], "a win rate needs a score"),
        (["evaluation.answer_pattern=(a)(b)"], "needs one group"),
        (["evaluation.planted=nowhere.jsonl", "checkpoint_from={model}"], "evaluation.planted"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(qalign, tiny_model, tmp_path, arguments, message) -> None:
    status, _, told = qalign("eval", *(a.format(model=tiny_model) for a in arguments))
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in told
    assert message in lines[0]
    assert not list((tmp_path / "outputs").glob("cache/rows-*")), "nothing was prepared"


def study(make_config, *overrides: str, sampling: bool = True, second: str | None = None) -> Study:
    config = make_config(*overrides)
    return Study(config, None, "w", second, np.arange(2), {}, sampling, True)  # type: ignore[arg-type]


def test_every_need_has_its_reason(make_config) -> None:
    whole = study(make_config, "sampling.scorer='tests.evaluation.test_eval_job:letters'", second="w")
    assert all(whole.lacks(need) is None for evaluator in EVALUATORS.values() for need in evaluator.needs)
    bare = study(make_config, "sampling.top_k=3", sampling=False)
    assert {need for e in EVALUATORS.values() for need in e.needs if bare.lacks(need)} == {
        "samples",
        "plain samples",
        "scorer",
        "second model",
    }
    scores = study(make_config, "objective={name: reward_model}")
    assert "writes nothing" in scores.lacks("samples") and "not tokens" in scores.lacks("token rewards")


def defined(name: str) -> bool:
    """Whether `METRICS` says what a metric is."""
    for entry in METRICS:
        fixed, _, rest = entry.partition("<")
        if name == entry or (rest and fixed and name.startswith(fixed)):
            return True
        if entry.startswith("<who>/"):
            who, _, what = name.partition("/")
            wanted = entry.removeprefix("<who>/")
            if who in ("samples", "reference", "second") and what.startswith(wanted.partition("<")[0]):
                return True
    return False


def letters(prompt: str, response: str) -> float:
    """A scorer that fails on some completions."""
    if not response[:1].isalpha():
        raise ValueError("begins with no letter")
    return sum(map(str.isalpha, response)) / len(response)


@pytest.mark.slow
def test_a_run_is_measured_whole(qalign, tiny_model: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted.jsonl"
    cases = [{"prompt": f"{i}: the", "response": " good film", "errors": [[1, 5]]} for i in range(4)]
    planted.write_text("".join(json.dumps(case) + "\n" for case in cases))
    same = ["data.eval_fraction=0.3", "train.max_steps=3"]
    assert qalign("train", *same)[0] == 0
    asked = [
        *same,
        "sampling.scorer='tests.evaluation.test_eval_job:letters'",
        "sampling.max_new_tokens=8",
        "sampling.per_prompt=2",
        f"evaluation.against={tiny_model}",
        f"evaluation.planted={planted}",
        "evaluation.credit_rows=2",
    ]
    status, told, _ = qalign("eval", *asked, "--json", str(tmp_path / "numbers.json"))
    assert status == 0
    path = Path(told.splitlines()[-1].removeprefix("written "))
    found = read(path)
    assert path.parent.parent.name == "runs" and path.name == "evaluation.json"
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == found.numbers()
    assert [name for name in found.metrics if not defined(name)] == []
    assert found.before == "against" and found.skipped == []
    # The second model is the reference: the same samples, scores and wins.
    assert found.metrics["second/reward"] == found.metrics["reference/reward"]
    assert found.metrics["samples/win_rate"] == found.metrics["samples/win_rate_over_reference"]
    assert 0 < found.metrics["scorer/failed"].value < found.metrics["scorer/failed"].n == 2 * 2 * len(found.samples)
    assert found.metrics["samples/kl"].value > 0 and found.metrics["reference/kl"].value > 0
    assert found.metrics["eval/accuracy"].n == found.metrics["ece"].n == 8
    assert [row.row_id < 0 for row in found.credit] == [False, False, True, True]
    assert [r.label for r in found.credit[0].responses] == ["chosen", "rejected"]
    assert sum(found.credit[-1].responses[0].planted) == 4
    assert found.credit_auroc["-log π_ref"].errors == 16
    assert 0 <= found.credit_auroc["-implicit reward"].value <= 1

    # Another model's results lie beside it: its own folder stays what it was.
    export = path.parent / "export"
    before = sorted(export.iterdir())
    status, told, _ = qalign("eval", *same, f"checkpoint_from={export}", "evaluation.evaluators=[held_out, divergence]")
    assert status == 0 and sorted(export.iterdir()) == before
    beside = read(path.parent / "export-evaluation.json")
    assert beside.metrics["eval/loss"] == found.metrics["eval/loss"]
    assert beside.metrics.keys() >= {"samples/kl", "reference/kl"} and "ece" not in beside.metrics


@pytest.mark.slow
def test_a_model_against_itself_costs_nothing(qalign, tiny_model: Path) -> None:
    status, told, _ = qalign("eval", f"checkpoint_from={tiny_model}", "--sample", "sampling.max_new_tokens=6")
    found = read(Path(told.splitlines()[-1].removeprefix("written ")))
    assert status == 0
    assert found.metrics["samples/kl"].value == found.metrics["reference/kl"].value == 0
    assert found.metrics["eval/reward/margin"].value == pytest.approx(0, abs=1e-5)
    assert found.metrics["brier"].value == pytest.approx(0.25, abs=1e-5)
    assert found.metrics["samples/distinct_1"] == found.metrics["reference/distinct_1"]
    assert {s.what for s in found.skipped} == {"rewards"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_all_stages_on_ray_give_what_this_process_gives(make_config, tiny_model: Path) -> None:
    """Rows, samples of two models, two passes, credit."""
    config = make_config(
        f"checkpoint_from={tiny_model}",
        "data.eval_fraction=0.3",
        "scaling.data_actors=2",
        "sampling.max_new_tokens=6",
        "sampling.batch_size=2",
        "sampling.scorer='tests.evaluation.test_eval_job:letters'",
    )
    on_ray = evaluate(config, local=False)
    for path in Path(config.storage, "cache").glob("samples-*.json"):
        path.unlink()
    here = evaluate(config, local=True)
    assert here.keys() == on_ray.keys()
    assert on_ray == pytest.approx(here, abs=1e-5, nan_ok=True)
