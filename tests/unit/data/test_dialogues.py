"""The embedded dialogues and their exact judge, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from prefopt.data import dialogue_world as world
from prefopt.data.dialogues import generate
from prefopt.judging.judge import Comparison
from prefopt.judging.oracle import OracleJudge, well_formed
from prefopt.lm.models import load_tokenizer

SHIPPED = Path(__file__).parents[3] / "workflow" / "models" / "tldr_base"
VALUES = {
    "seed": 0,
    "demonstrations": 20,
    "validation_prompts": 5,
    "test_prompts": 8,
    "pairs": 60,
    "validation_pairs": 10,
    "gold_pairs": 4,
    "gold_test_pairs": 4,
    "pretraining_documents": 10,
}
FACTS = json.dumps(
    {
        "world": "dialogue",
        "needs": ["event", "feeling"],
        "event": "my sister anna kept the faded postcard",
        "setting": "it happened at the pool on friday",
        "cause": "because of the storm",
        "feeling": "i feel vulnerable",
        "question": "should i call the postman",
        "distractors": ["my teacher patrick burned the secret locket"],
    }
)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("my sister anna kept the faded postcard, i feel vulnerable.", 2 * 2.0 - 0.03 * 10),
        ("my sister anna kept the faded postcard.", 2.0 - 0.03 * 7),
        ("it happened at the pool on friday.", -0.5 - 0.03 * 7),  # nobody asked
        ("i feel cautious.", -1.5 - 0.03 * 3),  # wrong
        ("my teacher patrick burned the secret locket.", -1.0 - 0.03 * 7),  # about somebody else
        ("long story short, i feel vulnerable.", 2.0 - 0.4 - 0.03 * 6),
        ("i feel vulnerable, i feel vulnerable.", 2.0 - 1.0 - 0.03 * 6),  # said twice
        ("good luck.", -1.0 - 3.0 - 0.03 * 2),
        ("", -3.0),
    ],
)
def test_quality_by_hand(answer: str, score: float) -> None:
    assert world.quality(FACTS, answer).score == pytest.approx(score)


def test_the_oracle_judges_a_dialogue_by_its_needs() -> None:
    comparison = Comparison("p", "prompt", FACTS, "i feel vulnerable.", "it happened at the pool on friday.")
    (verdict,) = OracleJudge().compare([comparison])
    assert verdict.winner == "first"
    assert well_formed(FACTS, "i feel vulnerable.") is True and well_formed(FACTS, "hm") is False


def test_dialogues_ask_for_what_was_told() -> None:
    for seed in range(100):
        dialogue = world.make_dialogue(random.Random(seed))
        facts = json.loads(dialogue.facts_json())
        assert set(dialogue.needs) <= set(dialogue.told) and 1 <= len(dialogue.needs) <= 2
        assert dialogue.prompt.count(world.HUMAN) == dialogue.turns and dialogue.prompt.endswith(world.ASSISTANT)
        perfect = " " + ", ".join(facts[slot] for slot in dialogue.needs) + "."
        best = world.quality(dialogue.facts_json(), perfect)
        assert best.correct == len(dialogue.needs) and best.well_formed
        answer = world.write_answer(random.Random(seed), dialogue)
        assert world.quality(dialogue.facts_json(), answer).score <= best.score


def test_the_tables_are_seeded_and_counts_are_as_asked() -> None:
    tables = generate(VALUES)
    assert len(tables.demonstrations) == 33 and len(tables.preferences) == 78 and len(tables.pretraining) == 10
    assert tables.demonstrations == generate({**VALUES, "pairs": 1}).demonstrations
    assert 0.7 < tables.notes["annotator_agreement"] < 1
    assert all(row["prompt"].count(world.HUMAN) == 1 for row in tables.demonstrations)
    assert {row["prompt"].count(world.HUMAN) for row in tables.preferences} == {1, 2}
    assert all(row["chosen"] != row["rejected"] for row in tables.preferences)


def test_the_shipped_base_reads_every_dialogue_whole() -> None:
    tokenizer = load_tokenizer(SHIPPED)
    for row in generate(VALUES).preferences:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.decode(ids) == row["prompt"] and len(ids) <= 160
