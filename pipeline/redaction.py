"""Secrets stay out of what we write: logs, terminal, run folders, MLflow and pages all pass through here.

A secret is what stands in an environment variable whose name says so (HF_TOKEN, MLFLOW_TRACKING_PASSWORD, …), the user part of a URL
(`s3://key:secret@bucket`), and a URL's parameters that sign it or name a password. It is shown as `***`.

Left out: secrets that a person's own code prints, and what other programs (Ray, Python's own tracebacks in Ray's workers) write into
their log files. Nothing here keeps a secret: workers get their own from their environment.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""Shorter values of the environment are words such as `true` or `none`: hiding them would spoil texts and protect nobody."""

_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|PASS|SECRET|KEY|CREDENTIALS?|DSN|SAS)$", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*(://|::)", re.IGNORECASE)
# A user part ends at the last @ before the first slash. Secret keys of S3 hold slashes themselves: then at the last @ of all, unless
# what follows the colon is a port.
_USER = re.compile(r"""(?<=://)(?:[^\s/"']*@|[^\s/@:"']+:(?!\d+/|:)[^\s"']+@)""")
_SIGNED = re.compile(
    r"""([?&;](?:[\w.-]*(?:token|secret|passw|signature|credential|auth)[\w.-]*|[\w.-]*key|sig|pwd)=)[^&;\s"'#]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without any secret that can be known."""
    text = without_credentials(text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def redacted(tree: Any) -> Any:
    """A copy of plain JSON types whose texts are `redact`ed."""
    return _mapped(tree, redact)


def without_credentials(text: str) -> str:
    """The text with the credentials of its URLs hidden."""
    return _SIGNED.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def urls_without_credentials(tree: Any) -> Any:
    """A copy of plain JSON types in which values that are URLs have lost their credentials; nothing else is touched."""
    return _mapped(tree, lambda text: without_credentials(text) if _URL.match(text) else text)


def _mapped(tree: Any, change: Any) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    return [_mapped(value, change) for value in tree] if isinstance(tree, list | tuple) else tree


def _secrets() -> list[str]:
    """Values of the environment that are nobody's business, longest first (one may hold another)."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


# ------------------------------------------------------------------------------------------------ where text leaves


class RedactingFormatter(logging.Formatter):
    """Whatever is logged, tracebacks included, is `redact`ed as it is written."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_terminal() -> None:
    """Warnings go to stderr, and so do errors that nobody catches: without secrets. Called once, by the command line."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _show
    threading.excepthook = lambda broken: _show(broken.exc_type, broken.exc_value, broken.exc_traceback)


def _show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
