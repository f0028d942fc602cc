"""The tiny models of `tiny_models.py`, for every test of this folder."""

from tiny_models import architecture, model, plain

__all__ = ["architecture", "model", "plain"]
