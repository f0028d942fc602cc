"""CNN/DailyMail articles to raw tables: prompts of another domain, on which nothing is trained (section 6.3)."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from prefopt.data.raw import Account, RawTables
from prefopt.data.sources import Malformed, Records
from prefopt.data.splits import content_hash, position
from prefopt.data.tldr import tldr_prompt
from prefopt.errors import UserError

logger = logging.getLogger(__name__)

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
    account, malformed = Account(), 0
    rows: dict[str, dict[str, Any]] = {}
    for where, row in records:
        try:
            if isinstance(row, Malformed):
                raise row
            article, highlights = _text(row, "article"), _text(row, "highlights")
        except Malformed as problem:
            malformed += 1
            if malformed > max_malformed:
                raise UserError(
                    f"{where}: {problem}; correct the record, or raise data.max_malformed, now {max_malformed}."
                ) from problem
            logger.warning("%s: %s; the record is dropped", where, problem)
            account.drop("malformed")
            continue
        key = content_hash(article)
        if not article or not highlights:
            account.drop("empty_text")
        elif key in rows:
            account.drop("duplicate_article")
        else:
            account.keep()
            split = "validation" if position("split", key) < validation_share else "test"
            texts = {"prompt": news_prompt(article), "response": f" {highlights}"}
            rows[key] = {"prompt_id": key, **texts, "split": split, "facts": ""}
    accounts = {"raw_demonstrations": account, "raw_preferences": Account(), "pretraining": Account()}
    return RawTables(list(rows.values()), [], [], accounts, {"synthetic": False, "statement": _STATEMENT})


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {reprlib.repr(value)}, which is not text")
    return value.strip()
