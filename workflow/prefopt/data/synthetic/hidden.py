"""What is hidden behind an embedded prompt: the world that made it, and how good a text is there."""

from __future__ import annotations

import json
from types import ModuleType

from prefopt.data.synthetic import dialogue_world, world
from prefopt.errors import UserError


def quality_score(facts: str, prompt_id: str, text: str) -> float:
    """The hidden quality of a text.

    Raises:
        UserError: the prompt has no hidden facts, because its records are not the embedded ones.
    """
    if not facts:
        raise UserError(f"Prompt {prompt_id!r} has no hidden facts, so that nobody can say how good its texts are.")
    return float(world_of(facts).quality(facts, text).score)


def well_formed(facts: str, text: str) -> bool | None:
    """Whether the generator's grammar parses the text whole; None where the prompt has no facts or grammar."""
    return bool(world_of(facts).quality(facts, text).well_formed) if facts else None


def world_of(facts: str) -> ModuleType:
    """The world that hid these facts: dialogues name theirs, posts and news have the first one's."""
    return dialogue_world if json.loads(facts).get("world") == dialogue_world.NAME else world
