"""TL;DR records in their published formats, and plain rows of the user's own, to raw tables.

Formats: the filtered TL;DR posts (Syed et al. 2018; Stiennon et al. 2020), `id, subreddit, title, post, summary`;
OpenAI's summarize-from-feedback comparisons, `info{id, post, title, subreddit}, summaries[2]{text}, choice`; plain
demonstrations, `prompt, response`; plain pairs, `prompt, chosen, rejected`. Other fields are ignored.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from prefopt.data.formats.examples import Demonstration, Pair, Post, completion, pair, tables_of
from prefopt.data.raw.parsing import Account, Parser, RawTables, Unusable
from prefopt.data.raw.record import Malformed, Records, field_of, text_of
from prefopt.data.raw.splits import content_hash, identity, is_blank

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


def raw_tables(
    records: Mapping[str, Records], *, splits: Mapping[str, float], gold_fraction: float, max_malformed: int
) -> RawTables:
    """Parses all records and splits them by post.

    Args:
        records: for each of "posts", "demonstrations", "comparisons" and "preferences" its records; any may lack.
        splits: share of the posts of train, validation and test.
        gold_fraction: share of the posts with pairs.
        max_malformed: how many malformed records, over all files, are dropped and counted.

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
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
    return tables_of(demonstrations, pairs, accounts, splits=splits, gold_fraction=gold_fraction)


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
    return Demonstration(_post(row), completion(summary), "posts")


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
    return pair(_post(info), texts[choice], texts[1 - choice], "comparisons")


def parse_demonstration(row: Mapping[str, Any]) -> Demonstration:
    """A row of the user's own: `prompt, response` (raises as `parse_post` does)."""
    prompt, response = text_of(row, "prompt"), text_of(row, "response")
    return Demonstration(own_post(prompt), completion(response), "demonstrations")


def parse_preference(row: Mapping[str, Any]) -> Pair:
    """A row of the user's own: `prompt, chosen, rejected` (raises as `parse_comparison` does)."""
    prompt, chosen, rejected = (text_of(row, name) for name in ("prompt", "chosen", "rejected"))
    return pair(own_post(prompt), chosen, rejected, "preferences")


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
    return _summarized(tldr_prompt(subreddit, title, post), _document(title, post), post_id or None)


def own_post(prompt: str) -> Post:
    """A prompt of the user's own. Where it ends with TL;DR: after whatever white space, it ends with the `SUFFIX`, which
    no cut removes."""
    prompt = prompt.strip()
    bare, last = prompt.rstrip(_INVISIBLE_ENDS), SUFFIX.strip()
    body = bare.removesuffix(SUFFIX if bare.endswith(SUFFIX) else last)
    if is_blank(body):
        raise Unusable("no_post")
    if not bare.endswith(last):
        return _summarized(prompt, prompt)
    if not bare.endswith(SUFFIX):
        body = body.rstrip()
    for gap in ("\n\n", "\n", " "):
        if parts := _title_and_post(body, gap):
            # The same content as the published record of the post has, so that both have one key.
            return _summarized(body + SUFFIX, _document(*parts))
    return _summarized(body + SUFFIX, body)


def _summarized(prompt: str, document: str, post_id: str | None = None) -> Post:
    """A post that is known by its title and text, whatever white space the task's format was written with."""
    text = identity(prompt).removesuffix(identity(SUFFIX))
    title, post = _title_and_post(text, "") or ("", text)
    return Post(post_id, prompt, document, content_hash(title + post))


def _title_and_post(text: str, gap: str) -> tuple[str, str] | None:
    """Title and post of a prompt in the task's format, whose parts stand apart by `gap`; None if it is in none."""
    head, title_mark, rest = text.partition(f"{gap}TITLE:")
    title, post_mark, post = rest.partition(f"{gap}POST:")
    return (title, post) if head.startswith("SUBREDDIT:") and title_mark and post_mark else None


def _document(title: str, post: str) -> str:
    return f"{title.strip()}\n\n{post.strip()}"
