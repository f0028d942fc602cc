"""Special tokens that stand in records as text, and a base's chat template: neither is trained on in silence.

Texts are tokenized as plain text, so that "<|im_start|>" in a record is many tokens and not the one that the base knows.
Records of a chat would be learned as garbage. A few real records hold such a token as text (of 309 comparisons of news
summaries 11 hold "<|endoftext|>"); they are dropped and counted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError

logger = logging.getLogger(__name__)

REASON = "special_token_in_text"
# More than this share of a table is no accident but a format.
_MOST = 0.1


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer keeps for itself, the longest first."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *map(str, tokenizer.all_special_tokens)} - {""}, key=lambda token: (-len(token), token))


def with_special_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[Any, Any]], key: str, columns: Sequence[str], path: Path
) -> set[str]:
    """Ids of the rows that hold a special token as text, the first of which a warning names.

    Args:
        tokenizer: the base's.
        rows: of a raw table.
        key: column of the ids.
        columns: the texts.
        path: of the table, for messages.

    Raises:
        UserError: they are more than a tenth of the rows.
    """
    pattern = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
    found: dict[str, str] = {}
    for row in rows:
        if match := next((match for name in columns if (match := pattern.search(row[name]))), None):
            found[row[key]] = match[0]
    if not found:
        return set()
    first, token = next(iter(found.items()))
    told = f"{path}: {first!r} holds {token!r}, a special token of {tokenizer.name_or_path}, as text"
    if len(found) > _MOST * len(rows):
        raise UserError(
            f"{told}, and so do {len(found)} of {len(rows)} records in all: records of a chat are not taken; give plain "
            f"text, without the base's special tokens."
        )
    logger.warning("%s; %d of %d records are dropped for this (%s)", told, len(found), len(rows), REASON)
    return set(found)


def warn_of_template(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """Logs that a base was trained on a chat template that its prompts will not follow."""
    if tokenizer.chat_template is not None:
        logger.warning(
            "%s has a chat template (the tokenizer's chat_template), which is not used: its prompts are plain text, "
            "which such a model may not go on with or end as it was trained to; a base without one is meant here",
            model,
        )
