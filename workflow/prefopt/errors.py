"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something that a user can put right: printed as one sentence, without a traceback (exit code 2)."""
