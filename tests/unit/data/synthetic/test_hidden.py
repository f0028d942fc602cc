"""Each prompt's texts are held against the world that made it."""

from __future__ import annotations

import json

import pytest

from prefopt.data.synthetic import dialogue_world, hidden, world
from prefopt.errors import UserError

POST = {
    **{"event": "my sister anna broke the old guitar", "setting": "it happened at the wedding on friday"},
    **{"cause": "because of the noise", "feeling": "i feel ashamed", "question": "should i call the landlord"},
    "distractors": ["my boss feels proud"],
}
DIALOGUE = {
    **POST,
    **{"world": "dialogue", "needs": ["event", "feeling"], "feeling": "i feel vulnerable"},
    "event": "my sister anna kept the faded postcard",
}


def test_a_posts_texts_are_scored_as_summaries_and_a_dialogues_as_answers() -> None:
    facts, answered = json.dumps(POST), json.dumps(DIALOGUE)
    assert hidden.world_of(facts) is world and hidden.world_of(answered) is dialogue_world
    assert hidden.quality_score(facts, "p", f" {POST['event']}.") == pytest.approx(2 - 7 * 0.03)
    answer = f" {DIALOGUE['event']}, i feel vulnerable."
    assert hidden.quality_score(answered, "p", answer) == pytest.approx(2 * 2 - 10 * 0.03)
    assert hidden.well_formed(facts, f" {POST['event']}.") is True and hidden.well_formed(facts, "guitar") is False
    assert hidden.well_formed(answered, answer) is True and hidden.well_formed(answered, "postcard") is False


def test_nobody_can_say_how_good_a_text_without_facts_is() -> None:
    with pytest.raises(UserError, match=r"^Prompt 'p7' has no hidden facts, so that nobody can say"):
        hidden.quality_score("", "p7", " text")
    assert hidden.well_formed("", " text") is None
