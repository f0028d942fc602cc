"""What a record becomes, a prompt with a response or with two, and the tables of all that were read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.raw.parsing import Account, RawTables, Unusable
from prefopt.data.raw.splits import PostKeys, check_shares, content_hash, gold_split_of, is_blank, split_of

_STATEMENT = "Real records, not synthetic; split by post."


@dataclasses.dataclass(frozen=True)
class Post:
    """What is answered: a post, a question, or the start of a conversation."""

    post_id: str | None
    prompt: str
    document: str  # the prompt without a task's format: identifies a post, and is text to pretrain on
    known_by: str  # a hash of the document's identity, whatever white space a task's format was written with
    messages: str = ""  # the turns as JSON, where it is a conversation


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A post with a response, which starts with a space; "" is a prompt alone, to evaluate on."""

    post: Post
    response: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A post with two responses, which start with a space; `source` says where it is from."""

    post: Post
    chosen: str
    rejected: str
    source: str


@dataclasses.dataclass(frozen=True)
class Thumb:
    """A post with a response, which starts with a space, and whether it pleased."""

    post: Post
    response: str
    up: bool
    source: str = ""


Place = Callable[[Post], tuple[str, str]]  # a post's key and split


def completion(text: str) -> str:
    """A response as it is trained on; raises Unusable ("empty_text") where it shows nothing."""
    if is_blank(text):
        raise Unusable("empty_text")
    return " " + text.strip()


def pair(post: Post, chosen: str, rejected: str, source: str = "") -> Pair:
    """A post with two responses; raises Unusable ("empty_text", "equal_texts")."""
    made = Pair(post, completion(chosen), completion(rejected), source)
    if made.chosen == made.rejected:
        raise Unusable("equal_texts")
    return made


def tables_of(
    demonstrations: Sequence[Demonstration],
    pairs: Sequence[Pair],
    accounts: dict[str, Account],
    *,
    splits: Mapping[str, float],
    gold_fraction: float,
    thumbs: Sequence[Thumb] = (),
    sides: Mapping[str, Mapping[str, float]] | None = None,
    repeated: str = "duplicate_post",
) -> RawTables:
    """The tables of all that was read, each post in one split.

    A share `gold_fraction` of the posts with pairs is reserved for the gold judge: their pairs get the splits
    gold_train and gold_test, and demonstrations of the same posts are dropped ("reserved_for_gold"), so that no
    post of the gold judge is in any other split of any table. Which posts are reserved does not depend on the
    demonstrations: published comparisons are on posts that also have a demonstration.

    Args:
        demonstrations: of a post with several the first is kept.
        pairs: all are kept.
        accounts: of the two tables, with what was dropped before.
        splits: share of the posts of train, validation and test.
        gold_fraction: share of the posts with pairs.
        thumbs: that are in no pair.
        sides: the shares of posts that not all splits may have, by a source's name; of a post that several sources have
            those of the first of them.
        repeated: why a second demonstration of a post is dropped.

    Returns:
        The tables. Pretraining documents are of training posts alone: each post (title and text), and each
        distinct summary of one.
    """
    check_shares(splits)
    keys = PostKeys()
    records: list[Demonstration | Pair | Thumb] = [*demonstrations, *pairs, *thumbs]
    for record in records:
        keys.add(record.post.post_id, record.post.document, record.post.known_by)
    gold = {key: gold_split_of(key, gold_fraction) for key in (keys.key(pair.post.document) for pair in pairs)}
    shares = _shares(keys, records, sides) if sides else {}

    def place(post: Post) -> tuple[str, str]:
        key = keys.key(post.document)
        if key in shares:
            reserved = gold.get(key) if "train" in shares[key] else None
            return key, reserved or split_of(key, shares[key])
        return key, gold.get(key) or split_of(key, splits)

    demonstration_rows = list(_demonstration_rows(demonstrations, place, accounts["raw_demonstrations"], repeated))
    preference_rows = list(_preference_rows(pairs, place, accounts["raw_preferences"]))
    documents = list(dict.fromkeys(_pretraining_documents(demonstrations, pairs, place)))
    accounts["pretraining"] = Account(read=len(documents), kept=len(documents))
    notes = {
        "synthetic": False,
        "statement": _STATEMENT,
        "posts": {
            "demonstrations": _posts_by_split(demonstration_rows),
            "preferences": _posts_by_split(preference_rows),
        },
    }
    return RawTables(demonstration_rows, preference_rows, documents, accounts, notes, list(_label_rows(thumbs, place)))


def _shares(
    keys: PostKeys, records: Iterable[Demonstration | Pair | Thumb], sides: Mapping[str, Mapping[str, float]]
) -> dict[str, Mapping[str, float]]:
    """The shares of each post that a source keeps out of some split; of several sources the first of `sides` decides."""
    order = list(sides)
    first: dict[str, int] = {}
    for record in records:
        if record.source in sides:
            key = keys.key(record.post.document)
            first[key] = min(order.index(record.source), first.get(key, len(order)))
    return {key: sides[order[number]] for key, number in first.items()}


def _demonstration_rows(
    records: Iterable[Demonstration], place: Place, account: Account, repeated: str
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for record in records:
        key, split = place(record.post)
        if split.startswith("gold_"):
            account.drop("reserved_for_gold")
        elif key in seen:
            account.drop(repeated)
        else:
            seen.add(key)
            account.keep()
            row = {"prompt_id": key, "prompt": record.post.prompt, "response": record.response}
            yield {**row, "split": split, "facts": "", "messages": record.post.messages, "source": record.source}


def _preference_rows(records: Iterable[Pair], place: Place, account: Account) -> Iterator[dict[str, Any]]:
    """A repeated pair is kept, since several workers may have labelled it: a counter keeps its id unique."""
    repeats: Counter[str] = Counter()
    for record in records:
        key, split = place(record.post)
        account.keep()
        yield {
            "pair_id": _numbered(f"{key}-{content_hash(record.chosen + chr(0) + record.rejected)}", repeats),
            "prompt_id": key,
            "prompt": record.post.prompt,
            "chosen": record.chosen,
            "rejected": record.rejected,
            "split": split,
            "source": record.source,
            "messages": record.post.messages,
        }


def _label_rows(records: Iterable[Thumb], place: Place) -> Iterator[dict[str, Any]]:
    """A repeated label is kept, as a repeated pair is."""
    repeats: Counter[str] = Counter()
    for record in records:
        key, split = place(record.post)
        yield {
            "example_id": _numbered(f"{key}-{content_hash(record.response)}-{'up' if record.up else 'down'}", repeats),
            "prompt_id": key,
            "prompt": record.post.prompt,
            "completion": record.response,
            "label": record.up,
            "split": split,
            "source": record.source,
            "messages": record.post.messages,
        }


def _numbered(name: str, repeats: Counter[str]) -> str:
    repeats[name] += 1
    return name if repeats[name] == 1 else f"{name}-{repeats[name]}"


def _pretraining_documents(
    demonstrations: Iterable[Demonstration], pairs: Iterable[Pair], place: Place
) -> Iterator[str]:
    for demonstration in demonstrations:
        if place(demonstration.post)[1] == "train":
            yield demonstration.post.document
            yield demonstration.response.strip()
    for pair in pairs:
        if place(pair.post)[1] == "train":
            yield pair.post.document
            yield pair.chosen.strip()
            yield pair.rejected.strip()


def _posts_by_split(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(split for _, split in {(row["prompt_id"], row["split"]) for row in rows}).items()))
