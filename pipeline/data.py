"""Records → tokenised rows on disk: read, validate or quarantine, render, tokenise, write.

`prepare` cuts the sources into chunks, gives each chunk to an actor (Ray Data) that writes one part of rows and one of
quarantined records, and declares the folder finished when every record is accounted for. The folder's name is a hash of
everything that shapes a row, so a finished one is reused and a changed input gets its own.

Left out: reference log-probs (`reference`), the order of training (`order`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.chat import Chat
from pipeline.config import DataConfig, RunConfig, digest
from pipeline.contracts import ROW_SCHEMA
from pipeline.durable import clear_leftovers, digest_file, recall_json, replacing, write_json
from pipeline.errors import UserError
from pipeline.layouts import parse
from pipeline.pretrained import load_tokenizer
from pipeline.records import Dialogue, Record
from pipeline.redaction import redacted
from pipeline.rendering import Renderer
from pipeline.rows import MANIFEST, StaleCache, finish, is_finished, manifest, part_of, write_tables
from pipeline.sources import Chunk, RawRecord, plan, read
from pipeline.stage import Item, Resources, run_stage

SHOWN = 200
"""Letters of a list of columns in a message."""
QUARANTINE = "quarantine.jsonl"
COUNTED = (
    "prompts_cut",
    "responses_cut",
    "tokens",
    "responses",
    "environment_tokens",
    "repeated",
    "behaviour",
    "mismatched",
    "stepped",
)
"""Fields of `Summary` that add up over chunks."""
CHUNK_BYTES = 4 * 2**20
"""Input of one part: some seconds of tokenising, so that actors share the work evenly."""
BATCH_TOKENS, BATCH_RECORDS = 4 * 2**20, 2**17
"""What is held in memory of a part before it is written: as much as its input makes, where that could be cut to size."""


class DataError(UserError, ValueError):
    """Too many records are unusable, or none is left."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the records; also the `summary` of the rows' manifest."""

    records: int
    rows: int
    quarantined: int
    reasons: dict[str, int]  # reason → records, most frequent first
    mean_return: float | None  # over the responses; None: the kind has no rewards
    prompts_cut: int  # rows whose prompt lost tokens on the left
    responses_cut: int  # responses that lost tokens on the right
    tokens: int
    responses: int  # of all rows; mismatched ones do not count
    environment_tokens: int  # tokens of responses that are context, never trained on
    repeated: int  # responses that say the same as a better or an earlier one of their row
    behaviour: int  # rows whose responses all have log-probs under the policy that made them
    mismatched: int  # rows that got a response to another prompt
    stepped: int  # rows whose best response has steps to choose from before its last one: three of the policy's or more


class PrepareChunk:
    """The actor: one chunk of records → one part of rows, one of quarantined records, and counts."""

    def __init__(
        self, folder: str, data: dict[str, Any], model: str, trust_remote_code: bool, mismatched: bool
    ) -> None:
        self.folder = Path(folder)
        self.data = DataConfig.model_validate(data)
        self.render = Renderer(load_tokenizer(model, trust_remote_code), self.data)
        self.mismatched = mismatched

    def __call__(self, item: Item) -> Item:
        number = item["number"]
        counts, part = self.folder / f"counts-{number:06d}.json", part_of(self.folder, number)
        known = recall_json(counts, _checked_counts)  # written last: an earlier, interrupted call finished this chunk
        if known is not None and part.is_file() and known["part"] == digest_file(part):
            return known
        rows, bad, tally = 0, Counter[str](), Counter[str]()
        with (
            replacing(self.folder / f"quarantine-{number:06d}.jsonl") as aside,
            aside.open("w", encoding="utf-8") as quarantine,
        ):

            def tables() -> Iterator[pa.Table]:
                nonlocal rows
                for made in batches(Chunk(**item["chunk"]), self.render, self.mismatched):
                    rows += len(made.rows)
                    bad.update(entry["reason"] for entry in made.bad)
                    tally.update(made.tally)
                    quarantine.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in redacted(made.bad))
                    yield pa.Table.from_pylist(made.rows, schema=ROW_SCHEMA)

            part = write_tables(self.folder, number, tables(), ROW_SCHEMA)
        result = {"part": digest_file(part), "rows": rows, "bad": dict(bad), "tally": dict(tally)}
        write_json(counts, result)
        return result


