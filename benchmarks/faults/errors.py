"""What a drill raises."""

from __future__ import annotations

from pipeline.errors import UserError


class DrillError(UserError, RuntimeError):
    """A drill could not be set up, or did not go as it has to."""
