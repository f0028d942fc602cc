from __future__ import annotations

import json

import pytest

from prefopt.data.synthetic import dialogue_world, dialogues, world
from prefopt.data.synthetic.hidden import quality_score, well_formed
from prefopt.errors import UserError
from prefopt.judging.judge import Comparison, Verdict
from prefopt.judging.oracle import OracleJudge


def test_a_prompt_without_facts_is_refused() -> None:
    with pytest.raises(UserError, match=r"'p'.*the task's judge\.kind"):
        OracleJudge().compare([Comparison("p", "prompt", "", "a", "b")])


def test_where_there_is_no_grammar_nothing_is_well_formed_or_ill_formed() -> None:
    assert well_formed("", " any text") is None


POST = json.dumps(
    {
        **{"event": "my sister anna broke the old guitar", "setting": "it happened at the wedding on friday"},
        **{"cause": "because of the noise", "feeling": "i feel ashamed", "question": "should i call the landlord"},
        "distractors": ["my neighbor mark sold the red bicycle", "my boss feels proud"],
    }
)


def test_the_text_that_tells_more_of_the_facts_wins_in_either_place() -> None:
    good, bad = " my sister anna broke the old guitar, i feel ashamed", " my neighbor mark sold the red bicycle"
    better, worse = (world.quality(POST, text).score for text in (good, bad))
    assert better > worse
    judge = OracleJudge()
    first, second, tie = judge.compare(
        [Comparison("p", "prompt", POST, *texts) for texts in ((good, bad), (bad, good), (good, good))]
    )
    assert first == Verdict("first", f"first {better:.4f}, second {worse:.4f}")
    assert second == Verdict("second", f"first {worse:.4f}, second {better:.4f}")
    assert tie == Verdict("tie", f"first {better:.4f}, second {better:.4f}")
    assert quality_score(POST, "p", good) == better and judge.report() == {}
    with pytest.raises(UserError, match=r"^Prompt 'p' has no hidden facts"):
        quality_score("", "p", good)


def test_a_dialogues_facts_are_read_by_the_world_of_dialogues() -> None:
    sizes = ("seed", "validation_prompts", "test_prompts", "pairs", "validation_pairs", "gold_pairs", "gold_test_pairs")
    counts = dict.fromkeys((*sizes, "pretraining_documents"), 0)
    (row,) = dialogues.generate({**counts, "demonstrations": 1}).demonstrations
    assert well_formed(row["facts"], row["response"]) is True and well_formed(row["facts"], " and or") is False
    expected = dialogue_world.quality(row["facts"], row["response"]).score
    assert quality_score(row["facts"], "p", row["response"]) == expected
