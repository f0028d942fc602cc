"""Splits by post: every record of a post, in whichever table and file, lies in one split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from prefopt.errors import UserError

# Of the posts reserved for the gold judge, the share on whose pairs its accuracy is measured.
GOLD_TEST_SHARE = 0.3


def content_hash(text: str) -> str:
    """A name for a post that has no id: the first 16 hex digits of the SHA-256 of its title and text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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

    Two records are of one post if they share the id or the content (title and text). The key is the smallest id
    among all records of the post, or a hash of the content where none has an id. (A disjoint-set forest whose
    roots are the smallest members; ids sort before contents.)
    """

    def __init__(self) -> None:
        self._parents: dict[tuple[int, str], tuple[int, str]] = {}

    def add(self, post_id: str | None, content: str) -> None:
        """Takes in one record; all must be in before the first call of `key`."""
        root = self._root((1, content_hash(content)))
        if post_id is not None:
            lower, upper = sorted((root, self._root((0, post_id))))
            self._parents[upper] = lower

    def key(self, content: str) -> str:
        """The key of the post with this content, which must have been added."""
        return self._root((1, content_hash(content)))[1]

    def _root(self, node: tuple[int, str]) -> tuple[int, str]:
        while (parent := self._parents.setdefault(node, node)) != node:
            self._parents[node] = self._parents[parent]
            node = parent
        return node