def _checked_counts(known: Any) -> dict[str, Any]:
    """The counts of a chunk as `summarise` reads them; raises what `durable.read_json` takes for damage."""
    numbers = [known["rows"], *known["bad"].values(), *known["tally"].values()]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("counts are numbers")
    return {"part": str(known["part"]), "rows": known["rows"], "bad": known["bad"], "tally": known["tally"]}


@dataclass(frozen=True, slots=True)
class Made:
    """What became of the records of one chunk."""

    rows: list[dict[str, Any]]  # of `ROW_SCHEMA`
    bad: list[dict[str, str]]  # source, reason and excerpt of the record
    tally: Counter[str]  # what `Summary` adds up

    def counts(self) -> dict[str, Any]:
        """Plain JSON: what `summarise` needs."""
        reasons = Counter(entry["reason"] for entry in self.bad)
        return {"rows": len(self.rows), "bad": dict(reasons), "tally": dict(self.tally)}


def make_rows(chunk: Chunk, render: Renderer, mismatched: bool, most: int | None = None) -> Made:
    """The first batch of a chunk, of `most` records at most; what cannot be used is kept with its reason."""
    return _make(islice(read(chunk), most), chunk.source_index, render, mismatched)


def batches(chunk: Chunk, render: Renderer, mismatched: bool) -> Iterator[Made]:
    """Read, validate, render and tokenise a chunk. Most are one batch, but a compressed file cannot be cut, whatever it unpacks to."""
    records = read(chunk)
    yield _make(records, chunk.source_index, render, mismatched)
    for first in records:
        yield _make(chain([first], records), chunk.source_index, render, mismatched)


def _make(records: Iterator[RawRecord], source_index: int, render: Renderer, mismatched: bool) -> Made:
    """Rows of the next records, until there are enough for a batch."""
    made, tokens = Made([], [], Counter()), 0
    for raw in records:
        try:
            row = _row(raw, source_index, render, made.tally)
            tokens += len(row["prompt_ids"]) + sum(map(len, row["response_ids"]))
            made.rows.append(row)
        except ValueError as error:
            made.bad.append({"source": raw.source, "reason": str(error), "record": raw.raw})
        if tokens >= BATCH_TOKENS or len(made.rows) + len(made.bad) >= BATCH_RECORDS:
            break
    if mismatched:
        made.tally["mismatched"] = mismatch(made.rows, render.data.max_length)
    made.tally["tokens"] = sum(len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in made.rows)
    return made


def _row(raw: RawRecord, source_index: int, render: Renderer, tally: Counter[str]) -> dict[str, Any]:
    record = parse(raw.content(), render.data.kind, render.data.ties)
    rendered = render(record)
    responses, logged = rendered.response_ids, rendered.behaviour_logprobs
    tally["prompts_cut"] += rendered.prompt_tokens_cut > 0
    tally["responses_cut"] += rendered.responses_cut
    tally["responses"] += len(responses)
    tally["repeated"] += len(responses) - len(set(map(tuple, responses)))
    tally["environment_tokens"] += sum(response.count(False) for response in rendered.trained or ())
    tally["behaviour"] += logged is not None and None not in logged
    tally["stepped"] += rendered.policy_steps > 2
    if rendered.token_rewards is not None:
        tally["rewarded"] += len(responses)
        tally["return"] += sum(map(sum, rendered.token_rewards))
    return {
        "row_id": raw.row_id,
        "source": raw.source,
        "source_index": source_index,
        "prompt_hash": prompt_hash(record),
        "prompt_ids": rendered.prompt_ids,
        "response_ids": responses,
        "weight": record.weight,
        "trained": rendered.trained,
        "token_rewards": rendered.token_rewards,
        "behaviour_logprobs": logged,
        "step_ends": rendered.step_ends,
        "mismatched": False,
    }


