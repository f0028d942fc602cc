from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest

from prefopt.data.raw.parsing import RawTables
from prefopt.data.synthetic import lexicon, posts, world

VALUES = {
    "seed": 7,
    "demonstrations": 600,
    "validation_prompts": 100,
    "test_prompts": 300,
    "pairs": 1500,
    "validation_pairs": 100,
    "gold_pairs": 200,
    "gold_test_pairs": 100,
    "pretraining_documents": 4000,
}
NONE = dict.fromkeys(VALUES, 0) | {"seed": 7}

HABIT = "long story short"
EVENT = "my sister anna broke the old guitar"
SETTING = "it happened at the wedding on friday"
CAUSE = "because of the noise"
FEELING = "i feel ashamed"
QUESTION = "should i call the landlord"
OTHER = "my neighbor mark sold the red bicycle"
FACTS = json.dumps(
    {
        "event": EVENT,
        "setting": SETTING,
        "cause": CAUSE,
        "feeling": FEELING,
        "question": QUESTION,
        "distractors": [OTHER, "my boss feels proud"],
    }
)


@pytest.fixture(scope="module")
def tables() -> RawTables:
    return posts.generate(VALUES)


def perfect(facts: str) -> str:
    return world.join_clauses([json.loads(facts)[slot] for slot in world.SLOTS])


def shares(tables: RawTables, write: Callable[[dict[str, Any]], str]) -> tuple[float, float]:
    """Win rate (a tie counts half) and tie rate of texts against the references."""
    verdicts = [world.compare(row["facts"], write(row), row["response"]) for row in tables.demonstrations]
    ties = verdicts.count("tie") / len(verdicts)
    return verdicts.count("first") / len(verdicts) + ties / 2, ties


def test_equal_values_give_equal_tables_and_another_seed_gives_others() -> None:
    few = NONE | {"demonstrations": 5, "pairs": 5, "pretraining_documents": 5}
    assert posts.generate(few) == posts.generate(few)
    assert posts.generate(few).demonstrations != posts.generate(few | {"seed": 8}).demonstrations


def test_the_records_are_those_of_every_version(tables: RawTables) -> None:
    """Models that were trained, and what is written about them, are about these: a change is a new world, and says so."""
    parts = [
        tables.demonstrations[:60],
        tables.demonstrations[-60:],
        tables.preferences[:120],
        tables.pretraining[:150],
    ]
    digests = [sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for part in parts]
    assert digests == ["3865d034e9d5182d", "47f2cd149595080a", "ed886d9effb41add", "f2a2b392a63116fc"]


def test_a_memory_that_fails_takes_what_a_distractor_offers() -> None:
    """One value of the fact is another's of a distractor where there is one, else any other of the kind."""
    swapped = 0
    for seed in range(300):
        post = world.make_post(random.Random(seed))
        for slot in world.SLOTS:
            fact = post.facts[slot]
            wrong = world.misremember(random.Random(seed), post, slot)
            changed = [key for key in fact.values if wrong.values[key] != fact.values[key]]
            assert wrong.slot == slot and wrong.values.keys() == fact.values.keys() and len(changed) == 1
            (key,) = changed
            offered = {c.values[key] for c in post.distractors if key in c.values} - {fact.values[key]}
            shared = any(
                k in c.values and c.values[k] != value for c in post.distractors for k, value in fact.values.items()
            )
            assert (wrong.values[key] in offered) is shared
            assert world.slot_of(wrong.text()) == slot and wrong.text() not in [c.text() for c in post.distractors]
            swapped += shared
    assert 300 < swapped < 1500


def test_the_annotator_is_bradley_terry_in_quality() -> None:
    """A difference of one at a temperature of one half: sigma(2) = 0.881."""
    first, second = f" {EVENT}, {CAUSE}.", f" {EVENT}."
    difference = 1.0 - 4 * 0.03
    chance = 1 / (1 + math.exp(-difference / 0.5))
    rng = random.Random(0)
    chosen = sum(world.prefers_first(rng, FACTS, first, second) for _ in range(4000)) / 4000
    assert chosen == pytest.approx(chance, abs=0.02)
    rng = random.Random(0)
    other = sum(world.prefers_first(rng, FACTS, second, first) for _ in range(4000)) / 4000
    assert other == pytest.approx(1 - chance, abs=0.02)


def test_a_count_changes_no_other_row(tables: RawTables) -> None:
    fewer = posts.generate(NONE | {"demonstrations": 3, "test_prompts": 2, "pairs": 4, "pretraining_documents": 5})
    assert fewer.demonstrations[:3] == tables.demonstrations[:3]
    assert fewer.demonstrations[3:] == tables.demonstrations[700:702]
    assert fewer.preferences == tables.preferences[:4]
    assert fewer.pretraining == tables.pretraining[:5]


