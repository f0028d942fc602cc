"""What a table loses: more than a tenth of it for one reason is told wherever the table's numbers are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LARGE_SHARE = 0.1
# No loss: copies, and records that are put aside or left out because the experiment asks for it.
_WANTED = (
    *("reserved_for_gold", "test_split", "more_than_one_turn", "unlabelled", "duplicate_"),
    *("left_out_by_mixing", "tie", "prompt_alone"),
)
# What is at fault, and the key of the task's section that changes it.
_CAUSES = {
    "completion_too_long": ("have a completion that does not fit", "raise lengths.max_length"),
    "prompt_too_long": ("have a last turn that does not fit", "raise lengths.max_prompt_length"),
    "refused_by_template": ("are conversations that the base's chat template does not take", ""),
    "reference_too_long": ("have a reference that does not fit", "raise lengths.max_length"),
    "too_short": ("have nothing left after the prefix", "lower lengths.max_prefix"),
    "equal_after_tokenization": ("have two completions with the same tokens", ""),
    "malformed": ("are malformed", ""),
    "empty_text": ("have no text", ""),
    "unpaired": ("have a thumb up or down and no counterpart for the same prompt, from which KTO alone learns", ""),
    "scores_too_close": ("have no two scores so far apart", "lower data.pairs.margin"),
}


def loss_warnings(task: str, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each reason for which a table loses more than a tenth of its records.

    Args:
        task: its name in the config, for the key that is to change.
        tables: by name, accounts with `read` and `dropped` (a count by reason).
    """
    for name, account in tables.items():
        dropped = account["dropped"]
        wanted = sum(count for reason, count in dropped.items() if reason.startswith(_WANTED))
        for reason, count in dropped.items():
            if reason.startswith(_WANTED) or count <= _LARGE_SHARE * (account["read"] - wanted):
                continue
            fault, remedy = _CAUSES.get(reason, (f"are dropped for the reason {reason}", ""))
            verb, _, key = remedy.partition(" ")
            advice = f"; {verb} tasks.{task}.{key}" if remedy else ""
            yield (
                f"{count:,} of {account['read']:,} records of {name} ({count / account['read']:.0%}) are lost: they "
                f"{fault}{advice}."
            )
