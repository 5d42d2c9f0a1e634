"""Secrets stay out of what we write: terminal, logs, run folders, MLflow and pages all pass through here.

A secret is what stands in an environment variable whose name says so (HF_TOKEN, MLFLOW_TRACKING_PASSWORD, …), the user part of a URL
(`s3://key:secret@bucket`), and a URL's parameters that sign it or name a password. `redact` shows it as `***`, in any of the forms that
JSON, YAML, Python, URLs, HTML and base64 give it. What has to be read again, a sweep's trial say, is `sealed`: the variable's name stands
in place of its value, and whoever reads it has it in its own environment.

See also: `terminal`, through which a process says anything.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from html.entities import codepoint2name
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

HIDDEN = "***"
ANYWHERE = 8
"""A shorter value is hidden only where it stands alone: as a part of other words it would spoil texts and protect nobody."""
SHORTEST = 4
LINE = 16
"""A line of a secret of several lines (a private key) that is this long is a secret itself."""
WORDS = frozenset({"true", "false", "none", "null", "auto", "token", "test", "default", "empty", "local", "enabled"})
"""Values of variables that are settings, whatever the variables' names say."""

_SECRET_NAME = re.compile(
    r"((TOKEN|PASSWORD|PASSWD|PASS|PASSPHRASE|SECRET|KEY|CREDENTIAL)S?|CREDS|DSN|SAS|_PWD?|_AUTH|_BEARER|_COOKIE)"
    r"(_?\d+|_(OLD|NEW|PREVIOUS|NEXT|PRIMARY|SECONDARY|BACKUP|PROD|DEV|TEST|READ|WRITE|VALUE|BASE64|JSON))?$",
    re.IGNORECASE,
)
_NO_SECRETS = frozenset({"PWD", "OLDPWD"})
_URL = re.compile(r"[a-z][a-z0-9+.-]*(://|::)", re.IGNORECASE)
# A user part ends at the last @ before the first slash. Secret keys of S3 hold slashes themselves: then at the last @ of all, unless
# what follows the colon is a port.
_USER = re.compile(r"""(?<=://)(?:[^\s/"']*@|[^\s/@:"']+:(?!\d+/|:)[^\s"']+@)""")
_SIGNED = re.compile(
    r"""([?&;](?:[\w.-]*(?:token|secret|passw|signature|credential|auth)[\w.-]*|[\w.-]*key|sig|pwd)=)[^&;\s"'#]+""",
    re.IGNORECASE,
)
_SEALED = re.compile(r"\$\{oc\.env:(\w+)\}")


class MissingSecret(UserError, LookupError):
    """A sealed value is read where the environment does not have it."""


def redact(text: str) -> str:
    """The text without any secret that can be known."""
    return _redact(text, known_secrets())


def redacted(tree: Any) -> Any:
    """A copy of plain JSON types whose texts are `redact`ed."""
    return _mapped(tree, partial(_redact, secrets=known_secrets()))


def sealed(tree: Any) -> Any:
    """A copy of plain JSON types without secrets, which `unsealed` makes whole again where the environment has them.

    The credentials of URLs are gone for good, as are secrets in another form than they have in the environment.
    """
    return _mapped(tree, partial(_seal, secrets=known_secrets()))


