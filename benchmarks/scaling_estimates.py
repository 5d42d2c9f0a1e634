"""docs/scaling.md: what a billion preference pairs and a model of 70 billion parameters take. `python -m benchmarks.scaling_estimates --write`

Every number of the document comes from `pipeline.estimate`, from the assumptions below, or from MEASURED: a change of any of them that is
not written shows in a test. Left out: the formulas (`pipeline.estimate`), and their proof at a small size (tests/test_estimate.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline import estimate, order
from pipeline.data import CHUNK_BYTES
from pipeline.estimate import Machine, Network, RowSize
from pipeline.reference_pieces import MOST_PIECES, PIECE_TOKENS
from pipeline.sources import MOST_CHUNKS

FILE = Path(__file__).parents[1] / "docs" / "scaling.md"
ROWS = 10**9
ROW = RowSize(prompt=250, response=175)
NETWORK = Network(parameters=70_600_000_000, layers=80, hidden=8192, vocabulary=128_256)
MACHINE = Machine("H100, 80 GB", 80 * 10**9, 989e12, 0.40, 2.50, 50e9)
PER_NODE, NODE_MEMORY = 8, 2e12
GPUS = (128, 256, 512)
TEXT_PER_TOKEN, RECORD = 4.2, 60  # bytes of UTF-8 in a token; of a record's keys and quotes
STORAGE_RATE, STORAGE_DOLLARS = 20e9, 0.10  # bytes a second of the shared file system; a gigabyte and month
ROWS_PER_STEP, CHECKPOINT_SECONDS = 4096, 1800
LINUX_MAPS = 65_530
MEASURED = {"order": 0.63e-6, "read": 1.0e9, "item": 2.0e-3}
"""Seconds a row of `step_rows` at 10 million rows (two cores, other load beside it); bytes a second that `plan` reads and hashes; seconds an
item of Ray Data's."""
CHECKED = (
    ("bytes of a row on disk, 10,000 rows", "1 %"),
    ("bytes of a row in the reference cache, 10,000 rows", "1 %"),
    ("bytes of the rows' index in a worker, 10,000 rows", "1 %"),
    ("bytes of an epoch's order, 1,000,000 rows", "4.1 a row at most"),
    ("arithmetic of a forward, against PyTorch's own counter", "exact"),
    ("weights, gradients and optimizer of one of two ranks, ZeRO-0 to 3, float32 and bfloat16", "4 %"),
    ("bytes of a checkpoint that two ranks write", "1 %"),
)
"""What tests/test_estimate.py compares, and how closely."""


def document() -> str:
    """The whole page."""
    parts = [_head(), _storage(), _reference(), _training(), _memory(), _checkpoints(), _ray(), _limits(), _checks()]
    return "\n\n".join(parts) + "\n"


def _head() -> str:
    return f"""# One billion pairs, 70 billion parameters

On paper: nobody has run this. Every number is made by `python -m benchmarks.scaling_estimates` from the formulas of
[`pipeline/estimate.py`](../pipeline/estimate.py), which tests compare with the real thing at a small size ([below](#how-the-formulas-were-checked));
that this page and the formulas agree is a test, too. For your own run ask `qalign train CONFIG.yaml --dry-run`.

| assumed | |
|---|---|
| data | {_count(ROWS)} pairs, prompt {ROW.prompt} tokens, responses {ROW.response} tokens each: {ROW.tokens} tokens a packed row, {_count(ROWS * ROW.tokens)} in all |
| text | {TEXT_PER_TOKEN} bytes a token, {RECORD} bytes of JSON around it |
| model | {_count(NETWORK.parameters)} parameters, {NETWORK.layers} layers of {NETWORK.hidden}, vocabulary {NETWORK.vocabulary:,}; bfloat16, float32 master weights |
| GPU | {MACHINE.name}, {MACHINE.flops / 1e12:.0f} TFLOP/s at {MACHINE.utilisation:.0%}, {MACHINE.network / 1e9:.0f} GB/s of network each, $ {MACHINE.dollars:.2f} an hour |
| node | {PER_NODE} GPUs, {NODE_MEMORY / 1e12:.0f} TB of memory |
| storage | {STORAGE_RATE / 1e9:.0f} GB/s in all, $ {STORAGE_DOLLARS:.2f} a GB and month |"""


def _storage() -> str:
    text = ROWS * (TEXT_PER_TOKEN * ROW.tokens + RECORD)
    kinds = {
        "text, uncompressed jsonl": text,
        f"rows, {estimate.row_bytes(ROW):.0f} bytes each": ROWS * estimate.row_bytes(ROW),
        f"reference log-probs, {estimate.reference_bytes(ROW):.0f} bytes each": ROWS * estimate.reference_bytes(ROW),
        "checkpoints, the newest two and the best": 3 * estimate.checkpoint_bytes(NETWORK.parameters),
        "export": estimate.export_bytes(NETWORK.parameters),
    }
    rows = [[name, _bytes(size), f"{size / 1e9 * STORAGE_DOLLARS:,.0f}"] for name, size in kinds.items()]
    total = sum(kinds.values())
    states = ROWS * ROW.answered * NETWORK.hidden * 2
    return f"""## Storage

{_table(["", "size", "$ a month"], [*rows, ["together", _bytes(total), f"{total / 1e9 * STORAGE_DOLLARS:,.0f}"]])}

The reference's hidden states (`model.reference_states=cached`, for exact KL) would be {_bytes(states)}: at this size they are made beside the
policy, never kept."""


