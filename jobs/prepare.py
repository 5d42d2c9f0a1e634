"""Tokenise the records of a configuration and score them with the reference; prints where they are."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HELP = "Read, validate, tokenise and (where the objective asks for it) score records with the reference. Cached."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would happen, write nothing")


def needs_ray(options: argparse.Namespace) -> bool:
    return not options.dry_run


def run(config: RunConfig, options: argparse.Namespace) -> None:
    if options.dry_run:
        from jobs.preview import preview

        print(preview(config))
        return
    from pipeline import data, driver

    prepared = driver.prepare(config, options.local)
    print(describe(data.summary(prepared.rows)))
    print(f"rows       {prepared.rows}")
    if prepared.reference is not None:
        print(f"reference  {prepared.reference}")


def describe(found) -> str:
    """A rows summary for people."""
    lines = [f"records    {found.records:,} read, {found.rows:,} usable, {found.quarantined:,} quarantined"]
    lines += [f"             {count:,} × {reason}" for reason, count in found.reasons.items()]
    if found.prompts_cut or found.responses_cut:
        lines.append(f"cut        {found.prompts_cut:,} prompts (left), {found.responses_cut:,} responses (right)")
    lines.append(f"responses  {found.responses:,}")
    if found.mean_return is not None:
        lines[-1] += f", mean return {found.mean_return:.4f}"
    notes = {
        "say the same as another one of their prompt": found.repeated,
        "tokens of the environment (context only)": found.environment_tokens,
        "rows with all log-probs of the policy that made them": found.behaviour,
        "rows with a response to another prompt beside them": found.mismatched,
        "rows with steps to choose from before the last one": found.stepped,
    }
    lines += [f"             {count:,} {what}" for what, count in notes.items() if count]
    return "\n".join([*lines, f"tokens     {found.tokens:,}"])


if __name__ == "__main__":
    from jobs import prepare
    from jobs.cli import run_job

    sys.exit(run_job(prepare))
