"""Text that follows other text, tokenized and decoded as what it is.

A tokenizer of sentencepiece's kind puts a space before all that it is given, and takes the first one away again when it
decodes. So a completion that is tokenized by itself gets a space that is not in the text, and one that is decoded by
itself loses one that is.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.lm.models import decode, encode

# What a text is put behind, where it cannot be tokenized by itself; the first one whose tokens stay apart is taken.
_ANCHORS = ("\n", "a", ".")
# Texts that a tokenizer which adds nothing cuts in the middle.
_PARTS = (("a", " a"), ("a", "\n"), ("a", ")"))


def encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it stands after another one (see `encode`).

    Raises:
        UserError: the tokens of a text depend on the text before it.
    """
    if not _adds_something(tokenizer):
        return encode(tokenizer, texts)
    found: dict[str, list[int]] = {}
    for anchor, ids in zip(_ANCHORS, encode(tokenizer, _ANCHORS), strict=True):
        waiting = [text for text in dict.fromkeys(texts) if text not in found]
        for text, whole in zip(waiting, encode(tokenizer, [anchor + text for text in waiting]), strict=True):
            if ids and whole[: len(ids)] == ids:
                found[text] = whole[len(ids) :]
    if lacking := [text for text in texts if text not in found]:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path} has no tokens of {lacking[0][:40]!r} that are the same after any "
            f"text, so that prompt and completion cannot be told apart: take another model."
        )
    return [found[text] for text in texts]


def decode_continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that tokens add to the tokens before them, without special ones."""
    last = [int(token) for token in before[-1:]]
    start, whole = decode(tokenizer, last), decode(tokenizer, [*last, *ids])
    # Not where a character of several bytes is cut in the middle.
    return whole.removeprefix(start) if whole.startswith(start) else decode(tokenizer, ids)


def _adds_something(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's tokens differ from those of its parts."""
    texts = [text for first, second in _PARTS for text in (first + second, first, second)]
    ids = encode(tokenizer, texts)
    return any(ids[i] != ids[i + 1] + ids[i + 2] for i in range(0, len(ids), 3))
