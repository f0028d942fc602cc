"""The embedded task: a seeded world of toy forum posts, the grammar of their summaries, and an exact oracle.

A post tells five hidden facts, one in each slot (`SLOTS`), among sentences about other people (distractors). A
summary is canonical clauses joined by commas. Because every clause of the grammar is recognized by a regular
expression, the quality of any text against the hidden facts is exact; no model or person is involved.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from prefopt.data.synthetic.lexicon import (
    DAYS,
    FEELINGS,
    NAMES,
    PLACES,
    QUESTION_OBJECTS,
    QUESTION_VERBS,
    REASONS,
    RELATIONS,
    TOPICS,
)

SLOTS = ("event", "setting", "cause", "feeling", "question")  # canonical order
OTHER_FEELING = "other_feeling"  # a clause that only distractors use
HABIT = "habit"  # a clause that says nothing

# Quality.
EVENT_WEIGHT = 2.0
SLOT_WEIGHT = 1.0  # every slot but the event
WRONG_WEIGHT = -1.5
IRRELEVANT_WEIGHT = -1.0
HABIT_WEIGHT = -0.4
WORD_WEIGHT = -0.03
# A text without a single statement in the grammar. Without it silence would beat every writer's total miss.
NO_CLAUSE_WEIGHT = -3.0
TIE_TOLERANCE = 1e-9

# The imperfect writer.
CLAUSE_COUNTS = {1: 0.34, 2: 0.44, 3: 0.16, 4: 0.05, 5: 0.01}  # as far as there are facts left to tell
EVENT_PROBABILITY = 0.8
WRONG_PROBABILITY = 0.08
IRRELEVANT_PROBABILITY = 0.12
HABIT_PROBABILITY = 0.65

# The annotator's temperature, in units of quality: its label agrees with the higher quality about 88% of the time.
ANNOTATOR_TAU = 0.5

# Kinds of pretraining documents.
DOCUMENT_SHARES = {"list": 0.52, "notes": 0.20, "questions": 0.11, "quote": 0.10, "plain": 0.07}
LIST_WORDS = (3, 16)

# The post.
PROMPT_SUFFIX = "\n\nTL;DR:"
POST_WORDS = (60, 95)
DISTRACTOR_COUNTS = (2, 3)
DISTRACTOR_EVENT_PROBABILITY = 0.65  # the first distractor is always an event

CLAUSES = {
    "event": "my {relation} {name} {verb} the {adjective} {object}",
    "setting": "it happened at the {place} on {day}",
    "cause": "because of the {reason}",
    "feeling": "i feel {feeling}",
    "question": "should i {action} the {person}",
    OTHER_FEELING: "my {relation} feels {feeling}",
    HABIT: "long story short",
}

# Sentences by which a post tells a clause. No sentence holds a comma, so that nothing in a post reads like a summary.
_SENTENCES = {
    "event": (
        "my {relation} {name} {verb} the {adjective} {object}.",
        "here is my problem: my {relation} {name} {verb} the {adjective} {object}.",
        "i just learned that my {relation} {name} {verb} the {adjective} {object}.",
        "the {adjective} {object} is what my {relation} {name} {verb}.",
    ),
    "setting": (
        "it happened at the {place} on {day}.",
        "all of this was on {day} at the {place}.",
        "we were at the {place} on {day} when it happened.",
        "on {day} we met at the {place} and then it started.",
    ),
    "cause": (
        "it was all because of the {reason}.",
        "the {reason} was the only reason for this.",
        "people say that the {reason} is what led to it.",
        "without the {reason} we would have no trouble now.",
    ),
    "feeling": (
        "now i feel {feeling} about the whole thing.",
        "since then i have been very {feeling}.",
        "to be honest it makes me {feeling}.",
        "i am still {feeling} and cannot sleep.",
    ),
    "question": (
        "should i {action} the {person} or let it go?",
        "do you think i have to {action} the {person}?",
        "i wonder if it is best to {action} the {person}.",
        "would you {action} the {person} in my place?",
    ),
}
_DISTRACTOR_SENTENCES = {
    "event": (
        "meanwhile my {relation} {name} {verb} the {adjective} {object}.",
        "as for others my {relation} {name} {verb} the {adjective} {object}.",
        "another day my {relation} {name} {verb} the {adjective} {object}.",
    ),
    OTHER_FEELING: (
        "by the way my {relation} feels {feeling} these days.",
        "my {relation} feels {feeling} but that is another story.",
        "for some reason my {relation} is always {feeling}.",
    ),
}
_TITLES = (
    "my {relation} {name} and {topic}",
    "trouble with my {relation} {name} and {topic}",
    "i need advice about my {relation} {name} and {topic}",
    "a story of my {relation} {name} and {topic}",
)
QUESTIONS = {
    "event": "what happened?",
    "setting": "where and when was it?",
    "cause": "why did it happen?",
    "feeling": "how do you feel?",
    "question": "what do you want to know?",
}

_EVERY_VERB = tuple(sorted({verb for topic in TOPICS.values() for verb in topic.verbs}))
_EVERY_ADJECTIVE = tuple(sorted({word for topic in TOPICS.values() for word in topic.adjectives}))
_EVERY_OBJECT = tuple(sorted({word for topic in TOPICS.values() for word in topic.objects}))
_VALUES: dict[str, tuple[str, ...]] = {
    "relation": RELATIONS,
    "name": NAMES,
    "verb": _EVERY_VERB,
    "adjective": _EVERY_ADJECTIVE,
    "object": _EVERY_OBJECT,
    "place": PLACES,
    "day": DAYS,
    "reason": REASONS,
    "feeling": FEELINGS,
    "action": QUESTION_VERBS,
    "person": QUESTION_OBJECTS,
}
_WORDS = tuple(sorted({word for words in _VALUES.values() for word in words}))
_PATTERNS = {
    slot: re.compile(clause.format_map({key: f"(?:{'|'.join(words)})" for key, words in _VALUES.items()}))
    for slot, clause in CLAUSES.items()
}
_SUBREDDITS = tuple(TOPICS)


class Clause(NamedTuple):
    """One statement: its slot (a key of `CLAUSES`) and the values in it."""

    slot: str
    values: dict[str, str]

    def text(self) -> str:
        """The canonical clause."""
        return CLAUSES[self.slot].format_map(self.values)


@dataclasses.dataclass(frozen=True)
class Post:
    """One post with what it hides.

    `told` holds the slots' and distractors' clauses in the order in which the post tells them.
    """

    prompt: str
    facts: dict[str, Clause]
    distractors: tuple[Clause, ...]
    told: tuple[Clause, ...]
    subreddit: str

    @property
    def header(self) -> str:
        """The prompt up to and including the post, without the request for a summary."""
        return self.prompt.removesuffix(PROMPT_SUFFIX)

    def facts_json(self) -> str:
        """The hidden facts as the oracle reads them: each slot's canonical clause, and the distractors'."""
        facts: dict[str, object] = {slot: self.facts[slot].text() for slot in SLOTS}
        facts["distractors"] = [clause.text() for clause in self.distractors]
        return json.dumps(facts)


@dataclasses.dataclass(frozen=True)
class Quality:
    """A text's hidden quality: its score and the number of clauses of each kind."""

    score: float
    correct: int
    wrong: int
    irrelevant: int
    well_formed: bool


