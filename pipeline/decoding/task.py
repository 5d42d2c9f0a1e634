"""The driver's side of `jobs.decode`: what there is to do, under which name, and what came of it.

Everything that can be known to fail is found here, before an actor starts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import cluster, driver, preflight
from pipeline.config import ConfigError, RunConfig, digest
from pipeline.decoding import DECODERS
from pipeline.decoding.contract import SCORER_FAILED, Decoder, Role, context_of
from pipeline.decoding.loading import KEYS, check_scorers, named_models, weights
from pipeline.decoding.output import FACTS, Pieces, check_output
from pipeline.decoding.pieces import Piece, check_room, pieces_of_rows, pieces_of_source
from pipeline.decoding.transfer_q import check_indirect
from pipeline.decoding.vllm_engine import choose
from pipeline.durable import read_json, recall_json, write_json
from pipeline.export import intact, weights_of
from pipeline.model_files import fingerprint
from pipeline.pretrained import load_config, precision
from pipeline.rows import Rows
from pipeline.sources import plan
from pipeline.thinker import check_thoughts, thoughts_of

_MEANING: dict[str, set[str]] = {
    "sampling": {"output", "batch_size"},
    "decoding": {"rows_per_piece", "engine_memory"},
    "data": {"sources", "eval_sources"},
    "evaluation": {"evaluators", "against", "bins", "samples_shown", "credit_rows", "planted"},
}
"""Sections that change what is decoded, less the keys that do not."""


@dataclass(frozen=True, slots=True)
class DecodingTask:
    """One call of `jobs.decode`."""

    config: RunConfig
    weights: dict[str, str]  # by role
    tokenizer: str
    pieces: list[Piece]
    files: Pieces
    output: Path
    identity: str

    @property
    def quarantine(self) -> Path:
        """Where refused rows go."""
        return self.output.with_name(f"{self.output.stem}.quarantine.jsonl")

    @property
    def _description(self) -> Path:
        return self.output.with_name(f"{self.output.name}.json")

    def arguments(self) -> dict[str, Any]:
        """What the actors are built from."""
        return {
            "config": self.config.dump(),
            "weights": self.weights,
            "tokenizer": self.tokenizer,
            "folder": str(self.files.folder),
        }

    def finished(self) -> bool:
        """Whether the output is there, this very task made it, and no scorer failed on the way."""
        if not self.output.exists():
            return False
        told = recall_json(self._description, _checked)
        return told is not None and told["identity"] == self.identity and not told["unscored"]

    def facts(self) -> dict[str, float]:
        """Totals of the finished output: rows, tokens, refused, seconds of all actors, scores."""
        told = read_json(self._description, _checked, "delete it, then the same command decodes again")
        return {name: value for name, value in told.items() if name not in ("identity",)}

    def finish(self) -> dict[str, float]:
        """Join the pieces into the output; their totals."""
        facts = self.files.facts(len(self.pieces))
        self.files.assemble(len(self.pieces), self.output, self.quarantine)
        write_json(self._description, {"identity": self.identity, "method": self.config.decoding.method, **facts})
        if not facts["unscored"]:
            self.files.discard()
        return facts

    def first_unscored(self) -> str:
        """Where a scorer failed first, and why."""
        with self.quarantine.open(encoding="utf-8") as lines:
            found = next(line for line in map(json.loads, lines) if SCORER_FAILED in line["reason"])
        return f"{found['source']}: {found['reason']}"


def plan_task(config: RunConfig, local: bool) -> DecodingTask:
    """Check everything, find the weights and cut the prompts into pieces. Raises ConfigError."""
    decoder = _decoder(config)
    check_scorers(config, decoder.needs)
    for key, path in named_models(config).items():
        preflight.check_model(config, path, key, tokenizer=True)
    world = _world(config, local)
    roles: set[Role] = (set(decoder.needs) - {"scorer"}) | set(config.decoding.logprobs)
    found = weights(config, roles, world.policy, world.reference, world.tokenizer)
    check_thoughts(config.sampling, list(found.values()))
    engine = {"engine": choose(config, local, thoughts_of(found.get("policy", ""), config.sampling))}
    config = config.model_copy(update={"decoding": config.decoding.model_copy(update=engine)})
    for role, path in found.items():
        settings = load_config(path, config.model.trust_remote_code, KEYS[role])
        check_room(config, context_of(settings, thoughts_of(path, config.sampling)))
    pieces, content = _prompts(config, world)
    identity = _identity(config, found, content, world.tokenizer)
    default = world.folder / f"{config.decoding.method}-{identity}.jsonl"
    output = Path(config.sampling.output or default).expanduser().absolute()
    check_output(output)
    files = Pieces(output.with_name(f".{output.name}.{identity}-{config.decoding.rows_per_piece}.pieces"))
    return DecodingTask(config, found, world.tokenizer, pieces, files, output, identity)


def _checked(told: Any) -> dict[str, Any]:
    """What `DecodingTask.finish` wrote."""
    told = {"unscored": 0} | told  # which earlier versions did not count
    return {"identity": str(told["identity"]), **{name: float(told[name]) for name in FACTS}}


class _World(NamedTuple):
    """What the configuration's own run has."""

    policy: str  # as a person writes it
    reference: str  # located
    tokenizer: str  # located
    folder: Path  # of the output, where none is named
    rows: Path | None


