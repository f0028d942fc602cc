"""The tiny task of `tiny_task.py`, for every test of this folder."""

from tiny_task import task

__all__ = ["task"]
