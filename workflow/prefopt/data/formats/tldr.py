"""TL;DR records in their published formats, and plain rows of the user's own, to raw tables.

Formats: the filtered TL;DR posts (Syed et al. 2018; Stiennon et al. 2020), `id, subreddit, title, post, summary`;
OpenAI's summarize-from-feedback comparisons, `info{id, post, title, subreddit}, summaries[2]{text}, choice`; plain
demonstrations, `prompt, response`; plain pairs, `prompt, chosen, rejected`. Other fields are ignored.
"""

from __future__ import annotations

import dataclasses
import logging
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prefopt.data.raw.parsing import Account, Parser, RawTables, Unusable
from prefopt.data.raw.record import Malformed, Records, field_of, text_of
from prefopt.data.raw.splits import PostKeys, check_shares, content_hash, gold_split_of, identity, is_blank, split_of

logger = logging.getLogger(__name__)

SUFFIX = "\n\nTL;DR:"
_ABOUT = ("id", "subreddit", "title", "post", "article")
# What is read of each kind of file.
FIELDS: dict[str, tuple[str, ...]] = {
    "posts": (*_ABOUT, "summary"),
    "demonstrations": ("prompt", "response"),
    "comparisons": (*(f"info.{name}" for name in _ABOUT), "summaries.text", "choice"),
    "preferences": ("prompt", "chosen", "rejected"),
}
_INVISIBLE_ENDS = " \t\n\v\f\xa0\u200b\u200c\u200d\u2060\ufeff"
_STATEMENT = "Real records, not synthetic; split by post."


@dataclasses.dataclass(frozen=True)
class Post:
    """What is summarized."""

    post_id: str | None
    prompt: str
    document: str  # title and text without the task's format: identifies a post, and is text to pretrain on

    @property
    def known_by(self) -> str:
        """The identity of title and text, whatever white space the task's format was written with."""
        text = identity(self.prompt).removesuffix(identity(SUFFIX))
        title, post = _title_and_post(text, "") or ("", text)
        return title + post


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A post with its author's summary, which starts with a space."""

    post: Post
    response: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A post with two summaries, which start with a space; `source` is the kind of file that it came from."""

    post: Post
    chosen: str
    rejected: str
    source: str


def raw_tables(
    records: Mapping[str, Records], *, splits: Mapping[str, float], gold_fraction: float, max_malformed: int
) -> RawTables:
    """Parses all records and splits them by post.

    A share `gold_fraction` of the posts with pairs is reserved for the gold judge: their pairs get the splits
    gold_train and gold_test, and demonstrations of the same posts are dropped ("reserved_for_gold"), so that no
    post of the gold judge is in any other split of any table. Which posts are reserved does not depend on the
    demonstrations: published comparisons are on posts that also have a demonstration.

    Args:
        records: for each of "posts", "demonstrations", "comparisons" and "preferences" its records; any may lack.
        splits: share of the posts of train, validation and test.
        gold_fraction: share of the posts with pairs.
        max_malformed: how many malformed records, over all files, are dropped and counted.

    Returns:
        The tables. Pretraining documents are of training posts alone: each post (title and text), and each
        distinct summary of one.

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
    check_shares(splits)
    accounts = {"raw_demonstrations": Account(), "raw_preferences": Account()}
    parse = Parser(max_malformed)
    demonstrations = [
        *parse(records.get("posts", ()), parse_post, accounts["raw_demonstrations"]),
        *parse(records.get("demonstrations", ()), parse_demonstration, accounts["raw_demonstrations"]),
    ]
    pairs = [
        *parse(records.get("comparisons", ()), parse_comparison, accounts["raw_preferences"]),
        *parse(records.get("preferences", ()), parse_preference, accounts["raw_preferences"]),
    ]
    posts = [record.post for record in demonstrations] + [record.post for record in pairs]
    if endless := sum(not post.prompt.endswith(SUFFIX) for post in posts):
        logger.warning(
            "warning: %d of %d prompts do not end with %r: one that is too long may lose its last line.",
            *(endless, len(posts), SUFFIX.strip()),
        )
    keys = PostKeys()
    for post in posts:
        keys.add(post.post_id, post.document, post.known_by)
    gold = {key: gold_split_of(key, gold_fraction) for key in (keys.key(pair.post.document) for pair in pairs)}

    def place(post: Post) -> tuple[str, str]:
        key = keys.key(post.document)
        return key, gold.get(key) or split_of(key, splits)

    demonstration_rows = list(_demonstration_rows(demonstrations, place, accounts["raw_demonstrations"]))
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
    return RawTables(demonstration_rows, preference_rows, documents, accounts, notes)


