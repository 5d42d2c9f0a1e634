"""No pickle is read from data, caches, models or checkpoints: planted ones, which would leave a trace, leave none."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from pipeline import checkpoint, data
from pipeline.arrow_files import ExtensionType, check_plain, open_parquet
from pipeline.config import ConfigError, Source
from pipeline.durable import digest_file
from pipeline.evaluation.classifier import Classifier, _load
from pipeline.fencing import Attempt
from pipeline.pretrained import load_backbone, load_causal_lm, load_scorer
from pipeline.rows import MANIFEST, Rows, StaleCache, part_of
from pipeline.sources import plan, read
from tests.conftest import save_tiny_llama
from tests.security.bombs import armed_column, pickled, saved


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Exists when a bomb went off."""
    return tmp_path / "trace"


def test_the_bombs_go_off_where_something_reads_them(trace: Path) -> None:
    pickle.loads(pickled(trace))
    assert trace.exists()
    trace.unlink()
    armed_column(trace, 1).to_pylist()
    assert trace.exists()


# ------------------------------------------------------------------------------------------------------ data


def armed_parquet(path: Path, trace: Path, nested: bool = False, kind: pa.ExtensionType | None = None) -> Path:
    """A parquet file of one preference pair, whose response is a bomb."""
    column = armed_column(trace, 1, kind)
    if nested:
        column = pa.StructArray.from_arrays([column], names=["content"])
    table = pa.table({"prompt": ["p"], "chosen": column, "rejected": ["r"]})
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_a_parquet_file_with_pickled_objects_is_refused(tmp_path: Path, trace: Path, nested: bool) -> None:
    path = armed_parquet(tmp_path / "data.parquet", trace, nested)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path: .*extension type 'tests\.pickled'"):
        plan([Source(path=str(path))], tmp_path / "work")
    assert not trace.exists()


@pytest.mark.slow
def test_the_type_that_ray_data_unpickles_is_refused(tmp_path: Path, trace: Path) -> None:
    """Every Ray Data worker has it registered."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    path = armed_parquet(tmp_path / "data.parquet", trace, kind=ArrowPythonObjectType())
    assert parquet.read_table(path).to_pylist()
    assert trace.exists(), "this is what must not happen"
    trace.unlink()
    with pytest.raises(ConfigError, match=r"extension type 'ray\.data\.arrow_pickled_object'"):
        plan([Source(path=str(path))], tmp_path / "work")
    assert not trace.exists()


def test_a_file_that_is_swapped_after_planning_is_refused_by_the_reader(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}), path)
    chunk = plan([Source(path=str(path))], tmp_path / "work").chunks[0]
    armed_parquet(path, trace)
    with pytest.raises(ExtensionType, match="'chosen'"):
        list(read(chunk))
    assert not trace.exists()


def test_types_that_arrow_itself_defines_are_plain(tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}']))
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as stream:
        assert open_parquet(stream).read().to_pylist() == [{"prompt": '{"a": 1}'}]
    with pytest.raises(ExtensionType):
        check_plain(pa.schema([("a", pa.list_(pa.map_(pa.string(), armed_column(tmp_path / "x", 0).type)))]))


def test_pickles_under_the_names_of_data_are_quarantined_text(make_config, tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(pickled(trace) + b"\n" + b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    config = make_config(f"data.sources=[{{path: {path}}}]", "data.max_bad_fraction=0.9")
    found = data.summary(data.prepare(config, config.model.path, local=True))
    assert found.rows == 1
    assert found.quarantined >= 1
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "data.pkl").write_bytes(pickled(trace))
    with pytest.raises(ConfigError, match=r"holds no \.jsonl"):
        plan([Source(path=str(folder))], tmp_path / "work")
    assert not trace.exists()


def test_a_saved_data_set_with_pickled_objects_is_refused(tmp_path: Path, trace: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}).save_to_disk(folder)
    file = next(folder.glob("*.arrow"))
    table = pa.table({"prompt": ["p"], "chosen": armed_column(trace, 1), "rejected": ["r"]})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path"):
        plan([Source(path=str(folder))], tmp_path / "work")
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------------- caches


@pytest.fixture
def rows(make_config, tmp_path: Path) -> Path:
    """Prepared rows, in one part."""
    config = make_config()
    return data.prepare(config, config.model.path, local=True)


def replant(folder: Path, content: pa.Table | bytes) -> None:
    """Another first part, with a manifest that vouches for it: who can write there can write both."""
    part = part_of(folder, 0)
    if isinstance(content, bytes):
        part.write_bytes(content)
    else:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
            writer.write_table(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parts"][part.name] = [part.stat().st_size, digest_file(part)]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_rows_with_a_pickled_column_are_refused(rows: Path, trace: Path) -> None:
    with pa.ipc.open_file(str(part_of(rows, 0))) as reader:
        table = reader.read_all()
    place = table.schema.get_field_index("source")
    replant(rows, table.set_column(place, "source", armed_column(trace, table.num_rows)))
    with pytest.raises(StaleCache, match=r"'source' is of the extension type.*run `qalign prepare` again"):
        Rows(rows)
    replant(rows, table.drop_columns(["weight"]))
    with pytest.raises(StaleCache, match="other columns"):
        Rows(rows)
    replant(rows, pickled(trace))
    with pytest.raises(StaleCache, match="run `qalign prepare` again"):
        Rows(rows)
    assert not trace.exists()


def test_a_manifest_cannot_name_files_elsewhere(rows: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copy(part_of(rows, 0), tmp_path / "part-000000.arrow")
    manifest = json.loads((rows / MANIFEST).read_text())
    manifest["parts"] = {f"../../../{Path(elsewhere).name}": next(iter(manifest["parts"].values()))}
    assert (rows / next(iter(manifest["parts"]))).is_file()
    (rows / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StaleCache, match="missing or damaged"):
        Rows(rows)


# ---------------------------------------------------------------------------------------------------- models

LOADERS = [load_causal_lm, load_backbone, load_scorer]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose weights can be replaced."""
    return save_tiny_llama(tmp_path / "model")