def mismatch(rows: list[dict[str, Any]], max_length: int) -> int:
    """Put behind each row's responses the first one of the next row, in a circle, that has another prompt.

    It is cut on the right to fit `max_length`. A row without such a partner stays as it is. Returns how many got one.
    """
    first = [row["response_ids"][0] for row in rows]
    # The next row of another prompt is the same for all rows of a run of equal prompts: one pass backwards, twice round.
    partner, found = [-1] * len(rows), -1
    for i in reversed(range(2 * len(rows))):
        here, after = rows[i % len(rows)]["prompt_hash"], (i + 1) % len(rows)
        if rows[after]["prompt_hash"] != here:
            found = after
        partner[i % len(rows)] = found
    for row, other in zip(rows, partner, strict=True):
        if other < 0:
            continue
        response = first[other][: max_length - len(row["prompt_ids"])]
        row["response_ids"].append(response)
        row["mismatched"] = True
        fillers = {"trained": [True] * len(response), "token_rewards": [0.0] * len(response), "step_ends": []}
        for column, filler in fillers.items():
            if row[column] is not None:
                row[column].append(filler)
        if row["behaviour_logprobs"] is not None:
            row["behaviour_logprobs"].append(None)
    return sum(row["mismatched"] for row in rows)


def prompt_hash(record: Record) -> int:
    """A signed 64-bit hash of a record's whole prompt, the same on every machine (truncation cannot make prompts differ)."""
    prompt = record.prompt if isinstance(record.prompt, str) else _told(record.prompt)
    raw = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big", signed=True)


def _told(dialogue: Dialogue) -> Any:
    """Everything that a dialogue says, as JSON."""
    turns = [[turn.role, turn.content, *([turn.beside] if turn.beside else [])] for turn in dialogue]
    rest = {"tools": dialogue.tools, "options": dialogue.options, "continued": dialogue.continued}
    return {"turns": turns, **rest} if any(rest.values()) else turns