def tldr_prompt(subreddit: str, title: str, post: str) -> str:
    """The paper's prompt: `SUBREDDIT: r/... / TITLE: ... / POST: ... / TL;DR:`."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}{SUFFIX}"


def parse_post(row: Mapping[str, Any]) -> Demonstration:
    """A filtered TL;DR post with its author's summary.

    Raises:
        Malformed: a field is missing or of the wrong type.
        Unusable: "no_post" or "empty_text".
    """
    summary = text_of(row, "summary")
    return Demonstration(_post(row), _completion(summary))


def parse_comparison(row: Mapping[str, Any]) -> Pair:
    """One of OpenAI's comparisons; `choice` is the index of the chosen summary.

    Raises:
        Malformed: a field is missing or of the wrong type, or `choice` is neither 0 nor 1.
        Unusable: "no_post" (also a comparison on a news article), "empty_text" or "equal_texts".
    """
    info, summaries, choice = (field_of(row, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, Mapping):
        raise Malformed(f"'info' is {reprlib.repr(info)}, which is not an object")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise Malformed(f"'summaries' is {reprlib.repr(summaries)}, which is not a list of two objects")
    if isinstance(choice, bool) or not isinstance(choice, int) or choice not in (0, 1):
        raise Malformed(f"'choice' is {reprlib.repr(choice)}, which is neither 0 nor 1")
    texts = [text_of(summary, "text") for summary in summaries]
    return _pair(_post(info), texts[choice], texts[1 - choice], "comparisons")


def parse_demonstration(row: Mapping[str, Any]) -> Demonstration:
    """A row of the user's own: `prompt, response` (raises as `parse_post` does)."""
    prompt, response = text_of(row, "prompt"), text_of(row, "response")
    return Demonstration(_own_post(prompt), _completion(response))


def parse_preference(row: Mapping[str, Any]) -> Pair:
    """A row of the user's own: `prompt, chosen, rejected` (raises as `parse_comparison` does)."""
    prompt, chosen, rejected = (text_of(row, name) for name in ("prompt", "chosen", "rejected"))
    return _pair(_own_post(prompt), chosen, rejected, "preferences")


Place = Callable[[Post], tuple[str, str]]  # a post's key and split


def _demonstration_rows(records: Iterable[Demonstration], place: Place, account: Account) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for record in records:
        key, split = place(record.post)
        if split.startswith("gold_"):
            account.drop("reserved_for_gold")
        elif key in seen:
            account.drop("duplicate_post")
        else:
            seen.add(key)
            account.keep()
            row = {"prompt_id": key, "prompt": record.post.prompt, "response": record.response}
            yield {**row, "split": split, "facts": ""}


def _preference_rows(records: Iterable[Pair], place: Place, account: Account) -> Iterator[dict[str, Any]]:
    """A repeated pair is kept, since several workers may have labelled it: a counter keeps its id unique."""
    repeats: Counter[str] = Counter()
    for record in records:
        key, split = place(record.post)
        pair_id = f"{key}-{content_hash(record.chosen + chr(0) + record.rejected)}"
        repeats[pair_id] += 1
        account.keep()
        yield {
            "pair_id": pair_id if repeats[pair_id] == 1 else f"{pair_id}-{repeats[pair_id]}",
            "prompt_id": key,
            "prompt": record.post.prompt,
            "chosen": record.chosen,
            "rejected": record.rejected,
            "split": split,
            "source": record.source,
        }


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


def _post(row: Mapping[str, Any]) -> Post:
    if "post" not in row and "article" not in row:
        raise Malformed("the field 'post' is missing")
    if row.get("post") is None:  # a news article, or a post that was deleted
        raise Unusable("no_post")
    post = text_of(row, "post").strip()
    if is_blank(post):
        raise Unusable("no_post")
    title, subreddit = text_of(row, "title").strip(), text_of(row, "subreddit").strip().removeprefix("r/")
    post_id = text_of(row, "id").strip() if row.get("id") else ""
    return Post(post_id or None, tldr_prompt(subreddit, title, post), _document(title, post))


def _own_post(prompt: str) -> Post:
    """A prompt of the user's own. Where it ends with TL;DR: after whatever white space, it ends with the `SUFFIX`, which
    no cut removes."""
    prompt = prompt.strip()
    bare, last = prompt.rstrip(_INVISIBLE_ENDS), SUFFIX.strip()
    body = bare.removesuffix(SUFFIX if bare.endswith(SUFFIX) else last)
    if is_blank(body):
        raise Unusable("no_post")
    if not bare.endswith(last):
        return Post(None, prompt, prompt)
    if not bare.endswith(SUFFIX):
        body = body.rstrip()
    for gap in ("\n\n", "\n", " "):
        if parts := _title_and_post(body, gap):
            # The same content as the published record of the post has, so that both have one key.
            return Post(None, body + SUFFIX, _document(*parts))
    return Post(None, body + SUFFIX, body)


def _title_and_post(text: str, gap: str) -> tuple[str, str] | None:
    """Title and post of a prompt in the task's format, whose parts stand apart by `gap`; None if it is in none."""
    head, title_mark, rest = text.partition(f"{gap}TITLE:")
    title, post_mark, post = rest.partition(f"{gap}POST:")
    return (title, post) if head.startswith("SUBREDDIT:") and title_mark and post_mark else None


def _document(title: str, post: str) -> str:
    return f"{title.strip()}\n\n{post.strip()}"


def _pair(post: Post, chosen: str, rejected: str, source: str) -> Pair:
    pair = Pair(post, _completion(chosen), _completion(rejected), source)
    if pair.chosen == pair.rejected:
        raise Unusable("equal_texts")
    return pair


def _completion(text: str) -> str:
    if is_blank(text):
        raise Unusable("empty_text")
    return " " + text.strip()
