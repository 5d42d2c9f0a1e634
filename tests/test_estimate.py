"""The formulas against the real thing at a small size, and the document against the formulas."""

from __future__ import annotations

import gc
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline import checkpoint, data, estimate, reference
from pipeline.config_file import validate
from pipeline.estimate import Network, RowSize
from pipeline.order import MicroBatch, position_type, step_rows
from pipeline.rows import Rows

# --------------------------------------------------------------------------------------------------- disk


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RowSize]:
    """10,000 rows of known sizes, as `prepare` writes them, and what an average one holds."""
    import pyarrow as pa

    from pipeline.contracts import ROW_SCHEMA
    from pipeline.rows import finish, write_part

    folder = tmp_path_factory.mktemp("rows")
    chance = np.random.default_rng(0)
    prompts, responses = chance.integers(20, 200, 10_000), chance.integers(10, 100, (10_000, 2))
    made = [
        {
            "row_id": i,
            "source": f"pairs.jsonl:{i + 1:08d}",
            "source_index": 0,
            "prompt_hash": i,
            "prompt_ids": [7] * int(prompts[i]),
            "response_ids": [[5] * int(n) for n in responses[i]],
            "weight": 1.0,
            "trained": None,
            "token_rewards": None,
            "behaviour_logprobs": None,
            "mismatched": False,
        }
        for i in range(10_000)
    ]
    for part in range(2):
        write_part(folder, part, pa.Table.from_pylist(made[part * 5000 : (part + 1) * 5000], schema=ROW_SCHEMA))
    finish(folder, range(2), {})
    return folder, RowSize(round(prompts.mean()), round(responses.mean()), 2, label=len("pairs.jsonl:00000000"))


def test_bytes_of_a_row_on_disk(many: tuple[Path, RowSize]) -> None:
    folder, row = many
    on_disk = sum(part.stat().st_size for part in folder.glob("part-*")) / 10_000
    assert on_disk == pytest.approx(estimate.row_bytes(row), rel=0.01)


def test_bytes_of_a_row_in_the_reference_cache(many: tuple[Path, RowSize], tmp_path: Path) -> None:
    import pyarrow as pa

    from pipeline.contracts import REFERENCE_SCHEMA
    from pipeline.rows import write_part

    folder, row = many
    rows = Rows(folder)
    ids, logprobs = [], []
    for one in rows.take(MicroBatch(tuple(range(10_000)))):
        ids.append(one.row_id)
        logprobs.append([[-1.0] * len(r) for r in one.response_ids])
    part = write_part(tmp_path, 0, pa.Table.from_pydict({"row_id": ids, "ref_logprobs": logprobs}, REFERENCE_SCHEMA))
    assert part.stat().st_size / 10_000 == pytest.approx(estimate.reference_bytes(row), rel=0.01)


def test_the_real_caches_have_these_sizes(make_config, pairs_file: Path) -> None:
    """24 rows of a real `prepare`: Arrow's own header, which nobody notices at 10,000 rows, is most of the difference."""
    config = make_config()
    folder = data.prepare(config, config.model.path, local=True)
    scored = reference.score(config, folder, config.model.path, local=True)
    found = list(Rows(folder, scored).take(MicroBatch(tuple(range(24)))))
    prompt = np.mean([len(row.prompt_ids) for row in found])
    response = np.mean([len(r) for row in found for r in row.response_ids])
    row = RowSize(prompt, response, 2, label=len("pairs.jsonl:10"))  # type: ignore[arg-type]
    for at, formula in ((folder, estimate.row_bytes), (scored, estimate.reference_bytes)):
        parts = list(at.glob("part-*"))
        on_disk = sum(part.stat().st_size for part in parts)
        assert 0 < on_disk - 24 * formula(row) < 5000 * len(parts)


# --------------------------------------------------------------------------------------- memory of the index


def test_memory_of_the_index(many: tuple[Path, RowSize]) -> None:
    rows = Rows(many[0])
    config = validate(
        {
            "data": {"kind": "preference", "sources": [{"path": "x"}]},
            "model": {"path": "x"},
            "objective": {"name": "dpo"},
        }
    )
    split = rows.split(config.data, 0)
    lengths = rows.lengths[split.train]
    steps = step_rows(lengths, 0, 0, 128)
    arrays = [rows.row_ids, rows.source_index, rows.prompt_hash, rows.lengths, split.train, lengths]
    held = sum(array.nbytes for array in arrays) + steps.nbytes
    assert rows._order is None, "rows in their order need no index"
    assert held == pytest.approx(estimate.index_bytes(10_000, reference=False), rel=0.01)


def test_an_epochs_order_takes_one_number_a_row_whatever_the_step_size() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 1_000_000).astype(np.int32)
    assert step_rows(lengths, 0, 0, 128).nbytes < 4.1 * len(lengths)
    assert position_type(2**31 - 1) is np.int32
    assert position_type(2**31) is np.int64


# --------------------------------------------------------------------------------------------- arithmetic


def test_flops_of_a_forward(tiny_model: Path) -> None:
    """Against PyTorch's own counter, which sees every matrix product; it counts attention without its causal half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    lm = LlamaForCausalLM(settings).eval()
    network = Network(sum(p.numel() for p in lm.parameters()), 3, 64, 100)
    row = RowSize(prompt=0, response=40, responses=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(torch.ones(1, 40, dtype=torch.long))
    whole_attention = 4 * 64 * 3 * 40**2 / 2
    norms = 2 * 40 * (7 * 64)  # vectors are no matrix product
    assert counter.get_total_flops() == pytest.approx(estimate.forward_flops(network, row) + whole_attention - norms)


def test_a_shared_prompt_is_computed_once() -> None:
    network = Network(10**9, 20, 2048, 32_000)
    packed = estimate.forward_flops(network, RowSize(800, 100))
    apart = 2 * estimate.forward_flops(network, RowSize(800, 100, responses=1))
    assert 0.5 < packed / apart < 0.6
    assert estimate.training_flops(network, RowSize(800, 100), recompute=True) == 4 * packed


# ------------------------------------------------------------------------------------------- engine's memory


class Net(nn.Module):
    """Sixteen matrices: 4.2 million parameters, so that nothing else counts."""

    layout = "flat"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().sum()


def tensors() -> list[torch.Tensor]:
    """All tensors in this process."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]


