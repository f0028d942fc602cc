"""The embedded dialogues and their exact judge, by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from prefopt.data.synthetic import dialogue_world as world
from prefopt.data.synthetic.dialogues import generate
from prefopt.data.synthetic.hidden import well_formed
from prefopt.judging.judge import Comparison
from prefopt.judging.oracle import OracleJudge
from prefopt.lm.models import load_tokenizer

SHIPPED = Path(__file__).parents[4] / "workflow" / "models" / "tldr_base"
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


def test_ids_splits_and_labels_of_every_table() -> None:
    tables = generate(VALUES)
    demonstrations = Counter(row["split"] for row in tables.demonstrations)
    assert demonstrations == {"train": 20, "validation": 5, "test": 8}
    assert Counter(row["split"] for row in tables.preferences) == {
        **{"train": 60, "validation": 10, "gold_train": 4, "gold_test": 4}
    }
    streams = ("dialogue", "dialogue-validation", "dialogue-test")
    names = [f"{stream}-{i:05d}" for stream, n in zip(streams, (20, 5, 8), strict=True) for i in range(n)]
    assert [row["prompt_id"] for row in tables.demonstrations] == names
    streams = ("talk", "talk-validation", "talk-gold", "talk-gold-test")
    names = [f"{stream}-{i:05d}" for stream, n in zip(streams, (60, 10, 4, 4), strict=True) for i in range(n)]
    assert [row["pair_id"] for row in tables.preferences] == [row["prompt_id"] for row in tables.preferences] == names
    assert {row["source"] for row in tables.preferences} == {"embedded"}
    assert {table: account.as_dict() for table, account in tables.accounts.items()} == {
        "raw_demonstrations": {"read": 33, "kept": 33, "dropped": {}},
        "raw_preferences": {"read": 78, "kept": 78, "dropped": {}},
        "pretraining": {"read": 10, "kept": 10, "dropped": {}},
    }
    assert tables.notes["synthetic"] is True and "not from people" in tables.notes["statement"]
    assert all(set(row) == {"prompt_id", "prompt", "response", "split", "facts"} for row in tables.demonstrations)
    # Every table has draws of its own, and every row of a table.
    texts = [row["prompt"] for row in (*tables.demonstrations, *tables.preferences)] + list(tables.pretraining)
    assert len(set(texts)) == len(texts)
    assert generate({**VALUES, "seed": 1}).preferences != tables.preferences
    assert tables.pretraining == generate({**VALUES, "seed": 0, "pairs": 0}).pretraining


def test_the_records_are_those_of_every_version() -> None:
    tables = generate(VALUES)
    parts = [tables.demonstrations, tables.preferences, tables.pretraining]
    assert [sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for part in parts] == [
        "3656e37cdd114bf2",
        "00977b2bb43ec663",
        "1d93f361fc1ee5a8",
    ]


def test_labels_agree_with_the_needs_as_often_as_the_notes_say() -> None:
    """The agreement is that of the pairs whose answers are not equally good."""
    tables = generate({**VALUES, "pairs": 300})
    agrees = []
    for i, row in enumerate(tables.preferences[:300]):
        facts = world.make_dialogue(random.Random(f"0/talk/{i}")).facts_json()
        chosen, rejected = (world.quality(facts, row[side]).score for side in ("chosen", "rejected"))
        if abs(chosen - rejected) > 1e-9:
            agrees.append(chosen > rejected)
    assert 200 < len(agrees) < 300
    only = generate({**dict.fromkeys(VALUES, 0), "pairs": 300})
    assert only.notes["annotator_agreement"] == pytest.approx(sum(agrees) / len(agrees))
    assert generate(dict.fromkeys(VALUES, 0)).notes["annotator_agreement"] is None


def test_the_shipped_base_reads_every_dialogue_whole() -> None:
    tokenizer = load_tokenizer(SHIPPED)
    for row in generate(VALUES).preferences:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.decode(ids) == row["prompt"] and len(ids) <= 160
