"""Writes a workload's models and the cached reference log-probs: `python -m benchmarks.throughput.materials TASK PRECISION…`.

The policy is the reference with a little noise on its matrices, so that no loss is ln 2. It runs in a process of its own,
before the race: neither its time nor its memory is anybody's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.throughput.ours import as_row
from benchmarks.throughput.tasks import Task
from benchmarks.throughput.workloads import Entry, Llama
from pipeline.collate import collate
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import load_policy
from pipeline.model_files import locate
from pipeline.order import micro_batches
from pipeline.pretrained import load_causal_lm
from pipeline.trunk import pads

NOISE = 0.02
"""Standard deviation of what is added to a matrix, as a share of its own root mean square."""


def write_models(task: Task) -> None:
    """Folders `reference` and `policy` of float32 weights."""
    model = _reference(task)
    model.save_pretrained(task.reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                scale = NOISE * parameter.square().mean().sqrt()
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(task.policy)


def _reference(task: Task) -> torch.nn.Module:
    shape = task.workload.model
    if not isinstance(shape, Llama):
        cache = Path(task.folder).parent / "cache"
        return load_causal_lm(locate(shape, cache), torch.float32)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=2048,
        initializer_range=shape.spread,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(settings)


@torch.inference_mode()
def write_reference_logprobs(task: Task) -> None:
    """Per-token log-probs (and hidden states, where they are read) of all rows under the reference, in the entry's precision, as the
    pipeline's own stage has them."""
    settings = ModelConfig(path=task.reference, dtype=task.entry.precision)
    policy = load_policy(settings, task.reference, keep_states=task.has_states).eval()
    found, states = [], {}
    for step, groups in enumerate(task.groups()):
        rows = [as_row(i, group) for i, group in enumerate(groups)]
        lengths = np.array([row.tokens for row in rows])
        padded = pads(policy.layout)
        scored: dict[int, list[list[float]]] = {}
        for micro in micro_batches(range(len(rows)), lengths, 1, task.workload.token_budget, padded)[0]:
            out = policy(collate([rows[i] for i in micro.rows]))
            for i, logprobs in zip(micro.rows, out.logprobs, strict=True):
                scored[i] = [logprobs[k, : len(r)].tolist() for k, r in enumerate(rows[i].response_ids)]
            if out.states is not None:
                own = [sum(map(len, rows[i].response_ids)) for i in micro.rows]
                states |= {f"{step}/{i}": s.clone() for i, s in zip(micro.rows, out.states.split(own), strict=True)}
        found.append([scored[i] for i in range(len(rows))])
    task.reference_logprobs.write_text(json.dumps(found))
    if states:
        save_file(states, task.reference_states)


def main() -> int:
    """Errors that a user can mend are one line on stderr and exit status 2."""
    task, precisions = Task.parse(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(task.threads)
    try:
        write_models(task)
        for precision in precisions:
            entry: Entry = next(e for e in task.workload.entries if e.contender == "ours" and e.precision == precision)
            write_reference_logprobs(replace(task, entry_name=entry.name))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