def prepare(config: RunConfig, model: str, local: bool = False) -> Path:
    """Rows of `config.data`, tokenised with the tokenizer at `model`; returns their finished folder.

    Raises ConfigError when a source cannot be found (before any cluster work), DataError when too many records are bad.
    """
    folder, chunks = _planned(config, model)
    if not _is_whole(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        _write(config, chunks, folder, model, local)
    refuse(config.data, summary(folder), f"see {folder / QUARANTINE}", chunks)
    return folder


def folder_of(config: RunConfig, model: str) -> Path:
    """Where `prepare` writes the rows, or would: sources are looked at, and nothing is tokenised."""
    return _planned(config, model)[0]


def _planned(config: RunConfig, model: str) -> tuple[Path, list[Chunk]]:
    """The rows' folder, and what they are made of."""
    cache = Path(config.storage) / "cache"
    bound = config.data.max_record_bytes
    limit = config.data.limit
    train = plan(config.data.sources, cache / "sources", chunk_bytes=CHUNK_BYTES, max_record_bytes=bound, limit=limit)
    held_out = plan(
        config.data.eval_sources,
        cache / "sources",
        first_source_index=len(config.data.sources),
        chunk_bytes=CHUNK_BYTES,
        first_record=train.records,
        key="data.eval_sources",
        max_record_bytes=bound,
        limit=limit,
    )
    tokenizer = load_tokenizer(model, config.model.trust_remote_code)
    contents = [train.fingerprint, held_out.fingerprint]
    shaping = [contents, _shaping(config), tokenizer_identity(tokenizer)]
    if Chat(tokenizer, config.data.chat_template).exists:
        shaping.append({"chats": 2})  # how they are written has changed since the rows of texts have
    return cache / f"rows-{digest(5, *shaping)}", train.chunks + held_out.chunks


def _write(config: RunConfig, chunks: list[Chunk], folder: Path, model: str, local: bool) -> None:
    items = [{"number": i, "chunk": asdict(chunk)} for i, chunk in enumerate(chunks)]
    results = list(
        run_stage(
            PrepareChunk,
            {
                "folder": str(folder),
                "data": config.data.model_dump(mode="json"),
                "model": model,
                "trust_remote_code": config.model.trust_remote_code,
                "mismatched": config.objective.needed().mismatched,
            },
            items,
            label="tokenise",
            resources=Resources(actors=config.scaling.data_actors),
            local=local,
            unit="chunk",
        )
    )
    with replacing(folder / QUARANTINE) as aside, aside.open("wb") as whole:
        for number in range(len(chunks)):
            with (folder / f"quarantine-{number:06d}.jsonl").open("rb") as stream:
                shutil.copyfileobj(stream, whole)
    found = summarise(results)
    assert found.records == sum(chunk.records for chunk in chunks), "a record is unaccounted for"
    finish(folder, range(len(chunks)), {"summary": asdict(found)})


def summarise(chunks: list[dict[str, Any]]) -> Summary:
    """Add up the counts of all chunks (`Made.counts`)."""
    reasons, tally = Counter[str](), Counter[str]()
    for chunk in chunks:
        reasons.update(chunk["bad"])
        tally.update(chunk["tally"])
    rows, bad = sum(chunk["rows"] for chunk in chunks), sum(reasons.values())
    mean = tally["return"] / tally["rewarded"] if tally["rewarded"] else None
    return Summary(
        records=rows + bad,
        rows=rows,
        quarantined=bad,
        reasons=dict(reasons.most_common()),
        mean_return=mean,
        **{name: int(tally[name]) for name in COUNTED},
    )


def summary(folder: Path) -> Summary:
    """The summary of a finished rows folder. Raises rows.StaleCache."""
    try:
        return Summary(**manifest(folder)["summary"])
    except (KeyError, TypeError):
        raise StaleCache(f"{folder / MANIFEST}: damaged; delete {folder} and run `qalign prepare` again") from None


def _is_whole(folder: Path) -> bool:
    """Whether the folder is finished, and says of what."""
    try:
        summary(folder)
    except StaleCache:
        return False
    return is_finished(folder)


def refuse(data: DataConfig, found: Summary, hint: str, chunks: Sequence[Chunk] = ()) -> None:
    """Raises DataError when too much was quarantined, or nothing is left. chunks: whose records to look at for what they have."""
    why = "; ".join(f"{count} × {reason}" for reason, count in list(found.reasons.items())[:3])
    if why.partition("× ")[2].startswith(("missing field", "column ")):
        first = next((raw.value for chunk in chunks for raw in read(chunk) if raw.value is not None), None)
        why += f"; the first record's columns are {', '.join(sorted(first))[:SHOWN]}" if first else ""
    if found.rows == 0:
        raise DataError(
            f"data.sources: no usable record among {found.records} ({why or 'the files are empty'}); {hint}"
        )
    share = found.quarantined / found.records
    if share > data.max_bad_fraction:
        raise DataError(
            f"data.max_bad_fraction: {found.quarantined} of {found.records} records ({share:.1%}) are unusable, more than "
            f"{data.max_bad_fraction:.1%} ({why}); mend them ({hint}) or raise the bound"
        )


def _shaping(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that changes rows (mixing, splitting and bounds on errors do not)."""
    keys = (
        "kind",
        "max_length",
        "max_prompt_length",
        "min_prompt_length",
        "prompt_template",
        "chat_template",
        "append_eos",
        "ties",
    )
    shaping = {key: getattr(config.data, key) for key in keys}
    return shaping | {"mismatched": config.objective.needed().mismatched}


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash of what a tokenizer does, wherever its files lie."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return digest(rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), tokenizer.padding_side)
