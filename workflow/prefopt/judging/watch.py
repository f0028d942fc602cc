"""Whether an endpoint answers at all: what is paid, or refused, pair after pair without a word is not asked to the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.errors import UserError
from prefopt.judging.replies import is_complete
from prefopt.judging.server_text import one_line
from prefopt.judging.verdict_store import REFUSED, Reply, VerdictStore

_IN_A_ROW = 10  # pairs without a word, after which it is not the pairs; an endpoint's filter refuses single ones
_WITHOUT_WINNER = 10  # first pairs without a winner, after which that is said

logger = logging.getLogger(__name__)


class Watch:
    """Notes what became of each pair.

    A refusal (for a pair's content or length) is kept, so that the pair counts as invalid ever after, only once the
    endpoint has answered for another pair: otherwise it may be the model's name or a value that it refuses.

    Args:
        judge: its name, for messages.
        store: where replies are kept.
        answered: whether the same question was answered for another pair before.
    """

    def __init__(self, judge: str, store: VerdictStore, answered: bool) -> None:
        self.answered = answered
        self._judge, self._store = judge, store
        self._lock = threading.Lock()
        self._silent: list[tuple[str, Mapping[str, Any], Reply]] = []
        self._pairs = 0
        self._named = False  # a winner, by any pair

    def note(self, prompt_id: str, request: Mapping[str, Any], replies: Sequence[Reply], named: bool) -> None:
        """Takes what became of a pair.

        Args:
            prompt_id: the pair's prompt.
            request: of its last reply.
            replies: all its replies.
            named: whether the last names a winner.

        Raises:
            UserError: too many pairs in a row were left without a word.
        """
        with self._lock:
            self._pairs += 1
            self._named |= named
            if any(reply.says_something for reply in replies):
                self.answered = True
                self._settle()
            else:
                self._silent.append((prompt_id, request, replies[-1]))
                if len(self._silent) >= _IN_A_ROW:
                    self._stop()
            if self._pairs == _WITHOUT_WINNER and not self._named:
                last = replies[-1]
                logger.warning(
                    "%s: none of the first %d pairs got a winner; the last reply (finish_reason %r) begins: %s",
                    *(self._judge, self._pairs, last.finish_reason, one_line(last.text, 200) or "nothing"),
                )

    def end(self) -> None:
        """Settles what is open after the last pair.

        Raises:
            UserError: no pair at all got a word.
        """
        with self._lock:
            if self._silent and not self.answered:
                self._stop()
            self._settle()

    def _settle(self) -> None:
        """Others are answered, so that it lies with the pairs: they count as invalid."""
        for prompt_id, request, reply in self._silent:
            if reply.finish_reason == REFUSED:
                self._store.put(request, reply)
                logger.warning(
                    "%s: refused for the prompt %r, whose pair counts as invalid (%s)",
                    *(self._judge, prompt_id, reply.text),
                )
        self._silent = []

    def _stop(self) -> None:
        named = ", ".join(repr(prompt_id) for prompt_id, _, _ in self._silent[:5])
        more = f" and {len(self._silent) - 5} more" if len(self._silent) > 5 else ""
        last = self._silent[-1][2]
        if last.finish_reason == REFUSED:
            advice = f"({last.text}); check judge.chat.model and the values that are sent"
        else:
            said = one_line(last.text, 200) or "a reply without text"
            advice = f"(finish_reason {last.finish_reason!r}: {said})"
            if not is_complete(last.finish_reason):
                advice += "; a higher judge.chat.max_tokens may help"
        raise UserError(
            f"{self._judge}: the call cannot succeed {advice}: so it was for {len(self._silent)} pairs in a row, those "
            f"of the prompts {named}{more}; verdicts so far are kept."
        ) from None
