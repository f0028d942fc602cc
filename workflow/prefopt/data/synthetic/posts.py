"""The embedded records: demonstrations, labelled pairs and pretraining documents drawn from the synthetic world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt.data.raw.parsing import RawTables
from prefopt.data.synthetic import world
from prefopt.data.synthetic.drawing import drawn_tables, row_stream

STATEMENT = (
    "Synthetic: posts, summaries and labels come from a seeded program (prefopt.data.synthetic.world), not from people. "
    "One imperfect writer wrote the references and both summaries of each pair; labels are noisy by design."
)
_DEMONSTRATIONS = (
    ("demo", "train", "demonstrations"),
    ("demo-validation", "validation", "validation_prompts"),
    ("demo-test", "test", "test_prompts"),
)
_PREFERENCES = (
    ("pair", "train", "pairs"),
    ("pair-validation", "validation", "validation_pairs"),
    ("gold", "gold_train", "gold_pairs"),
    ("gold-test", "gold_test", "gold_test_pairs"),
)


def generate(values: Mapping[str, int]) -> RawTables:
    """Draws every table.

    Each row has its own random stream, so that a count changes no other row and no two rows share a post.

    Args:
        values: `seed` and the number of rows of each kind: demonstrations, validation_prompts, test_prompts, pairs,
            validation_pairs, gold_pairs, gold_test_pairs, pretraining_documents.

    Returns:
        The tables; notes["annotator_agreement"] is the measured share of pairs of unequal quality whose label
        agrees with the higher quality (None without such pairs).
    """
    seed = values["seed"]
    demonstrations = [
        _demonstration(seed, stream, i, split) for stream, split, count in _DEMONSTRATIONS for i in range(values[count])
    ]
    pairs = [_pair(seed, stream, i, split) for stream, split, count in _PREFERENCES for i in range(values[count])]
    pretraining = [
        world.pretraining_document(row_stream(seed, "pretraining", i)) for i in range(values["pretraining_documents"])
    ]
    return drawn_tables(demonstrations, pairs, pretraining, STATEMENT)


def _demonstration(seed: int, stream: str, i: int, split: str) -> dict[str, Any]:
    rng = row_stream(seed, stream, i)
    post = world.make_post(rng)
    return {
        "prompt_id": f"{stream}-{i:05d}",
        "prompt": post.prompt,
        "response": world.write_summary(rng, post),
        "split": split,
        "facts": post.facts_json(),
    }


def _pair(seed: int, stream: str, i: int, split: str) -> tuple[dict[str, Any], bool | None]:
    """The row, and whether its label agrees with the higher quality (None for a tie)."""
    rng = row_stream(seed, stream, i)
    post = world.make_post(rng)
    facts = post.facts_json()
    first = world.write_summary(rng, post)
    second = world.write_summary(rng, post)
    while second == first:  # a pair of equal texts has nothing to prefer
        second = world.write_summary(rng, post)
    first_chosen = world.prefers_first(rng, facts, first, second)
    better = world.compare(facts, first, second)
    row = {
        "pair_id": f"{stream}-{i:05d}",
        "prompt_id": f"{stream}-{i:05d}",
        "prompt": post.prompt,
        "chosen": first if first_chosen else second,
        "rejected": second if first_chosen else first,
        "split": split,
        "source": "embedded",
    }
    return row, None if better == "tie" else first_chosen == (better == "first")
