"""The embedded news: the facts of the synthetic world in a reporter's words, which no training post has.

The clauses of a summary, and with them the oracle, are those of `prefopt.data.synthetic.world`. What differs is how an article
says them: a dateline, reported speech, other sentences and another order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from prefopt.data.formats.cnn_dailymail import news_prompt
from prefopt.data.raw.parsing import Account, RawTables
from prefopt.data.synthetic import world
from prefopt.data.synthetic.drawing import row_stream

STATEMENT = (
    "Synthetic: articles and highlights come from a seeded program (prefopt.data.synthetic.news), not from people. "
    "They tell facts as the posts of the TL;DR task do, in another register."
)
_STREAMS = (("news-validation", "validation", "validation_prompts"), ("news-test", "test", "test_prompts"))

_SENTENCES = {
    "event": (
        "the report says that my {relation} {name} {verb} the {adjective} {object}.",
        "according to witnesses my {relation} {name} {verb} the {adjective} {object}.",
        "officials have learned that my {relation} {name} {verb} the {adjective} {object}.",
    ),
    "setting": (
        "the report places all of this at the {place} on {day}.",
        "officials were called to the {place} on {day}.",
        "it was {day} and the witnesses were at the {place}.",
    ),
    "cause": (
        "the report names the {reason} as the only reason.",
        "officials believe that the {reason} led to it.",
        "witnesses say that it would not have happened without the {reason}.",
    ),
    "feeling": (
        "asked about it today i said that i feel {feeling}.",
        "i told the reporters how {feeling} i have been since then.",
        "the whole story has left me {feeling} as the reporters write.",
    ),
    "question": (
        "readers are asked to say if i should {action} the {person}.",
        "the reporters wonder if i have to {action} the {person}.",
        "experts do not agree if it is best to {action} the {person}.",
    ),
}
_DISTRACTOR_SENTENCES = {
    "event": (
        "in other news my {relation} {name} {verb} the {adjective} {object}.",
        "a second report says that my {relation} {name} {verb} the {adjective} {object}.",
    ),
    world.OTHER_FEELING: (
        "in other news my {relation} feels {feeling} these days.",
        "a second report says that my {relation} is always {feeling}.",
    ),
}


def write_article(rng: random.Random, post: world.Post) -> str:
    """The post's facts as an article, the setting first, as in a dateline."""
    setting = post.facts["setting"]
    told = [clause for clause in post.told if clause is not setting]
    rng.shuffle(told)
    sentences = []
    for clause in (setting, *told):
        own = post.facts.get(clause.slot) is clause
        sentence = rng.choice((_SENTENCES if own else _DISTRACTOR_SENTENCES)[clause.slot])
        sentences.append(sentence.format_map(clause.values))
    return " ".join(sentences)


def generate(values: Mapping[str, int]) -> RawTables:
    """Articles with highlights by the TL;DR task's imperfect writer.

    Args:
        values: `seed`, `validation_prompts` and `test_prompts`.
    """
    rows = [
        _article(values["seed"], stream, i, split) for stream, split, count in _STREAMS for i in range(values[count])
    ]
    accounts = {
        "raw_demonstrations": Account(read=len(rows), kept=len(rows)),
        "raw_preferences": Account(),
        "pretraining": Account(),
    }
    return RawTables(rows, [], [], accounts, {"synthetic": True, "statement": STATEMENT})


def _article(seed: int, stream: str, i: int, split: str) -> dict[str, Any]:
    rng = row_stream(seed, stream, i)
    post = world.make_post(rng)
    return {
        "prompt_id": f"{stream}-{i:05d}",
        "prompt": news_prompt(write_article(rng, post)),
        "response": world.write_summary(rng, post),
        "split": split,
        "facts": post.facts_json(),
    }
