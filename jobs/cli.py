"""What all jobs share: the command line, and errors as one line.

A job is a module with `HELP`, `run(config, options)` and, for options of its own, `arguments(parser)`. Where it can do without Ray,
`needs_ray(options)` tells whether it will need it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from pipeline.heap import HUGE_PAGES

JOBS = {
    "demo": "the main job end to end, on data and a model that ship as packages",
    "prepare": "tokenise records and score them with the reference",
    "train": "align a model: prepare, train, export, track",
    "eval": "loss, accuracy, margins, sampled reward and KL of a checkpoint",
    "decode": "complete prompts: sampling, search, value-guided",
    "sweep": "many runs with other settings, on workers that stay warm; the best model",
    "export": "a checkpoint as a folder that transformers loads",
}

EPILOG = """examples:
  qalign train jobs/configs/dpo.yaml objective.beta=0.3 scaling.workers=2
  qalign train jobs/configs/dpo.yaml --dry-run
  qalign schema > qalign.schema.json        (for completion in your editor)

Every key of the configuration, with its default: qalign keys
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The `qalign` command."""
    return quietly(lambda: _main(argv))


def quietly(command: Callable[[], int]) -> int:
    """The command's status. Ctrl-C is one line and 130; where nobody reads what it prints any more, it ends without a word, with 141."""
    from pipeline.terminal import NobodyReads, guarded

    with guarded():
        try:
            status = command()
            sys.stdout.flush()
            return status
        except NobodyReads:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it ends
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one need not wait for what is being tidied up
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
            return 128 + signal.SIGINT


def _main(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        # A project of one's own may lie here (see `pipeline.dotted`). Last: no file of this folder hides an installed module.
        sys.path.append(os.getcwd())
    if argv[:1] == ["schema"]:
        from pipeline.config_file import json_schema

        print(json.dumps(json_schema(), indent=1))
        return 0
    if argv[:1] == ["keys"]:
        from pipeline.config_file import describe

        print(describe())
        return 0
    if argv[:1] and argv[0] in JOBS:
        return _run_job(importlib.import_module("tune.sweep" if argv[0] == "sweep" else f"jobs.{argv[0]}"), argv[1:])
    listing = "\n".join(f"  {name:8} {text}" for name, text in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="qalign",
        description=f"jobs:\n{listing}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=[*JOBS, "schema", "keys"], help="what to do; `qalign <job> --help` tells more")
    parser.parse_args(argv)
    return 0


def run_job(job: ModuleType, argv: Sequence[str] | None = None) -> int:
    """The command `python -m jobs.NAME`."""
    return quietly(lambda: _run_job(job, argv))


def _run_job(job: ModuleType, argv: Sequence[str] | None) -> int:
    """Parse the command line of one job and run it. Errors that a user can mend are one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog=f"qalign {job.__name__.rpartition('.')[2]}",
        description=job.HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", metavar="CONFIG.yaml", help="configuration file (jobs/configs/ has one per objective)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides, e.g. objective.beta=0.3")
    parser.add_argument("--local", action="store_true", help="run the very same functions in this process, without Ray")
    if hasattr(job, "arguments"):
        job.arguments(parser)
    options = parser.parse_intermixed_args(argv)
    for name, value in ({"TOKENIZERS_PARALLELISM": "false"} | HUGE_PAGES).items():
        os.environ.setdefault(name, value)
    if not options.local and getattr(job, "needs_ray", lambda _: True)(options):
        from pipeline.cluster import begin_imports

        begin_imports()

    from pipeline.config_file import load
    from pipeline.errors import Leaving, UserError
    from pipeline.pretrained import settled
    from pipeline.terminal import NobodyReads, log_to_terminal

    log_to_terminal()
    try:
        job.run(settled(load(options.config, options.overrides)), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NobodyReads:
        raise
    except OSError as error:  # a full disk, a folder that cannot be written: the system's words name it
        print(f"error: {error}; check the path, its permissions and the space left", file=sys.stderr)
        return 2
    except Leaving as leaving:
        print(f"{leaving}; the same command continues from there", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Exception as error:
        from pipeline.cluster import broke_down

        if (said := broke_down(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