def _reference() -> str:
    flops = ROWS * estimate.forward_flops(NETWORK, ROW)
    hours = estimate.gpu_hours(flops, MACHINE)
    apart = 2 * estimate.forward_flops(NETWORK, RowSize(ROW.prompt, ROW.response, responses=1))
    return f"""## The reference pass

{flops:.2e} FLOP, {_count(hours)} GPU-hours, $ {_count(hours * MACHINE.dollars)}; {hours / 512 / 24:.1f} days on 512 GPUs. A prompt is computed once for
both responses: apart they would take {apart / estimate.forward_flops(NETWORK, ROW):.2f} times as much. It is done once for all runs on these rows and this
reference. An actor holds the whole reference on the GPUs that `scaling.gpus_per_worker` gives it: {_bytes(estimate.export_bytes(NETWORK.parameters))} do not fit one of
{_bytes(MACHINE.memory)} (see [what breaks first](#what-breaks-first))."""


def _training() -> str:
    flops = ROWS * estimate.training_flops(NETWORK, ROW, recompute=True)
    hours = estimate.gpu_hours(flops, MACHINE)
    rows = []
    for gpus in GPUS:
        tokens = ROWS_PER_STEP * ROW.tokens / gpus
        computing = (
            tokens / ROW.tokens * estimate.training_flops(NETWORK, ROW, True) / (MACHINE.flops * MACHINE.utilisation)
        )
        moving = estimate.zero3_seconds(NETWORK.parameters, MACHINE)
        rows.append([str(gpus), f"{hours / gpus / 24:.0f}", f"{tokens:,.0f}", f"{computing:.1f}", f"{moving:.1f}"])
    least = estimate.zero3_seconds(NETWORK.parameters, MACHINE) * MACHINE.flops * MACHINE.utilisation
    balanced = least / estimate.training_flops(NETWORK, ROW, True) * ROW.tokens
    return f"""## Training, one epoch

{flops:.2e} FLOP with activation checkpointing, {_count(hours)} GPU-hours, $ {_count(hours * MACHINE.dollars)}; with `rows_per_step: {ROWS_PER_STEP}`
{ROWS // ROWS_PER_STEP:,} steps.

{_table(["GPUs", "days", "tokens a GPU and step", "computing, s a step", "ZeRO-3's traffic, s a micro-batch"], rows)}

Stage 3 gathers all weights twice and reduces the gradients once per micro-batch. That hides behind computing only above {balanced:,.0f} tokens a
GPU and micro-batch: give `tokens_per_micro_batch` at least as many and keep to one micro-batch a step. Below it the network sets the pace. There is no
tensor or pipeline parallelism here."""


def _memory() -> str:
    rows = []
    for workers in GPUS:
        for stage in (1, 2, 3):
            for offload in (False, True):
                parts = estimate.state_bytes(NETWORK.parameters, NETWORK.parameters, 2, stage, workers, offload)
                total = sum(parts.values())
                fits = "yes" if total < 0.7 * MACHINE.memory else "no"
                where = "host" if offload else "GPU"
                rows.append(
                    [str(workers), str(stage), where, *(_bytes(size) for size in parts.values()), _bytes(total), fits]
                )
    host = estimate.state_bytes(NETWORK.parameters, NETWORK.parameters, 2, 3, GPUS[0])["optimizer"] * PER_NODE
    head = [
        "GPUs",
        "ZeRO",
        "optimizer on",
        "weights",
        "gradients",
        "optimizer",
        "together",
        f"fits {_bytes(MACHINE.memory)}",
    ]
    return f"""## Memory of one GPU

While gradients add up, without activations (they get the remaining 30 %: “fits” means below 70 %) and buckets (some 0.8 GB). Weights are
bfloat16, gradients are added up in float32, the optimizer has float32 master weights and two moments.

{_table(head, rows)}

Offloaded, the optimizer's part lies in the host's memory: {_bytes(host)} a node at {GPUS[0]} GPUs."""


def _checkpoints() -> str:
    size = estimate.checkpoint_bytes(NETWORK.parameters)
    seconds = size / STORAGE_RATE
    share = seconds / CHECKPOINT_SECONDS
    return f"""## Checkpoints

{_bytes(size)} each (12 bytes a parameter, whatever stage and workers): {seconds:.0f} s at {STORAGE_RATE / 1e9:.0f} GB/s. They are written beside training;
one every {CHECKPOINT_SECONDS // 60} minutes keeps storage busy {share:.1%} of the time and needs {_bytes(size / CHECKPOINT_SECONDS)} a second on average. A host
holds its own share of one: {_bytes(size / GPUS[-1] * PER_NODE)} a node of {GPUS[-1]} GPUs. A lost node costs {CHECKPOINT_SECONDS // 120} minutes of work on average."""


