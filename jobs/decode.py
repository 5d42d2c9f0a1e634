"""Sample from a checkpoint: prompts in, one JSON line per completion out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from pipeline.config import RunConfig

HELP = "Sample completions (sampling.*) from a checkpoint, run or model (checkpoint_from=…) into a jsonl file."


def run(config: RunConfig, options: argparse.Namespace) -> None:
    from pipeline import driver
    from pipeline.evaluation.samples import draw
    from pipeline.export import weights_of
    from pipeline.prompts import read_prompts

    prepared = driver.prepare(config, options.local)
    own, _ = driver.open_run(config, prepared)
    weights = weights_of(config.checkpoint_from or str(own), Path(config.storage) / "cache")
    prompts = read_prompts(config, prepared)
    samples = draw(config, weights, prompts.ids, prompts.texts, prompts.stop_ids, options.local)
    output = Path(config.sampling.output or own / "samples.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for i, group in enumerate(samples.completions):
            for j, completion in enumerate(group):
                line = {"prompt_text": samples.texts[i], **completion}
                if samples.scores is not None:
                    line["score"] = None if np.isnan(samples.scores[i, j]) else float(samples.scores[i, j])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for refused in prompts.refused:
        print(f"not used: {refused['source']}: {refused['reason']}", file=sys.stderr)
    for name, value in samples.metrics().items():
        print(f"{name:18} {value:.4f}")
    print(f"written            {output}")


if __name__ == "__main__":
    from jobs import decode
    from jobs.cli import run_job

    sys.exit(run_job(decode))