def make_post(rng: random.Random) -> Post:
    """Draws one post of 60 to 95 words."""
    subreddit = rng.choice(_SUBREDDITS)
    relations = rng.sample(RELATIONS, 1 + max(DISTRACTOR_COUNTS))
    names = rng.sample(NAMES, 1 + max(DISTRACTOR_COUNTS))
    facts = {
        "event": _event(rng, subreddit, relations[0], names[0]),
        "setting": Clause("setting", {"place": rng.choice(PLACES), "day": rng.choice(DAYS)}),
        "cause": Clause("cause", {"reason": rng.choice(REASONS)}),
        "feeling": Clause("feeling", {"feeling": rng.choice(FEELINGS)}),
        "question": Clause("question", {"action": rng.choice(QUESTION_VERBS), "person": rng.choice(QUESTION_OBJECTS)}),
    }
    distractors = []
    for i in range(1, 1 + rng.choice(DISTRACTOR_COUNTS)):
        if i == 1 or rng.random() < DISTRACTOR_EVENT_PROBABILITY:
            distractors.append(_event(rng, subreddit, relations[i], names[i]))
        else:
            distractors.append(Clause(OTHER_FEELING, {"relation": relations[i], "feeling": rng.choice(FEELINGS)}))
    while True:
        told = [facts[slot] for slot in SLOTS[1:]] + distractors
        rng.shuffle(told)
        told.insert(rng.randrange(2), facts["event"])
        body = tell(rng, told, facts)
        if POST_WORDS[0] <= len(body.split()) <= POST_WORDS[1]:
            break
    title = rng.choice(_TITLES).format(topic=TOPICS[subreddit].phrase, **facts["event"].values)
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}{PROMPT_SUFFIX}"
    return Post(prompt, facts, tuple(distractors), tuple(told), subreddit)