def _world(config: RunConfig, local: bool) -> _World:
    """Rows are tokenised only where their prompts are asked for, and nothing is scored; a run of one's own is found by its name."""
    if config.checkpoint_from is None or config.sampling.prompts is None:
        if config.checkpoint_from is None:
            driver.check_trained(config)
        prepared = driver.prepare(config, local, work="rows" if config.sampling.prompts is None else "names")
        own, _ = (driver.run_of if config.checkpoint_from else driver.trained_run)(config, prepared)
        folder = own if own.is_dir() else Path(config.storage) / "decoded"
        return _World(config.checkpoint_from or str(own), prepared.frozen, prepared.model, folder, prepared.rows)
    preflight.check(config, local)
    cache, own = Path(config.storage) / "cache", config.model
    tokenizer = intact(own.path, cache, "model.path", own.trust_remote_code)
    reference = intact(own.reference, cache, "model.reference", own.trust_remote_code) if own.reference else tokenizer
    if not local:
        cluster.connect(config)
    return _World(config.checkpoint_from, reference, tokenizer, Path(config.storage) / "decoded", None)


def _prompts(config: RunConfig, world: _World) -> tuple[list[Piece], str]:
    """Pieces, and a hash of what they hold. Raises ConfigError where there are none."""
    size, limit, prompts = config.decoding.rows_per_piece, config.sampling.limit, config.sampling.prompts
    if prompts is not None:
        work, bound = Path(config.storage) / "cache" / "sources", config.data.max_record_bytes
        planned = plan([prompts], work, key="sampling.prompts", max_record_bytes=bound)
        pieces, content = pieces_of_source(planned, size, limit), planned.fingerprint
    else:
        assert world.rows is not None
        split = Rows(world.rows).split(config.data, config.seed)
        positions = (split.eval if len(split.eval) else split.train).tolist()
        pieces, content = pieces_of_rows(world.rows, positions, size, limit), world.rows.name
    if not pieces:
        raise ConfigError("sampling.prompts: there is no record; name a file with prompts")
    return pieces, content


def _decoder(config: RunConfig) -> Decoder:
    options = config.decoding
    if options.method not in DECODERS:
        raise ConfigError(f"decoding.method: no {options.method!r}; choose one of {', '.join(DECODERS)}")
    if options.method == "beam" and config.sampling.per_prompt > options.beams:
        raise ConfigError(
            f"sampling.per_prompt: {options.beams} beams find no {config.sampling.per_prompt} responses; raise decoding.beams"
        )
    if options.method == "transfer_q" and options.baseline_scorer is not None:
        beta = options.beta or getattr(config.objective, "beta", None)
        check_indirect(options.rollouts, options.rollout_temperature, beta)
    return DECODERS[options.method]


def _identity(config: RunConfig, found: dict[str, str], content: str, tokenizer: str) -> str:
    """Hash of what changes the output: not of batches, workers or places."""
    cache = Path(config.storage) / "cache"
    plain = config.dump()
    sections = {
        name: {key: value for key, value in plain[name].items() if key not in left_out}
        for name, left_out in _MEANING.items()
    }
    prints = {role: fingerprint(path, cache, KEYS[role]) for role, path in found.items()}  # type: ignore[index]
    classifiers = [
        fingerprint(weights_of(name.partition(":")[2], cache, "sampling.scorer", config.model.trust_remote_code), cache)
        for name in (config.sampling.scorer, config.decoding.baseline_scorer)
        if name is not None and name.startswith("classifier:")
    ]
    dtype = str(precision(config.model.dtype))
    beta = getattr(config.objective, "beta", None)
    return digest(1, sections, prints, content, fingerprint(tokenizer, cache), classifiers, dtype, beta)


def describe(facts: dict[str, float]) -> dict[str, str]:
    """The few numbers that a person wants to see."""
    shown = {"completions": f"{facts['rows']:.0f}", "tokens": f"{facts['tokens']:.0f}"}
    if facts["seconds"]:
        shown["tokens/s per actor"] = f"{facts['tokens'] / facts['seconds']:.1f}"
    if facts["scored"]:
        count, mean = facts["scored"], facts["score"] / facts["scored"]
        variance = max(0.0, facts["score_squared"] / count - mean**2)
        shown["score"] = f"{mean:.4f} ± {math.sqrt(variance / count):.4f}"
    return shown
