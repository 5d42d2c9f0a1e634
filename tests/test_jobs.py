"""The command line as a user meets it: what is wrong is one line on stderr, status 2, and nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import checkpoint


def error_of(result: tuple[int, str, str]) -> str:
    """The error line; fails unless there is exactly one, with status 2 and no traceback."""
    status, _, told = result
    assert status == 2, told
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, told
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.max_length=5000"], "data.max_length: 5000 exceeds the model's context of 512 tokens"),
        (["storage=s3://bucket/x"], "storage: has to be a folder"),
        (["storage=/proc/qalign"], "storage: cannot be written"),
        (["model.path=no/such/folder/at/all"], "model.path: no folder"),
        (["data.sources=[{path: nowhere.jsonl}]"], "data.sources.0.path"),
        (["objective={name: plackett_luce}", "data.kind=demonstration"], "data.kind: plackett_luce trains on"),
        (["scaling.gpus_per_worker=1"], "scaling.gpus_per_worker: this machine has no GPU"),
        (["sampling.min_new_tokens=9", "sampling.max_new_tokens=4"], "min_new_tokens: must not exceed"),
        (["tracking.enabled=true", "tracking.uri=ftp://x"], "tracking.uri"),
    ],
)
def test_what_cannot_work_is_one_line(qalign, arguments: list[str], message: str) -> None:
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("this machine has one")
    assert message in error_of(qalign("train", *arguments))
    if "GPU" not in message:  # a dry run may look ahead to another machine
        assert message in error_of(qalign("train", *arguments, "--dry-run"))


def test_dry_run_refuses_what_the_job_would_refuse(qalign, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    assert "no usable record among 1" in error_of(
        qalign("train", "--dry-run", f"data.sources=[{{path: {tmp_path}/bad.jsonl}}]")
    )
    assert "data.eval_sources.0.path" in error_of(
        qalign("train", "--dry-run", "data.eval_sources=[{path: nowhere.jsonl}]")
    )
    assert not (tmp_path / "outputs" / "runs").exists()


def test_export_and_decode_of_a_finished_run(qalign, tmp_path: Path) -> None:
    status, told, _ = qalign(
        "train", "train.epochs=2", "data.eval_fraction=0.2", "checkpoint.every=1", "checkpoint.keep=1"
    )
    assert status == 0
    run = Path(next(line for line in told.splitlines() if line.startswith("run ")).split()[1])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    same = ["train.epochs=2", "data.eval_fraction=0.2"]
    assert "not empty" in error_of(qalign("export", *same, "--to", str(precious)))
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert "no checkpoint" in error_of(qalign("export", *same, "--to", str(tmp_path / "a"), "--checkpoint", "/nope"))
    assert qalign("export", *same, "--to", str(tmp_path / "best"), "--best")[0] == 0
    best = checkpoint.best(run)
    assert best is not None
    expected = dict(checkpoint.read_weights(best))
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.bfloat16).named_parameters())
    for name, tensor in expected.items():
        assert torch.equal(exported[name.removeprefix("lm.")], tensor.bfloat16())
    assert "exceed the model's context" in error_of(qalign("decode", *same, "sampling.max_new_tokens=5000"))
    assert qalign("decode", *same, f"checkpoint_from={best}", "sampling.max_new_tokens=4", "sampling.limit=2")[0] == 0


def test_an_objective_in_a_folder_of_pythonpath_loads_by_dotted_path(qalign, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from typing import ClassVar\n"
        "from pipeline.contracts import *\n"
        "class Likelihood(Objective):\n"
        "    needs: ClassVar[Needs] = Needs(records=frozenset({'preference'}))\n"
        "    def weight(self, batch): return {'a': batch.weight.sum()}\n"
        "    def __call__(self, out, batch): return LossOut({'b': Term(-out.logprobs.sum())})\n"
        "    def token_reward(self, out, batch): return out.logprobs\n"
        "class Bare(Objective): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    refused = error_of(qalign("train", "objective={name: 'mine:Bare'}"))
    assert "is not installed); pip install it, or name its folder in PYTHONPATH" in refused
    assert "mine" not in sys.modules
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "has no `needs`" in error_of(qalign("train", "objective={name: 'mine:Bare'}"))
    told = error_of(qalign("train", "objective={name: 'mine:Likelihood'}"))
    assert "returns the terms ['b'] but weighs ['a']" in told