def tell(rng: random.Random, clauses: Sequence[Clause], facts: Mapping[str, Clause]) -> str:
    """A sentence for each clause; one that is not the slot's fact is told as a distractor."""
    return " ".join(
        rng.choice((_SENTENCES if facts.get(c.slot) is c else _DISTRACTOR_SENTENCES)[c.slot]).format_map(c.values)
        for c in clauses
    )


def _event(rng: random.Random, subreddit: str, relation: str, name: str) -> Clause:
    topic = TOPICS[subreddit]
    values = {"relation": relation, "name": name, "verb": rng.choice(topic.verbs)}
    values |= {"adjective": rng.choice(topic.adjectives), "object": rng.choice(topic.objects)}
    return Clause("event", values)


def join_clauses(clauses: Sequence[str]) -> str:
    """The summary that states these canonical clauses, as a completion (it begins with a space)."""
    return " " + ", ".join(clauses) + "."


def write_summary(rng: random.Random, post: Post) -> str:
    """One summary by the imperfect writer, who wrote the references and, independently, both texts of each pair.

    Most summaries begin with a habit of the writer's that nobody likes, so what is most probable is not what is
    preferred. The facts are told in canonical order, and after each the next is any later one. So whether more is to
    come depends on how many have been told, hardly on which: a greedy policy would otherwise write longer summaries
    than the writer.
    """
    clauses = [CLAUSES[HABIT]] if rng.random() < HABIT_PROBABILITY else []
    count = rng.choices(list(CLAUSE_COUNTS), weights=list(CLAUSE_COUNTS.values()))[0]
    told = [0 if rng.random() < EVENT_PROBABILITY else rng.randrange(1, len(SLOTS))]
    while len(told) < count and told[-1] + 1 < len(SLOTS):
        told.append(rng.randrange(told[-1] + 1, len(SLOTS)))
    unused = list(post.distractors)
    rng.shuffle(unused)
    for slot in (SLOTS[i] for i in told):
        fate = rng.random()
        if fate < WRONG_PROBABILITY:
            clauses.append(misremember(rng, post, slot).text())
        elif fate < WRONG_PROBABILITY + IRRELEVANT_PROBABILITY and unused:
            clauses.append(unused.pop().text())
        else:
            clauses.append(post.facts[slot].text())
    return join_clauses(clauses)


def misremember(rng: random.Random, post: Post, slot: str) -> Clause:
    """The slot's clause with one value swapped, for one that a distractor offers where there is such a one."""
    values = dict(post.facts[slot].values)
    offers = [
        (key, other.values[key])
        for other in post.distractors
        for key in values
        if key in other.values and other.values[key] != values[key]
    ]
    if offers:
        key, value = rng.choice(offers)
    else:
        key = rng.choice(list(values))
        value = rng.choice([word for word in _VALUES[key] if word != values[key]])
    # Never a distractor's own clause: those differ from the fact in both the relation and the name.
    return Clause(slot, values | {key: value})


