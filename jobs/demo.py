"""The main job, end to end on real parts: the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, §6.1).

Prefixes of film reviews → 4 completions each by SmolLM2-135M → VADER scores → best and worst become pairs → DPO →
held-out prompts sampled before and after. Weights, samples and rows are cached: a second run starts training at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.sentiment import pairs, review_prefixes
from pipeline.config import RunConfig, digest
from pipeline.config_file import validate
from pipeline.driver import Result, fit
from pipeline.durable import read_json, write_json, write_text
from pipeline.evaluation.samples import Samples, draw, kl_to_reference
from pipeline.report.falling import FALLING, chosen_falls
from pipeline.tracking import Tracker

HELP = __doc__

PROMPTS = {"bfloat16": 160, "float32": 112}
"""Training prompts by precision: what two cores do in eight minutes with a unit for products of bfloat16, and without."""
HELD_OUT = 64
HELD_OUT_COMPLETIONS = 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, help=f"training prompts; default: {PROMPTS} by precision")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"held-out prompts (default {HELD_OUT})")


@dataclass(frozen=True, slots=True)
class Setting:
    """The sampled world that training starts from."""

    config: RunConfig  # with data.sources and data.eval_sources filled in
    model: str
    stop_ids: list[int]  # tokens that end a completion
    before: Samples  # of the held-out prompts
    held_out_pairs: int


def run(config: RunConfig, options: argparse.Namespace) -> None:
    started = time.monotonic()
    setting = prepare(config, options)

    def report(result: Result, tracker: Tracker) -> None:
        table, samples = compare(setting, result, options.local)
        tracker.log_summary({f"demo/{name}": value for name, value in table.items()})
        tracker.log_text(samples, "before_after.txt")
        write_json(result.run / "demo.json", table)
        write_text(result.run / "before_after.txt", samples)

    result = fit(setting.config, options.local, report)
    print((result.run / "before_after.txt").read_text())
    remedy = f"delete {result.run}, then the same command trains again"
    print(show(read_json(result.run / "demo.json", dict[str, float], remedy), setting.held_out_pairs))
    if chosen_falls(result.metrics):
        print(f"\n{FALLING}")
    if result.already_finished:
        print("\nThis run was finished already; its results are shown again.")
    print(f"\nfinished in {time.monotonic() - started:.0f} s")
    print(f"model    {result.export}")
    print(f"mlflow   {result.tracking}")
    print("         look at it: .venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///outputs/mlflow.db")
    print("next     make demo ARGS='objective.beta=0.3'    (a looser or tighter leash, on the same samples)")


def prepare(config: RunConfig, options: argparse.Namespace) -> Setting:
    """Sample and score the prompts; write the pairs as the jsonl files that `fit` reads."""
    from pipeline import cluster
    from pipeline.model_files import locate
    from pipeline.pretrained import load_tokenizer, precision
    from pipeline.rendering import Renderer

    dtype = str(precision(config.model.dtype)).removeprefix("torch.")
    count = options.prompts or PROMPTS[dtype]
    if options.prompts is None and dtype == "float32":
        print(
            f"This processor has no unit for products of bfloat16: float32 and {count} instead of {PROMPTS['bfloat16']} prompts."
        )
    model = locate(config.model.path, Path(config.storage) / "cache")
    if not options.local:
        cluster.connect(config)
    train, held_out = review_prefixes(count, options.held_out, config.seed)
    render = Renderer(load_tokenizer(model), config.data)

    def sampled(texts: list[str], per_prompt: int, seed: int) -> Samples:
        changed = config.sampling.model_copy(update={"per_prompt": per_prompt, "seed": seed})
        ids = [render.prompt_ids(text, config.sampling.max_new_tokens) for text in texts]
        own = config.model_copy(update={"sampling": changed})
        return draw(own, model, ids, texts, sorted(render.stop_ids), options.local)

    world = sampled(train, config.sampling.per_prompt, config.sampling.seed)
    before = sampled(held_out, HELD_OUT_COMPLETIONS, config.sampling.seed + 1)
    train_pairs, held_out_pairs = paired(world), paired(before)
    plain = config.dump()
    plain["data"]["sources"] = [{"path": str(write(config, train_pairs))}]
    if held_out_pairs:
        plain["data"]["eval_sources"] = [{"path": str(write(config, held_out_pairs))}]
    print(
        f"{len(train_pairs)} pairs from {len(train)} prompts; {len(held_out_pairs)} held-out pairs from {len(held_out)}"
    )
    return Setting(validate(plain), model, sorted(render.stop_ids), before, len(held_out_pairs))


def paired(samples: Samples) -> list[dict[str, str]]:
    """Best and worst completion of each prompt, where VADER tells them clearly apart."""
    assert samples.scores is not None
    texts = [[c["text"] for c in group] for group in samples.completions]
    return pairs(samples.texts, texts, samples.scores.tolist())


def write(config: RunConfig, records: list[dict[str, str]]) -> Path:
    """A jsonl file named by its content."""
    path = Path(config.storage) / "demo" / f"pairs-{digest(records)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def compare(setting: Setting, result: Result, local: bool) -> tuple[dict[str, float], str]:
    """Numbers of the table, and a few completions before and after."""
    config, before = setting.config, setting.before
    changed = config.sampling.model_copy(update={"per_prompt": HELD_OUT_COMPLETIONS, "seed": config.sampling.seed + 1})
    config = config.model_copy(update={"sampling": changed})
    after = draw(config, str(result.export), before.prompts, before.texts, setting.stop_ids, local)
    numbers = {f"before/{k.removeprefix('samples/')}": v for k, v in before.metrics().items()}
    numbers |= {f"after/{k.removeprefix('samples/')}": v for k, v in after.metrics().items()}
    kl = kl_to_reference(config, str(result.export), setting.model, after, local)
    numbers |= {f"after/{k.removeprefix('samples/')}": v for k, v in kl.items()}
    numbers |= {"before/kl": 0.0, "before/kl_se": 0.0}
    if "eval/accuracy" in result.metrics:
        # Before training all implied rewards are 0: every pair is a tie, and ties count one half.
        numbers |= {"before/accuracy": 0.5, "after/accuracy": result.metrics["eval/accuracy"]}
    lines = []
    for i in (0, 1, 2):
        if i < len(before.texts):
            lines += [f"» {before.texts[i]}"]
            lines += [
                f"   {when:6} {one_line(s.completions[i][0]['text'])}"
                for when, s in (("before", before), ("after", after))
            ]
    return numbers, "\n".join(lines) + "\n"


def one_line(text: str, width: int = 110) -> str:
    """The beginning of a text on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def show(numbers: dict[str, float], held_out_pairs: int) -> str:
    """The table: before and after, side by side."""

    def cell(when: str, name: str) -> str:
        value, error = numbers.get(f"{when}/{name}"), numbers.get(f"{when}/{name}_se")
        if value is None:
            return "–"
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None and np.isfinite(error) else "")

    rows = [
        ("reward (VADER, −1 … 1) of samples", "reward"),
        ("KL(π‖π_ref) of samples, nats", "kl"),
        ("length of samples, tokens", "length"),
        (f"accuracy on {held_out_pairs} held-out pairs", "accuracy"),
    ]
    lines = [f"{'held-out prompts':36}{'before':>18}{'after':>18}"]
    lines += [f"{label:36}{cell('before', name):>18}{cell('after', name):>18}" for label, name in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    from jobs import demo
    from jobs.cli import run_job

    sys.exit(run_job(demo))
