"""The command line as a user meets it: what is wrong is one line on stderr, status 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jobs.cli import main
from pipeline import checkpoint
from tests.conftest import save_tiny_llama


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
        (
            ["storage=/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_1/outputs"],
            "give an absolute path",
        ),
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


LONG = "x" * 300


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (f"name={LONG}", "name: string should have at most 100 characters"),
        ("name=a/b", "name: string should match pattern"),
        ("name=..", "name: string should match pattern"),
        ("name=läufer", "name: string should match pattern"),
        (f"storage=/tmp/{LONG}/x", "storage: has a name of 300 bytes in it; shorten it to 255"),
        (f"storage={'/tmp/ä' * 800}", "storage: has 5,600 bytes; shorten it to 3,000"),
        ('storage="/tmp/a\\0b"', r"storage: holds the control character '\x00'; remove it"),
        ('model.path="a\\tb"', r"model.path: holds the control character '\t'"),
        (f"sampling.output={LONG}.jsonl", "sampling.output: has a name of 306 bytes"),
        (f"checkpoint_from={LONG}", "checkpoint_from: has a name of 300 bytes"),
        (f"data.sources=[{{path: {LONG}.jsonl}}]", "data.sources.0.path: has a name of 306 bytes"),
        ("tracking.register_as=a/b", "tracking.register_as: string should match pattern"),
        (f"tracking.experiment={LONG}", "tracking.experiment: string should have at most 250 characters"),
        ("tracking.experiment=''", "tracking.experiment: string should have at least 1 character"),
    ],
)
def test_names_that_no_file_system_takes_are_refused_as_they_are_read(qalign, tmp_path, value: str, said: str) -> None:
    refused = error_of(qalign("train", value))
    assert refused.startswith(f"error: {said}")
    assert len(refused) < 400
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_longest_name_trains(qalign, tmp_path: Path) -> None:
    given = [f"name={'x' * 100}", "train.max_steps=1", "tracking.enabled=true", f"tracking.experiment={'é ' * 100}"]
    status, _, told = qalign("train", *given)
    assert status == 0, told
    assert len(list((tmp_path / "outputs" / "runs").glob("x*/export/model.safetensors"))) == 1


@pytest.mark.parametrize(
    "arguments", [["keys"], ["schema"], ["train", "{config}", "--dry-run"], ["train", "{config}", "--status"]]
)
def test_a_reader_who_has_seen_enough_ends_a_command_without_a_word(
    make_config, tmp_path: Path, monkeypatch, capfd, arguments: list[str]
) -> None:
    make_config()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main([part.format(config=tmp_path / "config.yaml") for part in arguments]) == 141
        monkeypatch.undo()
    assert "Error" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_training_goes_on_where_its_terminal_is_gone(make_config, tmp_path: Path, monkeypatch) -> None:
    make_config()
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        assert main(["train", str(tmp_path / "config.yaml"), "--local", "train.max_steps=1"]) == 0
        monkeypatch.undo()


def test_ctrl_c_is_one_line(make_config, tmp_path: Path, monkeypatch, capfd) -> None:
    make_config()
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("pipeline.driver.fit", lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        assert main(["train", str(tmp_path / "config.yaml"), "--local"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capfd.readouterr().err == "interrupted; the same command continues from the last checkpoint\n"


@pytest.fixture(scope="module")
def pickled_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with its weights in `pytorch_model.bin`."""
    folder = tmp_path_factory.mktemp("pickled") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("job", "key", "more"),
    [
        *((job, key, []) for job in ("train", "prepare") for key in ("model.path", "model.reference")),
        *(("train", key, ["--dry-run"]) for key in ("model.path", "model.reference")),
        *(("eval", key, []) for key in ("checkpoint_from", "evaluation.against", "sampling.scorer")),
        *(("decode", key, []) for key in ("checkpoint_from", "decoding.reference", "decoding.base", "sampling.scorer")),
        ("decode", "decoding.baseline", ["decoding.method=transfer_q", "sampling.scorer=vader"]),
        ("sweep", "model.path", ["sweep={space: {objective.beta: [0.1]}, metric: eval/loss}"]),
    ],
)
def test_weights_that_are_never_read_are_refused_before_any_work(
    qalign, tmp_path: Path, tiny_model: Path, pickled_model: Path, job: str, key: str, more: list[str]
) -> None:
    given = {"evaluation.against": ["sampling.scorer=vader", f"checkpoint_from={tiny_model}"]}.get(key, [])
    value = f"{key}={pickled_model}"
    if key == "sampling.scorer":
        value = f"{key}=classifier:{pickled_model}"
        given = [f"checkpoint_from={tiny_model}"]
    said = error_of(qalign(job, *more, *given, value))
    assert said.startswith(f"error: {key}: ")
    assert "weights as a pickle only" in said
    assert not list((tmp_path / "outputs").rglob("rows-*"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("no weights", "holds no weights (model.safetensors)"),
        ("cut off", "model.safetensors is cut off or damaged"),
        ("no tokenizer", "cannot load a tokenizer"),
        ("no part", "part-2.safetensors is missing"),
        ("part lacks", "part-1.safetensors lacks 1 weights (lm_head.weight, …)"),
        ("no index", "model.safetensors.index.json is no index of weights"),
    ],
)
def test_a_damaged_model_is_refused_before_any_work(qalign, tmp_path: Path, tiny_model, harm: str, said: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if harm == "no weights":
        weights.unlink()
    elif harm == "cut off":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif harm == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        tensors = load_file(weights)
        places = dict.fromkeys(tensors, "part-1.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "part-1.safetensors")
        weights.unlink()
        places |= {"lm_head.weight": "part-2.safetensors"} if harm == "no part" else {}
        index.write_text(json.dumps({"weight_map": places} if harm != "no index" else []))
    for more in ([], ["--dry-run"]):
        refused = error_of(qalign("train", f"model.path={folder}", *more))
        assert refused.startswith("error: model.path: ") and said in refused
    assert not list((tmp_path / "outputs").rglob("rows-*"))


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


@pytest.mark.slow
def test_what_reads_a_run_prepares_only_what_it_reads(qalign, tmp_path: Path) -> None:
    """With its cache gone: an export and prompts of one's own need no rows, held-out prompts need rows and no log-probs."""
    assert qalign("train", "train.max_steps=1", "data.eval_fraction=0.2")[0] == 0
    shutil.rmtree(tmp_path / "outputs" / "cache")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n')

    def made(kind: str) -> list[Path]:
        return [path for path in (tmp_path / "outputs" / "cache").glob(f"{kind}-*") if any(path.iterdir())]

    same = ["train.max_steps=1", "data.eval_fraction=0.2"]
    short = [*same, "sampling.max_new_tokens=2", "sampling.limit=2", "decoding.logprobs=[]"]
    status, _, told = qalign("export", *same, "--to", str(tmp_path / "exported"))
    assert status == 0, told
    status, _, told = qalign("decode", *short, f"sampling.prompts={{path: {tmp_path}/prompts.jsonl}}")
    assert status == 0, told
    assert made("rows") == made("reference") == []
    status, _, told = qalign("decode", *short)
    assert status == 0, told
    assert len(made("rows")) == 1 and made("reference") == []


@pytest.mark.slow
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


@pytest.mark.parametrize("others", [False, True])
def test_what_was_never_trained_leaves_no_run_behind(qalign, tmp_path: Path, others: bool) -> None:
    """Also where a run of other settings has the same name."""
    runs = tmp_path / "outputs" / "runs"
    if others:
        assert qalign("train", "train.max_steps=1")[0] == 0
    before = sorted(runs.glob("*"))
    asked = ["seed=7", "sampling.limit=2", "sampling.max_new_tokens=4"]
    for job, *more in (["export", "--to", str(tmp_path / "to")], ["eval"], ["decode"]):
        assert "has no run in" in error_of(qalign(job, *asked, *more))
    model = f"checkpoint_from={tmp_path / 'model'}"
    save_tiny_llama(tmp_path / "model")
    assert qalign("eval", *asked, model, "evaluation.evaluators=[held_out]")[0] == 0
    assert qalign("decode", *asked, model)[0] == 0
    assert sorted(runs.glob("*")) == before and runs.exists() == others
    assert not (tmp_path / "to").exists()
