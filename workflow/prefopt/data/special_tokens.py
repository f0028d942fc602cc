"""Special tokens that stand in records as text, and a base's chat template: neither is trained on in silence.

Texts are tokenized as plain text, so that "<|im_start|>" in a record is many tokens and not the one that the base knows.
Records that a chat template has written would be learned as garbage. A few real records hold such a token as text (of 309
comparisons of news summaries 11 hold "<|endoftext|>"): where prompts are plain text they are dropped and counted, and in
the turns of a chat they stay text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.lm.chat import special_tokens

logger = logging.getLogger(__name__)

REASON = "special_token_in_text"
# More than this share of a table is no accident but a format.
_MOST = 0.1


def with_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[Any, Any]],
    key: str,
    columns: Sequence[str],
    path: Path,
    *,
    kept: bool = False,
) -> set[str]:
    """Ids of the rows that hold a special token as text, the first of which a warning names.

    Args:
        tokenizer: the base's.
        rows: of a raw table.
        key: column of the ids.
        columns: the texts.
        path: of the table, for messages.
        kept: whether they stay, as text.

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
            f"{told}, and so do {len(found)} of {len(rows)} records in all, as where a chat template was applied before: "
            f"give the turns themselves as messages (docs/chat.md), or plain text without the base's special tokens."
        )
    became = "hold one, which stays text" if kept else f"are dropped for this ({REASON})"
    logger.warning("%s; %d of %d records %s", told, len(found), len(rows), became)
    return set(found)


def warn_of_template(tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """Logs that a base was trained on a chat template that its prompts will not follow."""
    if tokenizer.chat_template is not None:
        logger.warning(
            "%s has a chat template (the tokenizer's chat_template), which is not used: its prompts are plain text, "
            "which such a model may not go on with or end as it was trained to (docs/chat.md)",
            model,
        )
