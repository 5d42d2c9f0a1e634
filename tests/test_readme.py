"""The README's commands run as they stand there (but for a tiny model), and its file tree is true."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from pipeline.driver import fit
from pipeline.layouts import parse
from pipeline.sources import plan, read

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_two_commands_are_the_makefiles() -> None:
    assert commands()[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^demo:.*\n\t\$\(BIN\)/python -m jobs\.demo jobs/configs/demo\.yaml", makefile, flags=re.MULTILINE
    )
    assert re.search(r"^test:", makefile, flags=re.MULTILINE)


@pytest.mark.slow
def test_every_job_command_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through `jobs.cli.main`, which is what the installed `qalign` command calls."""
    monkeypatch.chdir(ROOT)
    seen = []
    for command in commands():
        if not command.startswith(".venv/bin/qalign "):
            continue
        arguments = shlex.split(command)[1:]
        seen.append(arguments[0])
        arguments = [a.replace("outputs/exported", str(tmp_path / "exported")) for a in arguments]
        tiny = [
            f"model.path={tiny_model}",
            f"storage={tmp_path / 'outputs'}",
            "model.dtype=float32",
            "data.max_length=512",
        ]
        assert main([*arguments, *tiny]) == 0, f"{command}: {capfd.readouterr().err}"
    assert seen == ["train", "train", "prepare", "train", "eval", "decode", "export"]
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 1  # all of them spoke of the same run
    told = capfd.readouterr().out
    for part in (
        "usable, 0 quarantined",
        "tokens per row",
        "not trained on",
        "memory     about",
        "eval/accuracy",
        "written",
    ):
        assert part in told, part


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_objective_example_trains_as_printed(qalign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pasted into a module of one's own, and named by dotted path."""
    (example,) = [block for block in python_blocks() if "(Objective)" in block]
    (tmp_path / "readme_objective.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    status, _, errors = qalign(
        "train", "objective={name: 'readme_objective:MyObjective', beta: 0.3}", "train.max_steps=1"
    )
    assert status == 0, errors
    (metrics,) = (tmp_path / "outputs" / "runs").glob("*/metrics.jsonl")
    first = json.loads(metrics.read_text().splitlines()[0])
    assert first["loss"] == first["loss/hinge"] == pytest.approx(1.0, abs=1e-5)  # equal policies: max(0, 1 − 0)


@pytest.mark.slow
def test_the_reward_model_example_scores_as_printed(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    export = fit(make_config("objective={name: reward_model}", "train.max_steps=2"), local=True).export
    (example,) = [block for block in python_blocks() if "AutoModelForSequenceClassification" in block]
    found: dict[str, object] = {}
    exec(example.replace("outputs/runs/…/export", str(export)), found)  # noqa: S102 – the README's own words
    assert found["scores"].shape == (1,) and found["scores"].isfinite().all()


def test_the_trajectory_example_is_read_as_printed(make_config, tmp_path: Path) -> None:
    (example,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL) if "solutions.jsonl" in block
    ]
    record = {
        "question": "9 × 8?",
        "truth": "… #### 72",
        "model_a": {"solution": "9 × 8 is\n72\n#### 72", "is_correct": True},
        "model_b": {"solution": "9 × 8 is\n71\n#### 71"},
    }
    (tmp_path / "solutions.jsonl").write_text(json.dumps(record) + "\n")
    data = yaml.safe_load(example)["data"]
    (source,) = data["sources"]
    source["path"] = str(tmp_path / "solutions.jsonl")
    config = make_config(f"data={json.dumps(data)}", "objective={name: dqo}")
    (chunk,) = plan(config.data.sources, tmp_path).chunks
    (raw,) = read(chunk)
    found = parse(raw.content(), "trajectory")
    assert [way.reward for way in found.best_first] == [1.0, 0.0]
    assert [[step.text for step in way.steps] for way in found.best_first] == [
        ["9 × 8 is\n", "72\n", "#### 72"],
        ["9 × 8 is\n", "71\n", "#### 71"],
    ]


def test_the_file_tree_names_every_module() -> None:
    tree = README[README.index("pipeline/\n") : README.index("## How to add an objective")]
    for path in sorted((ROOT / "pipeline").glob("*.py")):
        if path.name != "__init__.py":
            assert re.search(rf"\b{re.escape(path.name)}\s", tree), f"README's file tree lacks {path.name}"
    for name in re.findall(r"(\w+\.py)\s", tree):
        assert (ROOT / "pipeline" / name).is_file(), f"README's file tree names {name}, which is gone"
    for name in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()


def test_keys_named_in_the_readme_exist() -> None:
    from pipeline.config_file import describe

    known = describe()
    for section, key in re.findall(r"`?(data|model|train|optimizer|checkpoint|sampling|scaling)\.([a-z_]+)", README):
        if key not in ("py", "md"):  # files
            assert f"{section}.{key} =" in known or f"[{section}.{key}]" in known, f"{section}.{key}"


def trl_table() -> list[list[str]]:
    """Code of both columns of the table for people who come from TRL, row by row."""
    table = README.partition("## Coming from TRL\n")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return [[re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)] for theirs, ours in cells]


def test_what_is_set_in_trl_is_there_in_trl() -> None:
    trl = pytest.importorskip("trl")
    known = signature(trl.DPOConfig).parameters.keys()
    names = [name for theirs, _ in trl_table() for name in theirs]
    assert len(names) > 20
    for name in names:
        if argument := re.fullmatch(r"DPOTrainer\((\w+)=…\)", name):
            assert argument[1] in signature(trl.DPOTrainer).parameters
        else:
            assert name.partition("=")[0] in known, name
    (losses,) = [field.metadata["help"] for field in dataclasses.fields(trl.DPOConfig) if field.name == "loss_type"]
    (types,) = [name for name in names if name.startswith("loss_type=")]
    for loss in re.findall(r'"(\w+)"', types):
        assert f"`'{loss}'`" in losses


def test_what_replaces_it_is_a_setting_of_ours() -> None:
    from pipeline.config_file import describe

    known = describe()
    for name in (name for _, ours in trl_table() for name in ours):
        key = name.partition("=")[0]
        assert key == "objective" or re.search(rf"^\[?{re.escape(key)}[ \]]|^{re.escape(key)}=", known, re.M), key


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_runs_end_to_end_in_a_small_size(tmp_path: Path) -> None:
    """`make demo`'s own command with the real model, a few prompts and one step."""
    pytest.importorskip("vaderSentiment")
    arguments = ["--prompts", "12", "--held-out", "6", f"storage={tmp_path}", "sampling.max_new_tokens=16"]
    arguments += ["train.max_steps=2", "optimizer.warmup_steps=0", "optimizer.lr=3e-4"]  # enough to move it
    command = [sys.executable, "-m", "jobs.demo", "jobs/configs/demo.yaml", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout
    assert re.search(r"reward.*?(-?\d\.\d+) ± .*?(-?\d\.\d+) ±", table)
    kl_before, kl_after = re.search(r"KL\(π‖π_ref\).*?(\d\.\d+) ± .*?(\d\.\d+) ±", table).groups()
    assert float(kl_before) == 0.0 < float(kl_after)
    model = Path(re.search(r"^model +(\S+)", table, flags=re.MULTILINE).group(1))
    assert (model / "model.safetensors").is_file()
    assert (tmp_path / "mlflow.db").is_file()
