"""Splits by post: every record of a post, in whichever table and file, lies in one split."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping

from prefopt.errors import UserError

# Control characters, and what Unicode calls ignorable by default: zero-width characters, marks of direction, soft
# hyphens, variation selectors.
_INVISIBLE_CHARACTERS = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff"
)
_INVISIBLE = re.compile(f"[{_INVISIBLE_CHARACTERS}]")
_VISIBLE = re.compile(rf"[^\s{_INVISIBLE_CHARACTERS}]")

# Of the posts reserved for the gold judge, the share on whose pairs its accuracy is measured.
GOLD_TEST_SHARE = 0.3


def content_hash(text: str) -> str:
    """A name for a post that has no id: the first 16 hex digits of the SHA-256 of its title and text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(text: str) -> str:
    """What a text is known by: its letters and signs, without white space, invisible characters and Unicode's form.

    Texts of the same identity are one prompt, whichever program has wrapped, copied or encoded them. It never is a
    text to train on.
    """
    text = "".join(text.split())
    if text.isascii():
        return text if text.isprintable() else _INVISIBLE.sub("", text)
    # Twice, since what was between a letter and its accent may have been taken away.
    text = _INVISIBLE.sub("", "".join(unicodedata.normalize("NFKC", text).split()))
    return unicodedata.normalize("NFKC", text)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return _VISIBLE.search(text) is None


def position(salt: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but the two texts; independent for different salts."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:7]) / 2**56


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The split of a post, by a hash of its key: growing or shuffling the records moves no post.

    Args:
        key: names the post.
        shares: share of the posts of each split, adding up to 1.
    """
    where, upper = position("split", key), 0.0
    for split, share in shares.items():
        upper += share
        if where < upper:
            return split
    return list(shares)[-1]  # the shares add up to a hair below 1


def gold_split_of(key: str, gold_fraction: float) -> str | None:
    """ "gold_train" or "gold_test" for a post that is reserved for the gold judge, else None.

    The hashes are independent of that of `split_of`, so that both judges' posts are drawn alike.
    """
    if position("gold", key) >= gold_fraction:
        return None
    return "gold_test" if position("gold-test", key) < GOLD_TEST_SHARE else "gold_train"


def check_shares(shares: Mapping[str, float]) -> None:
    """Raises UserError unless there are shares for train, validation and test that add up to 1."""
    if set(shares) != {"train", "validation", "test"}:
        raise UserError(f"splits has the keys {', '.join(sorted(shares))}, expected train, validation and test.")
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise UserError(f"splits is {dict(shares)}, which are not shares that add up to 1: correct them.")


class PostKeys:
    """Gives every record of one post the same key, also where some records of it lack the id.

    Two records are of one post if they share the id or what the content (title and text) is known by. The key is the
    smallest id among all records of the post, or the smallest hash of their contents where none has an id: a content
    that stands there in one form alone is named by its own hash. (A disjoint-set forest whose roots are the smallest
    members; ids sort before contents, and these before identities.)
    """

    def __init__(self) -> None:
        self._parents: dict[tuple[int, str], tuple[int, str]] = {}

    @classmethod
    def of(cls, contents: Iterable[str]) -> PostKeys:
        """Keys of contents that have no ids."""
        keys = cls()
        for content in contents:
            keys.add(None, content)
        return keys

    def add(self, post_id: str | None, content: str, known_by: str | None = None) -> None:
        """Takes in one record; all must be in before the first call of `key`.

        Args:
            post_id: names the post.
            content: title and text.
            known_by: what the content is known by, where that is more than its `identity`.
        """
        node = (1, content_hash(content))
        self._join(node, (2, content_hash(identity(content) if known_by is None else known_by)))
        if post_id is not None:
            self._join(node, (0, post_id))

    def key(self, content: str) -> str:
        """The key of the post with this content, which must have been added."""
        return self._root((1, content_hash(content)))[1]

    def _join(self, first: tuple[int, str], second: tuple[int, str]) -> None:
        lower, upper = sorted((self._root(first), self._root(second)))
        self._parents[upper] = lower

    def _root(self, node: tuple[int, str]) -> tuple[int, str]:
        while (parent := self._parents.setdefault(node, node)) != node:
            self._parents[node] = self._parents[parent]
            node = parent
        return node
