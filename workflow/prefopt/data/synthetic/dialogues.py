"""The embedded dialogues as raw tables: evaluation prompts, labelled pairs and pretraining documents."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from prefopt.data.raw.parsing import RawTables
from prefopt.data.synthetic import dialogue_world as world
from prefopt.data.synthetic.drawing import drawn_tables, row_stream

STATEMENT = (
    "Synthetic: dialogues and labels come from a seeded program (prefopt.data.synthetic.dialogue_world), not from people. "
    "One imperfect assistant wrote both answers of each pair; labels are noisy by design."
)
_DEMONSTRATIONS = (
    ("dialogue", "train", "demonstrations"),
    ("dialogue-validation", "validation", "validation_prompts"),
    ("dialogue-test", "test", "test_prompts"),
)
_PREFERENCES = (
    ("talk", "train", "pairs"),
    ("talk-validation", "validation", "validation_pairs"),
    ("talk-gold", "gold_train", "gold_pairs"),
    ("talk-gold-test", "gold_test", "gold_test_pairs"),
)


def generate(values: Mapping[str, int]) -> RawTables:
    """Draws every table; each row has its own random stream, so that a count changes no other row.

    Args:
        values: as for `prefopt.data.synthetic.posts.generate`. Demonstrations are dialogues of one turn with the chosen
            one of two answers; pairs are of one or two turns.
    """
    seed = values["seed"]
    demonstrations = [
        _demonstration(seed, stream, i, split) for stream, split, count in _DEMONSTRATIONS for i in range(values[count])
    ]
    pairs = [_pair(seed, stream, i, split) for stream, split, count in _PREFERENCES for i in range(values[count])]
    pretraining = [
        world.pretraining_document(row_stream(seed, "dialogue-pretraining", i))
        for i in range(values["pretraining_documents"])
    ]
    return drawn_tables(demonstrations, pairs, pretraining, STATEMENT)


def _demonstration(seed: int, stream: str, i: int, split: str) -> dict[str, Any]:
    rng = row_stream(seed, stream, i)
    dialogue = world.make_dialogue(rng, turns=1)
    facts = dialogue.facts_json()
    chosen, _ = _answers(rng, dialogue, facts)
    row = {"prompt_id": f"{stream}-{i:05d}", "prompt": dialogue.prompt, "response": chosen}
    return {**row, "split": split, "facts": facts}


def _pair(seed: int, stream: str, i: int, split: str) -> tuple[dict[str, Any], bool | None]:
    """The row, and whether its label agrees with the higher quality (None for a tie)."""
    rng = row_stream(seed, stream, i)
    dialogue = world.make_dialogue(rng)
    facts = dialogue.facts_json()
    chosen, rejected = _answers(rng, dialogue, facts)
    better = world.compare(facts, chosen, rejected)
    name = f"{stream}-{i:05d}"
    texts = {"prompt": dialogue.prompt, "chosen": chosen, "rejected": rejected}
    row = {"pair_id": name, "prompt_id": name, **texts, "split": split, "source": "embedded"}
    return row, None if better == "tie" else better == "first"


def _answers(rng: random.Random, dialogue: world.Dialogue, facts: str) -> tuple[str, str]:
    """Two different answers, the annotator's choice first."""
    first = second = world.write_answer(rng, dialogue)
    while second == first:
        second = world.write_answer(rng, dialogue)
    return (first, second) if world.prefers_first(rng, facts, first, second) else (second, first)