@pytest.mark.parametrize("load", LOADERS)
def test_weights_as_a_pickle_are_refused(model: Path, trace: Path, load) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(saved(trace))
    with pytest.raises(ConfigError, match=r"^model\.path: .* weights as a pickle only, which is never read; see docs"):
        load(str(model), torch.float32)
    assert not trace.exists()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("part", ["pytorch_model.bin", "../other/model.safetensors"])
def test_an_index_cannot_name_a_pickle_or_a_file_elsewhere(model: Path, trace: Path, load, part: str) -> None:
    other = model.parent / "other"
    other.mkdir()
    (model / "model.safetensors").rename(other / "model.safetensors")
    (model / "pytorch_model.bin").write_bytes(saved(trace))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"^model\.path: .*index\.json names .*no safetensors file beside it"):
        load(str(model), torch.float32)
    assert not trace.exists()


def test_an_adapter_is_refused_with_its_pickle(model: Path, trace: Path) -> None:
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": "x/y"})
    )
    (model / "adapter_model.bin").write_bytes(saved(trace))
    with pytest.raises(ConfigError, match=r"^model\.path: .* is an adapter; merge it"):
        load_causal_lm(str(model), torch.float32)
    assert not trace.exists()


def test_pickles_beside_the_weights_are_left_alone(model: Path, trace: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin", "tokenizer.pkl"):
        (model / name).write_bytes(saved(trace))
    load_causal_lm(str(model), torch.float32)
    assert not trace.exists()


def test_a_pickle_named_safetensors_is_refused(model: Path, trace: Path) -> None:
    (model / "model.safetensors").write_bytes(saved(trace))
    with pytest.raises(ConfigError, match=r"^model\.path: cannot load weights from .* is cut off or damaged"):
        load_causal_lm(str(model), torch.float32)
    assert not trace.exists()


def test_a_classifier_as_a_pickle_is_refused(make_config, model: Path, trace: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(saved(trace))
    own = make_config()
    for load in (lambda: Classifier(own, None, str(model)), lambda: _load(str(model), own.model)):
        with pytest.raises(ConfigError, match=r"^sampling\.scorer: .* weights as a pickle only"):
            load()
    assert not trace.exists()


# ----------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_with_a_pickle_is_refused_even_when_its_manifest_vouches_for_it(
    tmp_path: Path, trace: Path
) -> None:
    run = tmp_path / "run"
    attempt = Attempt.begin(run)
    folder = attempt.temporary(1)
    checkpoint.write_tensors(folder / "weights-00001-of-00001.safetensors", {"w": torch.zeros(2)})
    checkpoint.finish(folder, {"step": 1, "best": None, "metrics": {}})
    final = attempt.commit(folder, 1)
    weights = final / "weights-00001-of-00001.safetensors"
    weights.write_bytes(saved(trace))
    (final / "weights-00002-of-00002.pt").write_bytes(saved(trace))
    manifest = json.loads((final / checkpoint.MANIFEST).read_text())
    manifest["files"][weights.name] = {"size": weights.stat().st_size, "xxh3": digest_file(weights)}
    (final / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.latest(run) == final
    with pytest.raises(checkpoint.Corrupt, match=r"weights-00001-of-00001\.safetensors: .*header"):
        checkpoint.load_into({"w": torch.zeros(2)}, final)
    (final / checkpoint.STATE).write_bytes(pickled(trace))
    assert checkpoint.latest(run) is None
    assert not trace.exists()
