"""The embedded dialogues: people who tell of their trouble and ask, assistants who answer, and an exact judge.

A dialogue hides facts as a post of `prefopt.data.synthetic.world` does. The human tells some of them, and something about
somebody else, and then asks one or two questions: these are the needs. A helpful answer states the facts that were
asked for, in clauses of the same grammar, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from prefopt.data.synthetic import world

NAME = "dialogue"

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

# The trouble: the event, so many other facts, and one event of somebody else's.
OTHER_FACTS = 2
NEEDS = {1: 0.55, 2: 0.45}
SECOND_TURN_PROBABILITY = 0.3

# Quality of an answer.
NEED_WEIGHT = 2.0
UNASKED_WEIGHT = -0.5
WRONG_WEIGHT = -1.5
IRRELEVANT_WEIGHT = -1.0

# The imperfect assistant, of whom what is most probable is not what is preferred: mostly a habit that nobody likes
# comes first, and at the end something that nobody asked for.
SKIP_PROBABILITY = 0.4  # of a need, the last of them excepted
WRONG_PROBABILITY = 0.08
IRRELEVANT_PROBABILITY = 0.12
UNASKED_PROBABILITY = 0.5
HABIT_PROBABILITY = 0.65


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """What was said up to the answer that is wanted, and what it hides; `prompt` ends with `ASSISTANT`."""

    prompt: str
    turns: int
    post: world.Post
    told: tuple[str, ...]
    needs: tuple[str, ...]

    def facts_json(self) -> str:
        """The hidden facts as the oracle reads them."""
        return json.dumps({"world": NAME, "needs": self.needs, **json.loads(self.post.facts_json())})


def make_dialogue(rng: random.Random, turns: int | None = None) -> Dialogue:
    """Draws one dialogue of one or two questions by the human, of each a turn; None leaves their number to chance."""
    if turns is None:
        turns = 1 + (rng.random() < SECOND_TURN_PROBABILITY)
    post = world.make_post(rng)
    told = ("event", *rng.sample(world.SLOTS[1:], OTHER_FACTS))
    clauses = [*(post.facts[slot] for slot in told), post.distractors[0]]
    rng.shuffle(clauses)
    needs = _needs(rng, told)
    trouble = world.tell(rng, clauses, post.facts)
    first = Dialogue(f"{HUMAN} {trouble} {_questions(needs)}{ASSISTANT}", 1, post, told, needs)
    if turns == 1:
        return first
    needs = _needs(rng, [slot for slot in told if slot not in first.needs])
    prompt = f"{first.prompt}{write_answer(rng, first)}{HUMAN} {_questions(needs)}{ASSISTANT}"
    return Dialogue(prompt, 2, post, told, needs)


def write_answer(rng: random.Random, dialogue: Dialogue) -> str:
    """One answer by the imperfect assistant, who wrote both answers of each pair."""
    post, needs = dialogue.post, dialogue.needs
    clauses = [world.CLAUSES[world.HABIT]] if rng.random() < HABIT_PROBABILITY else []
    said = [slot for slot in needs if rng.random() >= SKIP_PROBABILITY] or [needs[-1]]
    for slot in said:
        fate = rng.random()
        if fate < WRONG_PROBABILITY:
            clauses.append(world.misremember(rng, post, slot).text())
        elif fate < WRONG_PROBABILITY + IRRELEVANT_PROBABILITY:
            clauses.append(post.distractors[0].text())
        else:
            clauses.append(post.facts[slot].text())
    if rng.random() < UNASKED_PROBABILITY:
        clauses.append(post.facts[rng.choice([slot for slot in dialogue.told if slot not in needs])].text())
    return world.join_clauses(clauses)


def quality(facts_json: str, text: str) -> world.Quality:
    """Reads an answer with the grammar against the hidden facts and needs.

    A need that is met counts `NEED_WEIGHT`, a fact that nobody asked for `UNASKED_WEIGHT`, a wrong one
    `WRONG_WEIGHT`, anything else `IRRELEVANT_WEIGHT` (a habit `world.HABIT_WEIGHT`), each word `world.WORD_WEIGHT`,
    and an answer that says nothing `world.NO_CLAUSE_WEIGHT`.
    """
    facts = _facts(facts_json)
    clauses, words, well_formed = world.read_clauses(text)
    score = world.WORD_WEIGHT * words
    correct = wrong = irrelevant = 0
    told: set[str] = set()
    for chunk, slot in clauses:
        if slot not in world.SLOTS or slot in told or chunk in facts["distractors"]:
            irrelevant += 1
            score += world.HABIT_WEIGHT if slot == world.HABIT else IRRELEVANT_WEIGHT
            continue
        told.add(slot)
        if chunk != facts[slot]:
            wrong += 1
            score += WRONG_WEIGHT
        elif slot in facts["needs"]:
            correct += 1
            score += NEED_WEIGHT
        else:
            irrelevant += 1
            score += UNASKED_WEIGHT
    if world.says_nothing(clauses):
        score += world.NO_CLAUSE_WEIGHT
    return world.Quality(score, correct, wrong, irrelevant, well_formed)


def compare(facts_json: str, first: str, second: str) -> Literal["first", "second", "tie"]:
    """The oracle's verdict: the answer of higher quality, or a tie within `world.TIE_TOLERANCE`."""
    difference = quality(facts_json, first).score - quality(facts_json, second).score
    if abs(difference) <= world.TIE_TOLERANCE:
        return "tie"
    return "first" if difference > 0 else "second"


def prefers_first(rng: random.Random, facts_json: str, first: str, second: str) -> bool:
    """The noisy annotator's choice, Bradley-Terry in quality as in `world.prefers_first`."""
    difference = quality(facts_json, first).score - quality(facts_json, second).score
    return rng.random() < 1 / (1 + math.exp(-difference / world.ANNOTATOR_TAU))


def pretraining_document(rng: random.Random) -> str:
    """One document to pretrain on: as often one of `world.pretraining_document` as a dialogue that goes on."""
    if rng.random() < 0.5:
        return world.pretraining_document(rng)
    dialogue = make_dialogue(rng, turns=2)
    return dialogue.prompt.strip() + write_answer(rng, dialogue)


def _needs(rng: random.Random, answerable: Sequence[str]) -> tuple[str, ...]:
    count = min(rng.choices(list(NEEDS), list(NEEDS.values()))[0], len(answerable))
    return tuple(sorted(rng.sample(answerable, count), key=world.SLOTS.index))


def _questions(needs: tuple[str, ...]) -> str:
    return " ".join(world.QUESTIONS[slot] for slot in needs)


@functools.lru_cache(maxsize=4096)
def _facts(facts_json: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(facts_json)
    return facts
