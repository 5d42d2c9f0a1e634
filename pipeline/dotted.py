"""From a dotted path `package.module:name` to what it names: the one door through which code of a user's own comes in.

The module has to be installed, which means that its file lies in

- a site-packages folder of this Python,
- a project that was installed in editable form (`pip install -e`),
- or a folder that the environment variable PYTHONPATH names (Ray puts a job's --working-dir there).

To lie in the current folder, or where data or models were unpacked, is not enough: what was downloaded to be read must not become code.
Modules of Python itself are refused, too: `os:execlp` is no scorer. What is found is checked before anything of it runs.

Left out: what the object has to be (`objectives`, `evaluation.scorers`).
"""

from __future__ import annotations

import importlib
import json
import os
import site
import sysconfig
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def is_dotted(path: str) -> bool:
    """Whether `path` has the form package.module:name."""
    module, _, attribute = path.partition(":")
    return all(part.isidentifier() for part in [*module.split("."), attribute])


def load(path: str) -> Any:
    """The object behind a dotted path. Raises ImportError: one line, with the cause."""
    assert is_dotted(path)
    module, _, attribute = path.partition(":")
    top = module.partition(".")[0]  # whose submodules lie within it
    spec = _spec(top)
    if spec is not None and not any(_within(spec, root) for root in _roots()):
        place = spec.origin or ", ".join(spec.submodule_search_locations or ())
        remedy = "pip install it, or name its folder in PYTHONPATH"
        raise ImportError(f"cannot load {path!r} ({top}, found at {place}, is not installed); {remedy}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"cannot load {path!r} ({error}); is the module installed on every node?") from None


def _spec(top: str) -> ModuleSpec | None:
    """Where a top-level module lies; None: there is none. Runs nothing of it."""
    try:
        return find_spec(top)
    except ValueError:  # __main__, or a module that was put together in memory
        return ModuleSpec(top, None, origin="memory")


def _within(spec: ModuleSpec, root: Path) -> bool:
    """Whether the module's file, and for a package all of its folders, lie in `root`.

    A folder without __init__.py counts as a package in site-packages only: any folder of files is one to Python.
    """
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.has_location and spec.origin else [])]
    if not spec.has_location and root not in _site_folders():
        return False
    return bool(places) and all(Path(place).resolve().is_relative_to(root) for place in places)


def _roots() -> list[Path]:
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [*_site_folders(), *_editable_projects(), *(Path(folder).resolve() for folder in named if folder)]


@cache
def _site_folders() -> tuple[Path, ...]:
    found = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        found.add(site.getusersitepackages())
    return tuple(Path(folder).resolve() for folder in found)


@cache
def _editable_projects() -> tuple[Path, ...]:
    """Folders of the projects that are installed in editable form, by what pip noted beside them."""
    found = set()
    for distribution in distributions(path=[str(folder) for folder in _site_folders()]):
        note = json.loads(distribution.read_text("direct_url.json") or "{}")
        if note.get("dir_info", {}).get("editable"):
            found.add(Path(unquote(urlsplit(note["url"]).path)).resolve())
    return tuple(found)
