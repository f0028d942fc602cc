"""The embedded reviews: a seeded writer of short film reviews, and the exact rule of how positive a text is.

A review is a few sentences, each with one word of opinion; every such word has a grade. The writer has a mood, which
tilts the grades a little, so that the first words of a review tell something of the rest. The rule adds up the grades
and maps the sum to (0, 1). It is graded: the reward of the optimal policy still rises beyond a KL of 12 nats, the
largest target of the sweep (section 6.1), as `tests/unit/data/test_review_world.py` computes from the writer's own
probabilities.
"""

from __future__ import annotations

import math
import random
import re
from typing import Final

# Words of opinion by grade.
OPINIONS: Final[dict[int, tuple[str, ...]]] = {
    -2: ("awful", "dreadful", "horrible", "unbearable", "pathetic", "terrible"),
    -1: ("dull", "weak", "clumsy", "tedious", "shallow", "boring"),
    0: ("long", "ordinary", "familiar", "quiet", "simple", "plain"),
    1: ("decent", "pleasant", "clever", "charming", "solid", "funny"),
    2: ("brilliant", "superb", "stunning", "perfect", "wonderful", "magnificent"),
}
# How often a word of each grade stands in a review, over both moods about these shares.
GRADE_SHARES: Final = {-2: 0.20, -1: 0.25, 0: 0.25, 1: 0.18, 2: 0.12}
# A mood m makes a word of grade g more frequent by the factor exp(m * g); both moods are as frequent.
MOODS: Final = (-0.2, 0.2)
SENTENCES: Final = (7, 8, 9, 10, 11)
# The reward is the logistic function of the sum of grades over this.
SCALE: Final = 7.0

_ASPECTS = (
    "plot",
    "acting",
    "music",
    "ending",
    "cast",
    "story",
    "camera work",
    "dialogue",
    "pacing",
    "hero",
    "villain",
)
_FRAMES = (
    "the {aspect} was {opinion} .",
    "i found the {aspect} {opinion} .",
    "what a {opinion} {aspect} !",
    "the {aspect} felt {opinion} to me .",
    "and the {aspect} is {opinion} .",
    "{opinion} {aspect} , i must say .",
)
_GRADES = {word: grade for grade, words in OPINIONS.items() for word in words}
_WORD = re.compile(r"[a-z]+")


def write_review(rng: random.Random) -> str:
    """A review in the writer's mood of the day, in which no word of opinion is repeated."""
    mood = rng.choice(MOODS)
    shares = grade_probabilities(mood)
    left = {grade: list(words) for grade, words in OPINIONS.items()}
    sentences: list[str] = []
    for _ in range(rng.choice(SENTENCES)):
        open_grades = [grade for grade in left if left[grade]]
        grade = rng.choices(open_grades, [shares[grade] for grade in open_grades])[0]
        opinion = left[grade].pop(rng.randrange(len(left[grade])))
        sentences.append(rng.choice(_FRAMES).format(aspect=rng.choice(_ASPECTS), opinion=opinion))
    return " ".join(sentences)


def grade_probabilities(mood: float) -> dict[int, float]:
    """Probability of each grade for a word of opinion in a mood, while no word is used up."""
    weights = {grade: share * math.exp(mood * grade) for grade, share in GRADE_SHARES.items()}
    total = sum(weights.values())
    return {grade: weight / total for grade, weight in weights.items()}


def sum_of_grades(text: str) -> int:
    """The grades of all words of opinion in a text; a positive word counts once, a negative one each time.

    Praise that is repeated says nothing new; otherwise one word again and again would be the best review.
    """
    words = _WORD.findall(text.lower())
    grades = [(word, _GRADES[word]) for word in words if word in _GRADES]
    praise = {word: grade for word, grade in grades if grade > 0}
    return sum(praise.values()) + sum(grade for _, grade in grades if grade < 0)


def true_reward(text: str) -> float:
    """How positive any text is, in (0, 1): 1 / (1 + exp(-sum of grades / SCALE)); 0.5 without an opinion."""
    return 1 / (1 + math.exp(-sum_of_grades(text) / SCALE))


def label(text: str) -> int:
    """1 for a positive review, else 0."""
    return int(sum_of_grades(text) > 0)
