"""`jobs.decode` from files to files: resumed, cut differently, on other workers, with rows that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from pyarrow import parquet

from jobs.cli import main
from pipeline.decoding import DECODERS
from pipeline.decoding.contract import Prompt
from pipeline.decoding.output import Pieces
from pipeline.decoding.rescoring import token_logprobs
from pipeline.pretrained import load_causal_lm
from tests.conftest import save_tiny_llama

NEW = 5
ROOT = Path(__file__).parents[2]


def vowels(prompt: str, response: str) -> float:
    """A scorer for the configuration: bytes of the response that are vowels or blanks."""
    return sum(letter in "aeiou " for letter in response) / 4 - 1


def consonants(prompt: str, response: str) -> float:
    return -sum(letter in "bcdfgh" for letter in response) / 4


def slow(prompt: str, response: str) -> float:
    """Leaves time to be killed in."""
    time.sleep(0.4)
    return vowels(prompt, response)


def choosy(prompt: str, response: str) -> float:
    """Fails on one prompt."""
    if prompt == "and 4":
        raise RuntimeError("not this one")
    return 1.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_llama(folder / "aligned", seed=1, initializer_range=0.3)
    save_tiny_llama(folder / "sft", seed=2, initializer_range=0.3)
    save_tiny_llama(folder / "small", seed=3, vocab_size=300)
    save_tiny_llama(folder / "short", seed=4, max_position_embeddings=16)
    return folder


Decode = Callable[..., list[dict]]


@pytest.fixture
def decode(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Decode:
    """decode("decoding.method=beam", …) → the rows of the output; 7 prompts of which 2 are unusable."""
    lines = ["alpha", "beta b", "", "gamma gam", "and 4", 7, "x"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    config = {
        "storage": str(tmp_path / "outputs"),
        "checkpoint_from": str(models / "aligned"),
        "data": {"kind": "preference", "sources": [{"path": "never read"}], "max_length": 64},
        "model": {"path": str(models / "sft"), "dtype": "float32"},
        "objective": {"name": "dpo", "beta": 0.5},
        "tracking": {"enabled": False},
        "sampling": {
            "prompts": {"path": str(prompts)},
            "max_new_tokens": NEW,
            "output": str(tmp_path / "out.jsonl"),
            "scorer": "tests.decoding.test_pieces:vowels",
        },
        "decoding": {"rows_per_piece": 3, "candidates": 4, "alpha": 0.3},
        "evaluation": {"answer_pattern": r"([\s\S])"},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def call(*overrides: str, local: bool = True, output: str = "out.jsonl") -> list[dict]:
        capfd.readouterr()
        where = ["--local"] if local else []
        asked = [*overrides, f"sampling.output={tmp_path / output}"]
        if main(["decode", str(tmp_path / "config.yaml"), *where, *asked]):
            raise RuntimeError(capfd.readouterr().err)
        if "." not in output:
            return load_from_disk(str(tmp_path / output)).to_list()
        if output.endswith(".parquet"):
            return parquet.read_table(tmp_path / output).to_pylist()
        return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]

    return call


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "details")} for row in rows]


def alike(found: list[dict], expected: list[dict]) -> bool:
    """Equal up to the rounding of log-probabilities, in the same order."""
    for a, b in zip(found, expected, strict=True):
        for name in ("source", "index", "prompt", "text", "token_ids", "score", "method"):
            assert a[name] == b[name], name
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-5)
    return True


@pytest.mark.parametrize(
    "method",
    [method if method == "controlled" else pytest.param(method, marks=pytest.mark.slow) for method in DECODERS],
)
def test_a_row_is_the_same_however_the_work_is_cut(decode: Decode, method: str):
    setting = f"decoding.method={method}"
    found = decode(setting, "sampling.per_prompt=2", "decoding.beams=2")
    assert [(row["source"], row["index"]) for row in found] == [
        (f"prompts.jsonl:{line}", i) for line in (1, 2, 4, 5, 7) for i in range(2)
    ]
    assert all(row["method"] == method and row["seconds"] > 0 for row in found)
    assert len({tuple(row["token_ids"]) for row in found}) > 5
    cut = ["decoding.rows_per_piece=1", "sampling.batch_size=3"]
    assert alike(decode(setting, "sampling.per_prompt=2", "decoding.beams=2", *cut, output="cut.jsonl"), found)


@pytest.mark.slow
def test_columns_are_what_they_say(decode: Decode, models: Path, tmp_path: Path):
    found = decode("decoding.method=transfer_q", "decoding.logprobs=[policy, reference]")
    for row in found:
        assert row["score"] == vowels(row["prompt"], row["text"])
        ids = [*_bytes(models, row["prompt"])]
        for role, folder in (("policy", "aligned"), ("reference", "sft")):
            model = load_causal_lm(str(models / folder), torch.float32)
            with torch.no_grad():
                exact = model(input_ids=torch.tensor([ids + row["token_ids"]])).logits[0].log_softmax(-1)
            own = exact[len(ids) - 1 : -1].gather(-1, torch.tensor(row["token_ids"])[:, None]).squeeze(-1)
            assert row[f"{role}_logprobs"] == pytest.approx(own.tolist(), abs=1e-4)
    refused = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert [one["source"] for one in refused] == ["prompts.jsonl:3", "prompts.jsonl:6"]
    assert "empty prompt" in refused[0]["reason"]
    best = decode("decoding.method=best_of_n", "decoding.n=4", output="best.parquet")
    assert best[0]["details"][1] == {"name": "kl_bound", "value": pytest.approx(0.6362943611)}
    assert best[0]["policy_logprobs"] == best[0]["logprobs"]
    exact = token_logprobs(*_alone(models, "sft", best[0]), 0)[0]
    assert best[0]["reference_logprobs"] == pytest.approx(exact, abs=1e-5)
    bare = decode("decoding.method=best_of_n", "decoding.n=4", "decoding.logprobs=[]", output="bare.jsonl")
    assert bare[0]["token_ids"] == best[0]["token_ids"]
    assert bare[0]["reference_logprobs"] is None
    folder = decode("decoding.method=best_of_n", "decoding.n=4", output="folder")
    assert without_time(folder) == without_time(best)
    assert decode("decoding.method=best_of_n", "decoding.n=4", "sampling.seed=5", output="folder") != folder
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def _alone(models: Path, name: str, row: dict) -> tuple:
    """The model, and one row of the output as prompt and response."""
    model = load_causal_lm(str(models / name), torch.float32)
    return model, [Prompt(_bytes(models, row["prompt"]), 0)], [row["token_ids"]]


def _bytes(models: Path, text: str) -> list[int]:
    from pipeline.pretrained import load_tokenizer

    return load_tokenizer(str(models / "sft"))(text, add_special_tokens=False)["input_ids"]


def test_a_second_call_does_only_what_is_missing(decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed behind the second of three pieces: they are not decoded again, and the whole is as if nothing had happened."""
    whole = decode("sampling.per_prompt=2", output="whole.jsonl")
    written: list[int] = []
    write = Pieces.write

    def dying(self: Pieces, number: int, *args) -> None:
        if number == 2 and len(written) == 2:
            self._rows(number).parent.joinpath("piece-000002.rows.jsonl").write_text('{"half')
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, *args)

    monkeypatch.setattr(Pieces, "write", dying)
    with pytest.raises(RuntimeError, match="interrupted"):
        decode("sampling.per_prompt=2")
    assert not (tmp_path / "out.jsonl").exists()
    written.append(-1)
    assert alike(decode("sampling.per_prompt=2"), whole)
    assert written == [0, 1, -1, 2]
    assert not list(tmp_path.glob(".out*"))
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    decode("sampling.per_prompt=2")
    assert written == [0, 1, -1, 2]
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before
    decode("sampling.per_prompt=2", "sampling.seed=9")
    assert written == [0, 1, -1, 2, 0, 1, 2], "another seed is another output"


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(decode: Decode, tmp_path: Path):
    """SIGKILL behind the first piece; the second call writes what an undisturbed one does, and repeats no piece."""
    settings = ["decoding.rows_per_piece=1", "sampling.scorer=tests.decoding.test_pieces:slow"]
    whole = decode(*settings, output="whole.jsonl")
    command = [sys.executable, "-m", "jobs.decode", str(tmp_path / "config.yaml"), "--local", *settings]
    command.append(f"sampling.output={tmp_path / 'out.jsonl'}")
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob(".out.jsonl.*.pieces/piece-000000.json"))):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.kill()
    job.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in done[0].parent.glob("piece-??????.json")}
    assert 1 <= len(kept) < 7
    assert not (tmp_path / "out.jsonl").exists()
    seen: dict[str, int] = {}
    discard = Pieces.discard

    def looking(self: Pieces) -> None:
        seen.update({path.name: path.stat().st_mtime_ns for path in self.folder.glob("piece-??????.json")})
        discard(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pieces, "discard", looking)
        assert alike(decode(*settings), whole)
    assert len(seen) == 7
    assert kept.items() <= seen.items()


