"""How well judges agree with human comparisons that they have not seen: longer, words, likelihood, a reward model's head.

    python benchmarks/judges.py results/data/hh --model FOLDER [--out FILE]

Each judge is fitted on nine tenths of the prompts and asked about the last tenth, ten times over, so that every comparison
is judged once. See README.md here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import statsmodels.api as sm
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold

from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.engine import head_logits
from prefopt.lm.logprobs import completion_hidden_states
from prefopt.lm.models import load_policy, tokenizer_hash
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import default_device
from prefopt.store.tables import read_table
from prefopt.training.reference import preference_rows

SIDES = ("chosen", "rejected")
Matrix: TypeAlias = np.ndarray | sparse.csr_matrix


def comparisons(folder: Path, model: Path) -> pd.DataFrame:
    """All comparisons of a task's prepared tables, those for the judge and those for the policies."""
    files = [folder / name for name in ("preferences.parquet", "gold_preferences.parquet")]
    tables = [read_table(file, "preferences", tokenizer_hash=tokenizer_hash(model)) for file in files if file.exists()]
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def read(
    pairs: pd.DataFrame, folder: Path, dtype: torch.dtype, budget: int, behind: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of both completions, chosen first: log-probabilities [n, 2], the hidden state of the last token [n, 2, d] and the mean
    of those from which tokens are predicted [n, 2, d]; all with a text put behind each completion.
    """
    model, tokenizer = load_policy(folder, device=default_device(), dtype=dtype)
    put = tokenizer(behind, add_special_tokens=False)["input_ids"]
    rows = [Row(row.prompt, tuple((*own, *put) for own in row.completions)) for row in preference_rows(pairs)]
    sums = np.zeros((len(rows), 2))
    last, means = (np.zeros((len(rows), 2, model.config.hidden_size)) for _ in range(2))
    with Progress("comparisons", len(rows), "comparisons") as progress:
        for batch in micro_batches(rows, budget):
            part = [rows[i] for i in batch]
            predicting, ends = completion_hidden_states(model, part)
            completions = [own for row in part for own in row.completions]
            tokens = torch.tensor([token for own in completions for token in own], device=predicting.device)
            logps = head_logits(model, predicting).log_softmax(-1).gather(1, tokens[:, None])
            last[batch] = ends.float().view(len(part), 2, -1).cpu()
            for kept, values, reduced in ((sums, logps, torch.sum), (means, predicting.float(), torch.mean)):
                each = [reduced(own, dim=0) for own in values.split([len(own) for own in completions])]
                kept[batch] = torch.stack(each).view(len(part), *kept.shape[1:]).cpu()
            progress.update(len(batch))
    return sums, last, means


def cross_fitted(
    pairs: pd.DataFrame, differences: Callable[[np.ndarray, np.ndarray], tuple[Matrix, Matrix]], folds: int
) -> np.ndarray:
    """The margin by which each chosen completion wins, by a logistic regression that has not seen its prompt.

    Args:
        pairs: the comparisons.
        differences: features of chosen less rejected, of training and of held-out rows, by their indices.
        folds: parts of the prompts.
    """
    margins = np.zeros(len(pairs))
    outer = GroupKFold(folds, shuffle=True, random_state=0)
    for training, held_out in outer.split(pairs, groups=pairs["prompt_id"]):
        fitted, asked = differences(training, held_out)
        stack = sparse.vstack if sparse.issparse(fitted) else np.vstack
        both = stack([fitted, -fitted])
        groups = np.tile(pairs["prompt_id"].to_numpy()[training], 2)
        inner = list(GroupKFold(5).split(groups, groups=groups))
        answers = np.repeat([1, 0], len(training))
        plain, strengths = LogisticRegression(fit_intercept=False, max_iter=1000), {"C": np.logspace(-4, 1, 6)}
        model = GridSearchCV(plain, strengths, cv=inner, scoring="neg_log_loss").fit(both, answers)
        margins[held_out] = model.decision_function(asked)
    return margins


def bag_of_words(pairs: pd.DataFrame) -> Callable[[np.ndarray, np.ndarray], tuple[Matrix, Matrix]]:
    """Words and pairs of words, weighted by how rare they are among the training rows."""

    def differences(training: np.ndarray, held_out: np.ndarray) -> tuple[Matrix, Matrix]:
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, norm=None)
        words.fit([text for side in SIDES for text in pairs[side].iloc[training]])
        one, other = (words.transform(pairs[side]) for side in SIDES)
        difference = sparse.csr_matrix(one - other)
        return difference[training], difference[held_out]

    return differences


def of_features(values: np.ndarray) -> Callable[[np.ndarray, np.ndarray], tuple[Matrix, Matrix]]:
    """Features [n, 2, d], scaled by the deviation of the training rows' differences."""
    difference = values[:, 0] - values[:, 1]

    def differences(training: np.ndarray, held_out: np.ndarray) -> tuple[Matrix, Matrix]:
        scaled = difference / (difference[training].std(axis=0) + 1e-9)
        return scaled[training], scaled[held_out]

    return differences


def account(pairs: pd.DataFrame, margins: dict[str, np.ndarray], baseline: str) -> pd.DataFrame:
    """Accuracy of each judge, a tie half right, and how much it is better than a baseline; 95% intervals over prompts."""
    right = {name: (1 + np.sign(values)) / 2 for name, values in margins.items()}
    rows = []
    for name, values in right.items():
        accuracy, low, high = _mean(values, pairs["prompt_id"])
        better = _mean(values - right[baseline], pairs["prompt_id"])
        figures = {"accuracy": accuracy, "low": low, "high": high}
        figures |= dict(zip(("better", "better_low", "better_high"), better, strict=True))
        rows.append({"judge": name, "comparisons": len(pairs), **figures})
    return pd.DataFrame(rows)


def _mean(values: np.ndarray, groups: pd.Series) -> tuple[float, float, float]:
    codes = groups.astype("category").cat.codes
    found = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    low, high = found.conf_int()[0]
    return float(found.params[0]), float(low), float(high)


def main() -> None:
    """Prints a table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a task's prepared tables")
    parser.add_argument("--model", required=True, type=Path, help="whose tokenizer the tables have")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument(
        "--behind", help="a text behind each completion, such as a question, for one more head on the last token"
    )
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args()
    pairs = comparisons(args.data, args.model)
    reading = (args.model, getattr(torch, args.dtype), args.token_budget)
    sums, last, means = read(pairs, *reading)
    lengths = np.array([[len(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES], float).T
    with_length = np.concatenate([means, np.log(lengths)[..., None]], axis=2)
    margins = {
        "the longer wins": lengths[:, 0] - lengths[:, 1],
        "likelihood": sums[:, 0] - sums[:, 1],
        "likelihood a token": (sums / lengths) @ np.array([1.0, -1.0]),
        "words": cross_fitted(pairs, bag_of_words(pairs), args.folds),
        "head on the last token": cross_fitted(pairs, of_features(last), args.folds),
        "head on the mean token": cross_fitted(pairs, of_features(means), args.folds),
        "the same with the length": cross_fitted(pairs, of_features(with_length), args.folds),
    }
    if args.behind is not None:
        features = of_features(read(pairs, *reading, args.behind)[1])
        margins["head on the last token behind them"] = cross_fitted(pairs, features, args.folds)
    table = account(pairs, margins, "the longer wins")
    print(
        f"chosen completions: {-sums[:, 0].sum() / lengths[:, 0].sum():.3f} nats a token, {lengths[:, 0].mean():.0f} tokens"
    )
    print(table.round(3).to_string(index=False))
    if args.out is not None:
        table.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