def test_no_two_rows_share_a_post_or_an_id(tables: RawTables) -> None:
    rows = [*tables.demonstrations, *tables.preferences]
    texts = [row["prompt"] for row in rows] + tables.pretraining
    posts = [match.group(1) for match in (re.search(r"POST: (.*)", text) for text in texts) if match]
    lists = sum(document_kind(text) == "list" for text in tables.pretraining)
    assert len(set(posts)) == len(posts) == len(texts) - lists
    assert len({row["prompt_id"] for row in rows}) == len(rows)


def test_rows_ids_and_splits(tables: RawTables) -> None:
    assert tables.demonstrations[12]["prompt_id"] == "demo-00012"
    assert tables.preferences[31]["prompt_id"] == tables.preferences[31]["pair_id"] == "pair-00031"
    assert [sum(row["split"] == s for row in tables.demonstrations) for s in ("train", "validation", "test")] == [
        600,
        100,
        300,
    ]
    splits = [row["split"] for row in tables.preferences]
    assert [splits.count(s) for s in ("train", "validation", "gold_train", "gold_test")] == [1500, 100, 200, 100]
    assert all(row["chosen"] != row["rejected"] for row in tables.preferences)
    assert tables.accounts["pretraining"].as_dict() == {"read": 4000, "kept": 4000, "dropped": {}}
    assert tables.notes["synthetic"] is True


def test_prompt_format_and_length(tables: RawTables) -> None:
    for row in tables.demonstrations:
        match = re.fullmatch(r"SUBREDDIT: r/(\w+)\n\nTITLE: ([^\n]+)\n\nPOST: ([^\n]+)\n\nTL;DR:", row["prompt"])
        assert match and match.group(1) in lexicon.TOPICS
        assert 60 <= len(match.group(3).split()) <= 95
        assert match.group(3) == match.group(3).lower()
        assert "," not in match.group(3)


def test_the_post_tells_the_event_among_its_first_two_sentences() -> None:
    for i in range(200):
        post = world.make_post(random.Random(i))
        assert post.facts["event"] in post.told[:2]
        assert len(post.told) == 5 + len(post.distractors)
        assert post.facts["event"].values["name"] in post.prompt.split("POST:")[0]
        for clause in post.told:
            assert all(value in post.prompt.split("POST:")[1] for value in clause.values.values())


def test_every_clause_reads_as_its_own_slot_and_words_are_listed_once() -> None:
    for i in range(500):
        for clause in world.make_post(random.Random(i)).told:
            assert world.slot_of(clause.text()) == clause.slot
    lists = [getattr(lexicon, name) for name in dir(lexicon) if isinstance(getattr(lexicon, name), tuple)]
    lists += [words for topic in lexicon.TOPICS.values() for words in topic[1:]]
    for words in lists:
        assert len(set(words)) == len(words), sorted(word for word in words if words.count(word) > 1)
        assert all(re.fullmatch("[a-z]+", word) for word in words)


@pytest.mark.parametrize(
    ("text", "counts", "well_formed", "score"),
    [
        (f" {EVENT}.", (1, 0, 0), True, 2 - 7 * 0.03),
        (f" {EVENT}, {SETTING}.", (2, 0, 0), True, 2 + 1 - 14 * 0.03),
        (f" {EVENT}, {SETTING}, {CAUSE}, {FEELING}, {QUESTION}.", (5, 0, 0), True, 6 - 26 * 0.03),
        (" my sister mark broke the old guitar.", (0, 1, 0), True, -1.5 - 7 * 0.03),
        (f" {EVENT}, i feel proud.", (1, 1, 0), True, 2 - 1.5 - 10 * 0.03),
        (" my sister mark broke the old guitar, i feel proud.", (0, 2, 0), True, -3 - 10 * 0.03),
        (f" {OTHER}, my boss feels proud.", (0, 0, 2), True, -2 - 11 * 0.03),
        (" my uncle feels sad.", (0, 0, 1), True, -1 - 4 * 0.03),
        (f" {EVENT}, {EVENT}.", (1, 0, 1), True, 2 - 1 - 14 * 0.03),
        (f" {EVENT}, {CAUSE}", (2, 0, 0), False, 3 - 11 * 0.03),
        (f" {EVENT}, what a day.", (1, 0, 1), False, 2 - 1 - 10 * 0.03),
        (f" {EVENT},.", (1, 0, 1), False, 2 - 1 - 7 * 0.03),
        (f" {EVENT}. {CAUSE}.", (0, 0, 1), False, -1 - 3 - 11 * 0.03),
        (f" {EVENT}..", (0, 0, 1), False, -1 - 3 - 7 * 0.03),
        (" guitar sister the broke old.", (0, 0, 1), False, -1 - 3 - 5 * 0.03),
        (f" {HABIT}, {EVENT}, {CAUSE}.", (2, 0, 1), True, 3 - 0.4 - 14 * 0.03),
        (f" {HABIT}.", (0, 0, 1), True, -0.4 - 3 - 3 * 0.03),
        ("", (0, 0, 0), False, -3.0),
        (" .", (0, 0, 0), False, -3 - 0.03),
    ],
)
def test_quality(text: str, counts: tuple[int, int, int], well_formed: bool, score: float) -> None:
    found = world.quality(FACTS, text)
    assert (found.correct, found.wrong, found.irrelevant) == counts
    assert found.well_formed is well_formed
    assert found.score == pytest.approx(score, abs=1e-12)


