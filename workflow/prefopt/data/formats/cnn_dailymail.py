"""CNN/DailyMail articles to raw tables: prompts of another domain, on which nothing is trained (section 6.3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.data.formats.examples import Demonstration, completion
from prefopt.data.formats.tldr import own_post, tldr_prompt
from prefopt.data.raw.parsing import Account, Parser, RawTables, Unusable
from prefopt.data.raw.record import Records, text_of
from prefopt.data.raw.splits import PostKeys, is_blank, position

# What is read of each kind of file.
FIELDS: dict[str, tuple[str, ...]] = {"articles": ("article", "highlights")}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_LONGEST_TITLE = 120  # characters
_STATEMENT = "Real records, not synthetic; nothing is trained on them."


def news_prompt(article: str) -> str:
    """An article in the form of the prompts that a policy of the TL;DR task knows, its first sentence as the title.

    The paper prints no prompt for news. Without that form the embedded policies, which have seen no other, break down:
    what is asked is whether they can summarize news, not whether they can read a bare text.
    """
    text = article.strip()
    title = _SENTENCE_END.split(text, maxsplit=1)[0][:_LONGEST_TITLE]
    return tldr_prompt("news", title, text)


def raw_tables(records: Records, *, validation_share: float, max_malformed: int) -> RawTables:
    """Parses all articles; each is a prompt of the validation or the test split.

    Args:
        records: with `article` and `highlights`, see `data.sources`.
        validation_share: share of the articles on which a method's temperature is selected.
        max_malformed: how many malformed records are dropped and counted.

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
    account = Account()
    articles = list(Parser(max_malformed)(records, _article, account))
    keys = PostKeys.of(article for article, _ in articles)
    rows: dict[str, dict[str, Any]] = {}
    for article, highlights in articles:
        key = keys.key(article)
        if key in rows:
            account.drop("duplicate_article")
        else:
            account.keep()
            split = "validation" if position("split", key) < validation_share else "test"
            texts = {"prompt": news_prompt(article), "response": f" {highlights}"}
            rows[key] = {"prompt_id": key, **texts, "split": split, "facts": ""}
    accounts = {"raw_demonstrations": account, "raw_preferences": Account(), "pretraining": Account()}
    return RawTables(list(rows.values()), [], [], accounts, {"synthetic": False, "statement": _STATEMENT})


def parse_article(row: Mapping[str, Any]) -> Demonstration:
    """An article with its highlights, as a prompt of the TL;DR task (raises as `tldr.parse_post` does)."""
    article, highlights = _article(row)
    return Demonstration(own_post(news_prompt(article)), completion(highlights))


def _article(row: Mapping[str, Any]) -> tuple[str, str]:
    article, highlights = (text_of(row, name).strip() for name in ("article", "highlights"))
    if is_blank(article) or is_blank(highlights):
        raise Unusable("empty_text")
    return article, highlights
