"""What a run of any size needs, as formulas: bytes on disk, memory of workers, arithmetic, time, money.

Each is compared with the real thing at a small size (tests/test_estimate.py). `--dry-run` and docs/scaling.md are made from them.
Left out: how fast a machine is and what it costs, which callers say (`Machine`), and everything about the data's content.

Symbols: P prompt tokens, K responses of R tokens each, T = P + K·R tokens of a packed row, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_BYTES = 4
"""From stage 1 on gradients are added up, and reduced, in float32 whatever the weights are."""
MOMENT_BYTES = 8
"""Adam's two moments, float32."""


@dataclass(frozen=True, slots=True)
class RowSize:
    """An average prepared row."""

    prompt: int  # tokens P
    response: int  # tokens R of one response
    responses: int = 2  # K
    label: int = 20  # bytes of "file:line"

    @property
    def answered(self) -> int:
        """Tokens of all responses."""
        return self.responses * self.response

    @property
    def tokens(self) -> int:
        """T of the packed row, in which the prompt stands once."""
        return self.prompt + self.answered


@dataclass(frozen=True, slots=True)
class Network:
    """A decoder-only transformer."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    tied: bool = False  # one matrix for embedding and output head

    @property
    def inner(self) -> int:
        """Parameters that each token is multiplied with: all but embedding and head."""
        return self.parameters - (1 if self.tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU and what is around it."""

    name: str
    memory: int  # bytes
    flops: float  # dense bfloat16 peak, per second
    utilisation: float  # share of the peak that training reaches
    dollars: float  # an hour
    network: float  # bytes per second between nodes, one GPU's share


# ------------------------------------------------------------------------------------------------ on disk


def row_bytes(row: RowSize) -> float:
    """A preference row of `ROW_SCHEMA` in its Arrow part: token ids of 4 bytes, list offsets, and 47 bytes of fixed columns."""
    fixed = 8 + 2 + 8 + 4 + 1 / 8  # row_id, source_index, prompt_hash, weight, mismatched
    empty = 3 * (4 + 1 / 8)  # trained, token_rewards, behaviour_logprobs: an offset and a validity bit each
    lists = 4 + 4 + 4 + 4 * row.responses  # offsets of source, prompt_ids and response_ids
    return fixed + empty + lists + row.label + 4 * row.tokens


def reference_bytes(row: RowSize) -> float:
    """Its log-probs in the reference cache: float32 per response token, offsets, row_id."""
    return 8 + 4 + 4 * row.responses + 4 * row.answered


def checkpoint_bytes(trained: int) -> int:
    """Weights and moments, float32, whatever the stage and the number of workers."""
    return (4 + MOMENT_BYTES) * trained


def export_bytes(parameters: int, dtype_bytes: int = 2) -> int:
    """Safetensors that transformers loads."""
    return parameters * dtype_bytes


# ------------------------------------------------------------------------------------------------ memory


def state_bytes(
    parameters: int,
    trained: int,
    dtype_bytes: int,
    stage: int,
    workers: int,
    offload: bool = False,
) -> dict[str, float]:
    """What one worker holds on its device while gradients add up, by part (ZeRO, arXiv 1910.02054 §3, as DeepSpeed does it).

    From stage 1 on the optimizer's part has float32 master weights beside the moments, in float32 training as well; offloaded, it lies
    in the host's memory. Buckets, in which gradients are reduced, are bounded (`zero.BUCKET_NUMEL`) and left out.
    """
    # In float32 DeepSpeed shares gradients out at stage 1 already, bucket by bucket.
    shares = (("optimizer", 1), ("gradients", 1 if dtype_bytes == 4 else 2), ("weights", 3))
    share = {part: workers if stage >= least else 1 for part, least in shares}
    master = 4 if stage >= 1 or dtype_bytes < 4 else 0
    gradient = dtype_bytes if stage == 0 else GRADIENT_BYTES
    return {
        "weights": parameters * dtype_bytes / share["weights"],
        "gradients": trained * gradient / share["gradients"],
        "optimizer": 0.0 if offload else trained * (MOMENT_BYTES + master) / share["optimizer"],
    }


def index_bytes(rows: int, reference: bool = True) -> int:
    """What each worker keeps of all rows beside the mapped files: `rows.Rows`, its split, and an epoch's order."""
    number = 4 if rows < 2**31 else 8
    columns = 8 + 2 + 8 + 4  # row_id, source_index, prompt_hash, length
    copies = 4 + number + number  # lengths of the training rows, their positions, their order
    return rows * (columns + copies + (number if reference else 0))


# ------------------------------------------------------------------------------------------------ arithmetic


def forward_flops(network: Network, row: RowSize) -> float:
    """One forward of a packed row: 2 a parameter and token, the output head on response tokens alone, causal attention.

    Attention: each query meets the keys of its own sequence, prompt and one response; QKᵀ and AV are 2·hidden each a pair and layer.
    The last feed-forward block counts in full, though flat rows compute it where it is read alone (`last_layer`).
    """
    matrices = 2 * network.inner * row.tokens
    head = 2 * network.vocabulary * network.hidden * row.answered
    pairs = row.prompt**2 / 2 + row.responses * (row.response**2 / 2 + row.response * row.prompt)
    return matrices + head + 4 * network.hidden * network.layers * pairs


def training_flops(network: Network, row: RowSize, recompute: bool) -> float:
    """Forward and backward: three forwards, four where layers are computed again."""
    return (4 if recompute else 3) * forward_flops(network, row)


def gpu_hours(flops: float, machine: Machine) -> float:
    """Hours of one GPU."""
    return flops / (machine.flops * machine.utilisation) / 3600


def zero3_seconds(parameters: int, machine: Machine, dtype_bytes: int = 2, passes: int = 3) -> float:
    """Stage 3 gathers all weights in forward and backward and reduces the gradients: that traffic's time per micro-batch."""
    return passes * parameters * dtype_bytes / machine.network