def _ray() -> str:
    text = ROWS * (TEXT_PER_TOKEN * ROW.tokens + RECORD)
    tokens = ROWS * ROW.tokens
    before, after = text / CHUNK_BYTES, min(text / CHUNK_BYTES, MOST_CHUNKS)
    scored, bound = tokens / PIECE_TOKENS, min(tokens / PIECE_TOKENS, MOST_PIECES)
    rows = [
        ["tokenise", _bytes(CHUNK_BYTES), _count(before), _bytes(text / after), _count(after)],
        ["reference", f"{PIECE_TOKENS:,} tokens", _count(scored), f"{tokens / bound:,.0f} tokens", _count(bound)],
    ]
    return f"""## Object store and shuffle

Rows never pass through Ray's object store and nothing is shuffled by it: actors read pieces of the sources and write parts of Arrow files, items and
results are descriptions of some hundred bytes, and the order of training is arithmetic (`pipeline.order`). So neither the store's size nor spilling is a
limit. The number of items is: each is a block and a task of Ray Data's, about {1000 * MEASURED["item"]:.0f} ms of the driver, and becomes a file that
every worker maps, of which Linux allows a process {LINUX_MAPS:,}. Pieces therefore grow with the data:

{_table(["stage", "a piece", "pieces at that size", "a piece here", "pieces"], rows)}

A tokenising actor holds one piece's rows as Python numbers, some ten times the piece's text ({_bytes(10 * text / after)}): give it memory by giving it CPUs."""


def _limits() -> str:
    index, whole = estimate.index_bytes(ROWS), estimate.export_bytes(NETWORK.parameters)
    text = ROWS * (TEXT_PER_TOKEN * ROW.tokens + RECORD)
    caches = ROWS * (estimate.row_bytes(ROW) + estimate.reference_bytes(ROW))
    order_seconds, plan_seconds = ROWS * MEASURED["order"], text / MEASURED["read"]
    return f"""## What breaks first

1. **Models larger than one GPU cannot start.** Every worker loads the whole model and moves it to its GPU before stage 3 shares it out:
   {_bytes(whole)} on {_bytes(MACHINE.memory)}, and {_bytes(PER_NODE * whole)} of a node's memory on the way. The actors that score with the reference and
   sample hold it whole as well. Up to {MACHINE.memory * 0.8 / 2e9:.0f} billion parameters start on such GPUs; loading in parts is **not built**.
2. **The rows' index in every worker**: {index / ROWS:.0f} bytes a row, {_bytes(index)} a worker, {_bytes(PER_NODE * index)} a node of {PER_NODE}. It fits {_bytes(NODE_MEMORY)};
   at {ROWS * NODE_MEMORY / (PER_NODE * index):.1e} rows it no longer does. (Sharing it between the workers of a node would divide it by {PER_NODE}.)
3. **One reader at the start**: `prepare` reads and hashes all sources in the driver before the actors begin: {plan_seconds / 3600:.1f} h at
   {MEASURED["read"] / 1e9:.0f} GB/s. Checksums of finished caches, {_bytes(caches)}, are compared at each start of a driver: {caches / STORAGE_RATE / 60:.0f} min
   if it reached the storage's whole speed, {caches / MEASURED["read"] / 3600:.1f} h at one reader's.
4. **The order of an epoch**: {order_seconds / 60:.0f} min in each worker at its start ({1e6 * MEASURED["order"]:.2f} µs a row on one core), {_bytes(4 * ROWS)}.
5. **ZeRO-3's traffic**, see above: not a limit of size but of price."""


def _checks() -> str:
    return f"""## How the formulas were checked

{_table(["compared with the real thing in tests/test_estimate.py", "agreement asked for"], CHECKED)}

Measured on two cores with other load beside: {1e6 * MEASURED["order"]:.2f} µs a row for an epoch's order at ten million rows
(`python -m benchmarks.scaling_estimates --measure`). Taken as assumptions, not measured here: utilisation, network, storage and prices, the
{MEASURED["read"] / 1e9:.0f} GB/s of one reader, the {1000 * MEASURED["item"]:.0f} ms of an item."""


# ------------------------------------------------------------------------------------------------ numbers as text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            scaled = value / size
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return _scaled(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _count(value: float) -> str:
    return _scaled(value, ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))) if value >= 1e6 else f"{value:,.0f}"


# ------------------------------------------------------------------------------------------------------ measure


def measure(sizes: Sequence[int] = (10**6, 10**7)) -> dict[str, float]:
    """Seconds a row of `step_rows`, by number of rows."""
    found = {}
    for rows in sizes:
        lengths = np.random.default_rng(0).integers(100, 900, rows).astype(np.int32)
        started = time.perf_counter()
        order.step_rows(lengths, 0, 0, 128)
        found[f"{rows:,} rows"] = (time.perf_counter() - started) / rows
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the document, write it, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--measure", action="store_true", help="seconds a row of an epoch's order on this machine")
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(), indent=1))
    elif options.write:
        FILE.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