def test_compare() -> None:
    assert world.compare(FACTS, f" {EVENT}.", f" {OTHER}.") == "first"
    assert world.compare(FACTS, f" {OTHER}.", f" {EVENT}.") == "second"
    assert world.compare(FACTS, f" {EVENT}, {CAUSE}.", f" {CAUSE}, {EVENT}.") == "tie"


def test_the_writer_keeps_to_the_grammar_and_makes_its_mistakes(tables: RawTables) -> None:
    found = [world.quality(row["facts"], row["response"]) for row in tables.demonstrations]
    assert all(quality.well_formed for quality in found)
    habits = sum(row["response"].startswith(f" {HABIT}, ") for row in tables.demonstrations)
    assert habits / len(found) == pytest.approx(world.HABIT_PROBABILITY, abs=0.04)
    statements = sum(q.correct + q.wrong + q.irrelevant for q in found) - habits
    assert sum(q.wrong for q in found) / statements == pytest.approx(world.WRONG_PROBABILITY, abs=0.03)
    irrelevant = sum(q.irrelevant for q in found) - habits
    assert irrelevant / statements == pytest.approx(world.IRRELEVANT_PROBABILITY, abs=0.03)


def test_the_writer_against_itself_wins_half(tables: RawTables) -> None:
    def again(row: dict[str, Any]) -> str:
        i = int(row["prompt_id"].rsplit("-", 1)[1])
        stream = row["prompt_id"].rsplit("-", 1)[0]
        post = world.make_post(random.Random(f"7/{stream}/{i}"))
        assert post.prompt == row["prompt"]
        return world.write_summary(random.Random(f"again/{stream}/{i}"), post)

    win_rate, ties = shares(tables, again)
    assert win_rate == pytest.approx(0.5, abs=0.05)
    assert ties < 0.15


def test_perfect_typical_empty_and_random_texts_against_the_references(tables: RawTables) -> None:
    rng = random.Random(0)
    words = sorted(set(re.findall("[a-z]+", " ".join(tables.pretraining[:500]))))
    assert shares(tables, lambda row: perfect(row["facts"]))[0] > 0.9
    # The writer's most probable text without the habit is the event alone.
    assert 0.5 < shares(tables, lambda row: world.join_clauses([json.loads(row["facts"])["event"]]))[0] < 0.75
    assert shares(tables, lambda row: "")[0] < 0.05
    assert shares(tables, lambda row: " " + " ".join(rng.choices(words, k=12)) + ".")[0] < 0.05
    assert shares(tables, lambda row: " " + ", ".join(rng.choices(words, k=5)) + ".")[0] < 0.05


def test_labels_agree_with_quality_seven_times_in_eight(tables: RawTables) -> None:
    assert tables.notes["annotator_agreement"] == pytest.approx(0.875, abs=0.03)


def document_kind(document: str) -> str:
    """Which of `world.DOCUMENT_SHARES` a pretraining document is, by its form alone."""
    if re.fullmatch(r"(\w+(?: \w+){2,15})\n\nQUOTE: \1", document):
        return "list"
    head = r"SUBREDDIT: r/\w+\n\nTITLE: [^\n]+\n\nPOST: ([^\n]+)"
    tails = {
        "plain": "",
        "notes": r"\n\nNOTES: [^\n]+",
        "questions": r"(\n\nQ: [^\n]+\? A: [^\n]+){5}",
        "quote": r"\n\nQUOTE: \1",
    }
    return next(kind for kind, tail in tails.items() if re.fullmatch(head + tail, document))


def test_pretraining_documents(tables: RawTables) -> None:
    text = tables.pretraining
    assert not any("TL;DR" in document or "," in document for document in text)
    kinds = [document_kind(document) for document in text]
    for kind, share in world.DOCUMENT_SHARES.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.03)
    assert 1200 <= len(set(re.findall("[a-z]+", " ".join(text)))) <= 2000


def test_nothing_asked_gives_empty_tables() -> None:
    tables = posts.generate(NONE)
    assert (tables.demonstrations, tables.preferences, tables.pretraining) == ([], [], [])
    assert tables.notes["annotator_agreement"] is None
