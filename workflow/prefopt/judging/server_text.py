"""What a server says, made fit to be kept, logged and shown on a terminal."""

from __future__ import annotations

import re
import unicodedata

# A shorter value of the key's variable is a placeholder ("none", "EMPTY"), and would be found in innocent words.
_SHORTEST_KEY = 6
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def harmless(text: str, key: str | None) -> str:
    """A text without the key, in whatever case it stands there, and without halves of surrogate pairs.

    Everything that a server says goes through here before it is stored, logged, raised or passed on.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if key is None or len(key) < _SHORTEST_KEY:
        return whole
    return re.sub(re.escape(key), "***", whole, flags=re.IGNORECASE)


def one_line(text: str, most: int = 500) -> str:
    """A text on one line of at most `most` characters, without those that a terminal obeys or nobody sees."""
    # The rest of a text of many megabytes need not be looked at.
    line = " ".join(text[: 20 * most].split())
    return "".join(c for c in line if unicodedata.category(c) not in _UNSEEN)[:most].strip()
