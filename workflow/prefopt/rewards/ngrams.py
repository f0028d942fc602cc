"""A true reward that is a table: the words and pairs of words of a text, weighed by logistic regression.

On film reviews it is as right as a model of the policy's size that reads them, for a thousandth of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from prefopt.store.tables import read_table


def vectorizer(**options: Any) -> TfidfVectorizer:
    """Words and pairs of neighbours in lower case: 1 + log of their count, by inverse document frequency, to length 1."""
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def load_ngrams(path: Path) -> Callable[[Sequence[str]], Tensor]:
    """P(positive) of texts, float32 [n] in [0, 1], by an `ngrams` table.

    Raises:
        UserError: the file is no such table.
    """
    table = read_table(path, "ngrams")
    known = vectorizer(vocabulary=table["ngram"].tolist())
    known.idf_ = table["idf"].to_numpy()
    weights, intercept = table["weight"].to_numpy(), table.attrs["manifest"]["intercept"]
    return lambda texts: torch.from_numpy(expit(known.transform(texts) @ weights + intercept)).float()
