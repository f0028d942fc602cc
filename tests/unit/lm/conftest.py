"""The tiny models of `tiny_models.py`, for every test of this folder, and what transformers is asked for."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tiny_models import architecture, model, plain

__all__ = ["architecture", "asked", "model", "plain"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The options with which each of transformers' classes was last asked to load something."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def watched(*args: Any, _kind: Any = kind, _load: Any = kind.from_pretrained, **options: Any) -> Any:
            found[_kind.__name__] = options
            return _load(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", watched)
    return found
