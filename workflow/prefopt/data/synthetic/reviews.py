"""The embedded film reviews."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from prefopt.data.formats.reviews import UNLABELLED
from prefopt.data.synthetic import review_world


def generate(values: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of raw_reviews drawn from the synthetic writer, each with its own random stream; no text stands twice.

    What is trained on comes first, so that it does not depend on the number of test reviews.
    """
    rows, seen = [], set()
    for split in ("train", "unlabelled", "validation", "test"):
        for i in range(values[split]):
            rng = random.Random(f"{values['seed']}/review-{split}/{i}")
            text = review_world.write_review(rng)
            while text in seen:
                text = review_world.write_review(rng)
            seen.add(text)
            label = UNLABELLED if split == "unlabelled" else review_world.label(text)
            name = "train" if split == "unlabelled" else split
            rows.append({"review_id": f"{split}-{i:05d}", "text": text, "label": label, "split": name})
    return rows
