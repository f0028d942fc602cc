"""Film reviews with their labels, as the published IMDb data have them."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from prefopt.data.raw.parsing import Account, Parser, Unusable
from prefopt.data.raw.record import Malformed, Records, text_of
from prefopt.data.raw.splits import PostKeys, check_shares, is_blank, split_of

UNLABELLED = -1
_LABELS = {"pos": 1, "positive": 1, "1": 1, "neg": 0, "negative": 0, "0": 0, "": UNLABELLED, "-1": UNLABELLED}
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Review:
    """A review's text; the label is 1 (positive), 0 (negative) or -1 (none)."""

    text: str
    label: int


def parse_review(row: Mapping[str, Any]) -> Review:
    """A record with `text` and `label`; a label that is empty or missing is none.

    Raises:
        Malformed: the text is no text, or the label is no label.
        Unusable: "empty_text".
    """
    text, given = text_of(row, "text"), row.get("label")
    label = UNLABELLED if given is None else _LABELS.get(str(given).strip().lower())
    if label is None:
        raise Malformed(f"'label' is {reprlib.repr(given)}, which is neither 1, 0, pos, neg nor -1")
    # Stripped part by part: a pattern with the white space before a break takes for ever on a text of blanks.
    text = "\n".join(part.strip() for part in _LINE_BREAK.split(text)).strip()
    if is_blank(text):
        raise Unusable("empty_text")
    return Review(text, label)


def raw_reviews(
    records: Records, splits: Mapping[str, float], max_malformed: int
) -> tuple[list[dict[str, Any]], Account]:
    """Rows of raw_reviews: each text once, labelled ones first, split by a hash of the text.

    Unlabelled reviews are all of the training split: nothing is evaluated on them.

    Args:
        records: see `data.sources`.
        splits: share of the labelled reviews of train, validation and test.
        max_malformed: how many malformed records are dropped and counted.

    Returns:
        The rows, and the account: dropped are "malformed", "empty_text" and "duplicate_text".

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
    check_shares(splits)
    account = Account()
    reviews = list(Parser(max_malformed)(records, parse_review, account))
    keys = PostKeys.of(review.text for review in reviews)
    rows: dict[str, dict[str, Any]] = {}
    # An unlabelled copy of a labelled review gives way to it.
    for review in sorted(reviews, key=lambda review: review.label == UNLABELLED):
        name = keys.key(review.text)
        if name in rows:
            account.drop("duplicate_text")
        else:
            account.keep()
            split = "train" if review.label == UNLABELLED else split_of(name, splits)
            rows[name] = {"review_id": name, "text": review.text, "label": review.label, "split": split}
    return list(rows.values()), account