def test_a_scorer_that_fails_on_a_row_puts_it_into_quarantine(decode: Decode, tmp_path: Path):
    found = decode("decoding.method=args", "sampling.scorer=tests.decoding.test_pieces:choosy")
    assert [row["source"] for row in found] == [f"prompts.jsonl:{line}" for line in (1, 2, 4, 7)]
    refused = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert sorted(one["source"] for one in refused) == [f"prompts.jsonl:{line}" for line in (3, 5, 6)]
    reasons = {one["source"]: one["reason"] for one in refused}
    assert reasons["prompts.jsonl:5"].startswith("completion 0: the scorer failed on a candidate for token 1 (")


def mendable(prompt: str, response: str) -> float:
    """A scorer that a person mends between two calls; half of it is broken for longer."""
    if (broken := os.environ.get("QALIGN_BROKEN_SCORER")) and (broken == "all" or len(prompt) % 2):
        raise TypeError("'NoneType' object is not subscriptable")
    return float(len(response))


@pytest.mark.parametrize("method", ["sampling", "args", "best_of_n"])
def test_a_scorer_that_raises_is_named_and_scores_again_once_it_is_mended(
    decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    settings = (f"decoding.method={method}", "sampling.scorer=tests.decoding.test_pieces:mendable", "decoding.n=2")
    whole = decode(*settings)
    assert whole and all(row["score"] == len(row["text"]) for row in whole)
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setenv("QALIGN_BROKEN_SCORER", "all")
    cause = r"first prompts\.jsonl:1: completion 0: the scorer failed on .*\(TypeError: 'NoneType' object is not subscriptable\)"
    with pytest.raises(
        RuntimeError, match=rf"error: sampling\.scorer: failed on \d completions \({cause}\); mend it, then the same"
    ):
        decode(*settings)
    monkeypatch.setenv("QALIGN_BROKEN_SCORER", "some")
    some = decode(*settings)
    assert 0 < len(some) < len(whole)
    assert "warning: sampling.scorer failed on" in capfd.readouterr().err
    monkeypatch.delenv("QALIGN_BROKEN_SCORER")
    assert alike(decode(*settings), whole)
    assert "scorer" not in (tmp_path / "out.quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoding.method=guess"], "decoding.method: no 'guess'; choose one of sampling, beam"),
        (["decoding.method=args", "sampling.scorer=null"], "sampling.scorer: args needs one"),
        (["sampling.scorer=nowhere:f"], "sampling.scorer: cannot load 'nowhere:f'"),
        (["decoding.baseline_scorer=nope"], "decoding.baseline_scorer: 'nope' is none of"),
        (["decoding.method=proxy", "decoding.base={models}/small"], "decoding.base: the tokenizer of"),
        (["decoding.method=transfer_q", "decoding.baseline={models}/none"], "decoding.baseline: no folder"),
        (["checkpoint_from={models}/short", "sampling.max_new_tokens=16"], "exceed the model's context of 16"),
        (["decoding.method=beam", "sampling.per_prompt=9"], "4 beams find no 9 responses"),
        (["sampling.output=/tmp/x.csv"], "has to end in .jsonl or .parquet"),
        (["sampling.output=here"], "is there and no folder saved by datasets"),
        (
            [
                "decoding.method=transfer_q",
                "decoding.rollouts=1",
                "decoding.baseline_scorer=tests.decoding.test_pieces:consonants",
            ],
            "decoding.rollouts: with one roll-out",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(
    decode: Decode, models: Path, tmp_path: Path, overrides: list[str], message: str
):
    (tmp_path / "here").mkdir()
    named = next((o.rpartition("/")[2].rpartition("=")[2] for o in overrides if "output=" in o), "out.jsonl")
    with pytest.raises(RuntimeError) as caught:
        decode(*[o.replace("{models}", str(models)) for o in overrides if "output=" not in o], output=named)
    told = [line for line in str(caught.value).splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "piece" not in str(caught.value)


@pytest.mark.slow
def test_prompts_beyond_the_context_are_refused_and_the_others_decoded(decode: Decode, models: Path, tmp_path: Path):
    found = decode(
        f"checkpoint_from={models / 'short'}", f"model.path={models / 'short'}", "sampling.max_new_tokens=10"
    )
    assert [row["source"] for row in found] == [f"prompts.jsonl:{line}" for line in (1, 2, 5, 7)]
    refused = [json.loads(line) for line in (tmp_path / "out.quarantine.jsonl").read_text().splitlines()]
    assert "9 tokens + 10 new ones exceed the model's context of 16" in refused[1]["reason"]


@pytest.mark.slow
def test_limit_counts_records_and_indirect_transfer_differs_from_direct(decode: Decode):
    both = [
        decode("decoding.method=transfer_q", "sampling.limit=4", "decoding.rollouts=3", *more, output=name)
        for name, more in (
            ("direct.jsonl", []),
            ("indirect.jsonl", ["decoding.baseline_scorer=tests.decoding.test_pieces:consonants"]),
        )
    ]
    assert [[row["source"] for row in rows] for rows in both] == [[f"prompts.jsonl:{n}" for n in (1, 2, 4)]] * 2
    assert without_time(both[0]) != without_time(both[1])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_ray_actors_give_what_this_process_gives(decode: Decode, monkeypatch: pytest.MonkeyPatch):
    settings = ("decoding.method=controlled", "decoding.rows_per_piece=2", "sampling.per_prompt=2")
    expected = decode(*settings)
    assert alike(decode(*settings, local=False, output="ray.jsonl"), expected)


def test_token_logprobs_do_not_depend_on_the_batch(models: Path):
    model = load_causal_lm(str(models / "sft"), torch.float32)
    prompts = [Prompt([5, 6, 7], 0), Prompt([8], 1), Prompt([9] * 20, 2)]
    responses = [[10, 11], [12, 13, 14, 15, 16, 17], [18]]
    together = token_logprobs(model, prompts, responses, 0)
    for prompt, response, values in zip(prompts, responses, together, strict=True):
        assert token_logprobs(model, [prompt], [response], 7) == [pytest.approx(values, abs=1e-5)]
        with torch.no_grad():
            exact = model(input_ids=torch.tensor([[*prompt.ids, *response]])).logits[0].log_softmax(-1)
        own = exact[len(prompt.ids) - 1 : -1].gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        assert values == pytest.approx(own.tolist(), abs=1e-5)
