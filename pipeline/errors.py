"""Errors that a user can mend: printed as one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base class; the message is one line that names the cause and the remedy."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot work: one line that names the key and the remedy."""


class Leaving(Exception):
    """A worker was told to end and saved what it had: the same command, or Ray, goes on from there."""