def quality(facts_json: str, text: str) -> Quality:
    """Reads a text with the grammar against the hidden facts.

    Args:
        facts_json: hidden facts as `Post.facts_json` gives them.
        text: a completion; spacing does not count.
    """
    facts = _facts(facts_json)
    clauses, words, well_formed = read_clauses(text)
    correct = wrong = irrelevant = 0
    score = WORD_WEIGHT * words
    told: set[str] = set()
    for chunk, slot in clauses:
        if slot not in SLOTS or slot in told or chunk in facts["distractors"]:
            irrelevant += 1
            score += HABIT_WEIGHT if slot == HABIT else IRRELEVANT_WEIGHT
            continue
        told.add(slot)
        if chunk == facts[slot]:
            correct += 1
            score += EVENT_WEIGHT if slot == "event" else SLOT_WEIGHT
        else:
            wrong += 1
            score += WRONG_WEIGHT
    if says_nothing(clauses):
        score += NO_CLAUSE_WEIGHT
    return Quality(score, correct, wrong, irrelevant, well_formed)


def read_clauses(text: str) -> tuple[list[tuple[str, str | None]], int, bool]:
    """A text's clauses, each with its slot (None outside the grammar); its words; whether the grammar reads it whole."""
    words = text.split()
    line = " ".join(words)
    body = line.removesuffix(".")
    chunks = [part.strip() for part in body.split(",")] if body else []
    clauses = [(chunk, slot_of(chunk)) for chunk in chunks]
    well_formed = bool(clauses) and all(slot is not None for _, slot in clauses) and line.endswith(".")
    return clauses, len(words), well_formed


def says_nothing(clauses: Sequence[tuple[str, str | None]]) -> bool:
    """Whether a text has no clause that states anything."""
    return all(slot in (None, HABIT) for _, slot in clauses)


def compare(facts_json: str, first: str, second: str) -> Literal["first", "second", "tie"]:
    """The oracle's verdict: the text of higher quality, or a tie within `TIE_TOLERANCE`."""
    difference = quality(facts_json, first).score - quality(facts_json, second).score
    if abs(difference) <= TIE_TOLERANCE:
        return "tie"
    return "first" if difference > 0 else "second"


def prefers_first(rng: random.Random, facts_json: str, first: str, second: str) -> bool:
    """The noisy annotator's choice, Bradley-Terry in quality: P(first) = sigmoid((q_first - q_second) / tau)."""
    difference = quality(facts_json, first).score - quality(facts_json, second).score
    return rng.random() < 1 / (1 + math.exp(-difference / ANNOTATOR_TAU))


@functools.lru_cache(maxsize=4096)
def _facts(facts_json: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(facts_json)
    return facts


def slot_of(chunk: str) -> str | None:
    """The slot whose grammar a clause follows, or None."""
    return next((slot for slot, pattern in _PATTERNS.items() if pattern.fullmatch(chunk)), None)


def pretraining_document(rng: random.Random) -> str:
    """One document to pretrain on: words said twice, or a post with what a reader made of it, never with a summary.

    A small model learns nothing else that follows a post until it can copy, and learns that fastest from lists of
    random words, where copying is all there is to learn; notes and questions teach it where the facts are and how a
    clause reads, but not which of them a summary holds.
    """
    kind = rng.choices(list(DOCUMENT_SHARES), list(DOCUMENT_SHARES.values()))[0]
    if kind == "list":
        words = " ".join(rng.sample(_WORDS, rng.randint(*LIST_WORDS)))
        return f"{words}\n\nQUOTE: {words}"
    post = make_post(rng)
    match kind:
        case "notes":
            return f"{post.header}\n\nNOTES: " + " ; ".join(clause.text() for clause in post.told)
        case "questions":
            slots = rng.sample(SLOTS, len(SLOTS))
            return post.header + "".join(f"\n\nQ: {QUESTIONS[slot]} A: {post.facts[slot].text()}" for slot in slots)
        case "quote":
            return f"{post.header}\n\nQUOTE: {post.header.partition('POST: ')[2]}"
        case _:
            return post.header
