"""Python code that ships with a model does not run unless the configuration says so: in none of the roles that a model can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs import preview
from jobs.eval import check
from pipeline.config import ConfigError
from pipeline.decoding.loading import weights
from pipeline.evaluation.classifier import Classifier
from pipeline.export import weights_of
from pipeline.pretrained import load_causal_lm, load_config, load_scorer, load_tokenizer
from tests.conftest import save_tiny_llama

MAP = {
    "AutoConfig": "code.OwnConfig",
    "AutoModel": "code.OwnModel",
    "AutoModelForCausalLM": "code.OwnModel",
    "AutoModelForSequenceClassification": "code.OwnModel",
    "AutoTokenizer": ["code.OwnTokenizer", "code.OwnTokenizer"],
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def model(tmp_path: Path, trace: Path) -> Path:
    """A model that brings code of its own: for its configuration, its layers, its tokenizer and its generation."""
    folder = save_tiny_llama(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nraise ImportError('ran')\n"
    (folder / "code.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings |= {"auto_map": MAP, "model_type": "own"} if name == "config.json" else {"auto_map": MAP}
        settings |= {"tokenizer_class": "OwnTokenizer"} if name != "config.json" else {}
        (folder / name).write_text(json.dumps(settings))
    return folder


READERS: dict[str, Callable] = {
    "configuration": lambda path, make: load_config(path),
    "tokenizer": lambda path, make: load_tokenizer(path),
    "language model": lambda path, make: load_causal_lm(path, torch.float32),
    "reward model": lambda path, make: load_scorer(path, torch.float32),
    "scorer": lambda path, make: Classifier(make(), None, path),
    "evaluation": lambda path, make: check(make(f"checkpoint_from={path}")),
    "second model": lambda path, make: check(
        make(f"checkpoint_from={make().model.path}", f"evaluation.against={path}", "sampling.scorer='xxhash:xxh64'")
    ),
    "decoding": lambda path, make: weights(make(), ["base"], path, path, make().model.path),
    "dry run": lambda path, make: preview.preview(make(f"model.path={path}")),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_code_of_a_model_runs_by_default(reader: str, model: Path, trace: Path, make_config) -> None:
    with pytest.raises(ConfigError, match=r"^[a-z_.]+: "):
        READERS[reader](str(model), make_config)
    assert not trace.exists()


def test_it_runs_where_the_configuration_says_so(model: Path, trace: Path, make_config) -> None:
    with pytest.raises(ConfigError, match="ran"):
        load_tokenizer(str(model), trust_remote_code=True)
    assert trace.exists()
    trace.unlink()
    with pytest.raises((ConfigError, ImportError), match="ran"):
        check(make_config(f"checkpoint_from={model}", "model.trust_remote_code=true"))
    assert trace.exists()


def test_somebody_elses_run_cannot_permit_itself_to_run_code(qalign, model: Path, trace: Path, tmp_path: Path) -> None:
    """A run's folder says which model it came from and with which settings: these are its author's, not ours."""
    assert qalign("train", "train.max_steps=1", "checkpoint.every=1")[0] == 0
    run = next((tmp_path / "outputs" / "runs").iterdir())
    note = json.loads((run / "run.json").read_text())
    note["config"]["model"]["trust_remote_code"] = True
    (run / "run.json").write_text(json.dumps(note | {"model": str(model)}))
    newest = run / "checkpoints" / "step-00000001"
    with pytest.raises(ConfigError, match="cannot load"):
        weights_of(str(newest), tmp_path)
    assert not trace.exists()
    with pytest.raises((ConfigError, ImportError), match="ran"):
        weights_of(str(newest), tmp_path, trust_remote_code=True)
    assert trace.exists()


def test_a_chat_template_cannot_reach_python(tiny_model: Path, trace: Path) -> None:
    from pipeline.chat import Chat
    from pipeline.records import Message

    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    chat = Chat(load_tokenizer(str(tiny_model)), template % trace)
    with pytest.raises(ValueError, match="the chat template refuses"):
        chat.prompt([Message(role="user", content="x")])
    assert not trace.exists()