def held(known: list[torch.Tensor]) -> int:
    """Bytes of all tensors, each storage once, but for those that were known before (and live on: no address is used twice)."""
    storages = {s.data_ptr(): s.nbytes() for s in (found.untyped_storage() for found in tensors())}
    return sum(storages.values()) - sum(storages.get(p, 0) for p in {t.untyped_storage().data_ptr() for t in known})


def work(rank: int, world: int, root: str, cases: list[tuple[int, str]]) -> None:
    from pipeline import zero

    torch.set_num_threads(1)
    zero.PERSISTENT_NUMEL = 0
    zero.BUCKET_NUMEL = 2**18  # of 2**22 parameters
    dist.init_process_group("gloo", store=dist.FileStore(f"{root}/store", world), rank=rank, world_size=world)
    for stage, dtype in cases:
        measured = measure(stage, dtype, Path(root))
        if rank == 0:
            torch.save(measured, f"{root}/{stage}-{dtype}.pt")
    dist.destroy_process_group()


def measure(stage: int, dtype: str, root: Path) -> dict[str, float]:
    """Bytes a parameter that this rank holds at most between two calls, and of the checkpoint that both write."""
    from pipeline.engine import Engine

    plain = {"kind": "preference", "sources": [{"path": "x"}]}
    settings = {"model": {"path": "x", "dtype": dtype}, "objective": {"name": "dpo"}, "scaling": {"zero_stage": stage}}
    before = tensors()
    net = Net().to(getattr(torch, dtype))
    count = sum(p.numel() for p in net.parameters())
    engine = Engine(net, validate({"data": plain} | settings), "cpu")
    x = torch.ones(2, 512, dtype=getattr(torch, dtype))
    found = {"state": 0.0}
    for micro in range(2):
        loss = engine(x) * 1e-6
        engine.backward(loss, last=micro == 1)
        del loss
        found["state"] = max(found["state"], held(before) / count)
    engine.step(1e-6)
    folder = root / f"checkpoint-{stage}-{dtype}"
    folder.mkdir(exist_ok=True)
    dist.barrier()
    for name, part in engine.parts():
        checkpoint.write_tensors(folder / name, part)
    dist.barrier()
    found["checkpoint"] = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / count
    engine.close()
    return found


CASES = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def measured() -> dict[tuple[int, str], dict[str, float]]:
    """Two ranks, all cases in one pair of processes."""
    with tempfile.TemporaryDirectory() as root:
        mp.start_processes(work, (2, root, CASES), nprocs=2, start_method="spawn")
        return {case: torch.load(f"{root}/{case[0]}-{case[1]}.pt") for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_state_of_an_engine_on_two_ranks(measured: dict, stage: int, dtype: str) -> None:
    size = 2 if dtype == "bfloat16" else 4
    formula = sum(estimate.state_bytes(1, 1, size, stage, workers=2).values())
    assert measured[stage, dtype]["state"] == pytest.approx(formula, rel=0.04)


@pytest.mark.slow
def test_bytes_of_a_checkpoint(measured: dict) -> None:
    for found in measured.values():
        assert found["checkpoint"] == pytest.approx(estimate.checkpoint_bytes(1), rel=0.01)


# ---------------------------------------------------------------------------------------------- the document


def test_the_document_is_what_the_formulas_say() -> None:
    from benchmarks.scaling_estimates import FILE, document

    assert FILE.read_text(encoding="utf-8") == document(), "run python -m benchmarks.scaling_estimates --write"


# -------------------------------------------------------------------------------------- pieces of large data


def test_large_data_is_cut_into_no_more_pieces_than_ray_and_linux_bear(tmp_path: Path, monkeypatch) -> None:
    from pipeline import sources
    from pipeline.config import Source
    from pipeline.reference_pieces import even_ends, growing_ends
    from tests.conftest import write_pairs

    path = write_pairs(tmp_path / "pairs.jsonl", 400)
    lengths = np.random.default_rng(0).integers(1, 500, 5000).astype(np.int32)
    assert len(sources.plan([Source(path=str(path))], tmp_path, chunk_bytes=300).chunks) > 50
    monkeypatch.setattr(sources, "MOST_CHUNKS", 10)
    planned = sources.plan([Source(path=str(path))], tmp_path, chunk_bytes=300)
    assert 5 <= len(planned.chunks) <= 10
    assert planned.records == 400
    steps = np.arange(50, 5001, 50)  # ends of steps of 50 rows
    size = int(lengths.sum()) // 7
    assert 7 <= len(even_ends(lengths, size)) <= 8
    assert len(growing_ends(lengths, steps, size)) <= 7 + np.log2(100) + 1
    assert len(growing_ends(lengths, steps, 1)) == 100, "a step at least"
    for ends in (even_ends(lengths, size), growing_ends(lengths, steps, size)):
        assert ends[-1] == 5000 and (np.diff(ends) > 0).all()
        assert all(lengths[first:stop].sum() <= size + 50 * 500 for first, stop in pairwise([0, *ends]))