def unsealed(tree: Any) -> Any:
    """What was `sealed`, with the secrets of this process's environment. Raises MissingSecret."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if not _says_so(name):
            return found[0]
        if name not in os.environ:
            raise MissingSecret(
                f"{name}: the environment of this process lacks it; give it to all workers, as the driver has it"
            )
        return os.environ[name]

    return _mapped(tree, lambda text: _SEALED.sub(value, text))


def without_credentials(text: str) -> str:
    """The text with the credentials of its URLs hidden."""
    return _SIGNED.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text)) if "://" in text or "=" in text else text


def urls_without_credentials(tree: Any) -> Any:
    """A copy of plain JSON types in which values that are URLs have lost their credentials; nothing else is touched."""
    return _mapped(tree, lambda text: without_credentials(text) if _URL.match(text) else text)


def _mapped(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {change(key) if isinstance(key, str) else key: _mapped(value, change) for key, value in tree.items()}
    return [_mapped(value, change) for value in tree] if isinstance(tree, list | tuple) else tree


def _redact(text: str, secrets: tuple[Secret, ...]) -> str:
    text = without_credentials(text)
    for secret in secrets:
        text = secret.replaced(text, HIDDEN)
    return text


def _seal(text: str, secrets: tuple[Secret, ...]) -> str:
    text = without_credentials(text)
    for secret in secrets:
        named, alone = f"${{oc.env:{secret.name}}}", len(secret.value) < ANYWHERE
        if secret.name is not None and not alone:
            text = text.replace(secret.value, named)
        text = secret.replaced(text, named if secret.name is not None and alone else HIDDEN)
    return text


# --------------------------------------------------------------------------------------------- what is secret


@dataclass(frozen=True, slots=True)
class Secret:
    """A value that nobody has to see, and how it looks wherever it may stand."""

    value: str
    name: str | None  # the variable that holds all of it; None: it is a part of one
    pattern: re.Pattern[str]
    hint: str  # in every text that the pattern matches, but for base64
    encoded: tuple[str, ...]  # as base64

    def replaced(self, text: str, by: str) -> str:
        if self.hint in text:
            text = self.pattern.sub(lambda found: by if found[0] == self.value else HIDDEN, text)
        for form in self.encoded:
            text = text.replace(form, HIDDEN)
        return text


def known_secrets() -> tuple[Secret, ...]:
    """Those of the environment, longest first (one may hold another)."""
    return _made(
        tuple((name, value) for name, value in os.environ.items() if _says_so(name) and len(value) >= SHORTEST)
    )


@cache
def _says_so(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and name.upper() not in _NO_SECRETS


@lru_cache(maxsize=8)
def _made(variables: tuple[tuple[str, str], ...]) -> tuple[Secret, ...]:
    values: dict[str, str | None] = {}
    for name, value in variables:
        bare = value.strip()
        if value.startswith(("/", "~/")) and Path(value).expanduser().exists():
            continue  # where a secret lies
        for line in bare.splitlines():
            if len(line.strip()) >= LINE and line.strip() != bare:
                values.setdefault(line.strip(), None)
        if len(bare) >= ANYWHERE or (len(bare) >= SHORTEST and not bare.isdecimal() and bare.lower() not in WORDS):
            values[value] = name
    return tuple(_secret(value, name) for value, name in sorted(values.items(), key=lambda item: -len(item[0])))


def _secret(value: str, name: str | None) -> Secret:
    pattern = "".join(map(_forms, re.split(r"(\s+)", value.strip())))
    if len(value) < ANYWHERE:
        pattern = rf"(?<![\w./-]){pattern}(?![\w./-])"
    plain = max(re.findall(r"[A-Za-z0-9]+", value), key=len, default="")
    return Secret(value, name, re.compile(pattern), plain, _encoded(value.strip()) if len(value) >= ANYWHERE else ())


# ------------------------------------------------------------------------------------------- how it may look


def _forms(part: str) -> str:
    """A pattern for a part of a secret, white space or none, in all forms."""
    if part.isspace():
        codes = r"(?:20|0?9|0?[a-d])"
        return (
            rf"(?:\s|\+|(?i:\\+(?:[nrtvf]|x{codes}|u00{codes})|%(?:25)*{codes}|&(?:amp;)*\#(?:32|9|1[0-3]|x{codes});))+"
        )
    return "".join(char if char.isascii() and char.isalnum() else _form(char) for char in part)


def _form(char: str) -> str:
    """One character: escaped for JSON, YAML or Python, for URLs, for HTML, once or several times over, or as it is."""
    code, utf8 = ord(char), char.encode("utf-8", "surrogateescape")
    utf16 = char.encode("utf-16-be", "surrogatepass")
    name = codepoint2name.get(code, "apos" if char == "'" else "quot")
    escaped = [
        "".join(rf"\\+x{byte:02x}" for byte in utf8),
        "".join(rf"%(?:25)*{byte:02x}" for byte in utf8),
        "".join(rf"\\+u{utf16[i : i + 2].hex()}" for i in range(0, len(utf16), 2)),
        rf"\\+U{code:08x}",
        rf"\\*&(?:amp;)*(?:\#0*{code}|\#x0*{code:x}" + (f"|{name});" if char in "\"'&<>" else ");"),
    ]
    if code < 256:
        escaped.append(rf"\\+x{code:02x}")
    bare = {"\\": r"\\+", "'": r"(?:''|\\*')"}.get(char, (r"\\*" if char in '"/$`' else "") + re.escape(char))
    return f"(?:(?i:{'|'.join(escaped)})|{bare})"


def _encoded(value: str) -> tuple[str, ...]:
    """What base64 makes of it behind zero, one or two other bytes (a user's name, say), without what the neighbours change."""
    found = []
    for before in range(3):
        data = b"\0" * before + value.encode("utf-8", "surrogateescape")
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.append(encode(data).decode().rstrip("=")[(0, 2, 3)[before] : len(data) * 8 // 6])
    return tuple(dict.fromkeys(found))
