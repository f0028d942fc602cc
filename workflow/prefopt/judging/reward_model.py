"""A gold reward model as the judge: trained on human comparisons that nothing it judges has been trained on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.judging.judge import PROMPTS_AT_ONCE, Comparison, Verdict, Winner
from prefopt.lm.batching import Row
from prefopt.lm.chat import Refused, answer_ids, chat_of
from prefopt.lm.continuations import encode_continuations
from prefopt.lm.models import load_scorer, load_tokenizer, tokenizer_hash, weights_hash
from prefopt.rewards.learned import score_rows
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table


class RewardModelJudge:
    """Prefers the text with the higher score; equal scores are a tie.

    Args:
        model: a sequence-classification model with one label.
        tokenizer: the model's own.
        weights: hash of the model's weights, which names the judge.
        prompt_ids: token ids of each prompt by prompt_id, cut as the model's training prompts were.
        token_budget: tokens per micro-batch.
        style: of the prompts: plain text or turns of a chat.
        accuracy: what `accuracy.agreement_with_people` returned.
        usage: counts what is scored.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        weights: str,
        prompt_ids: Mapping[str, Sequence[int]],
        token_budget: int,
        accuracy: Mapping[str, Any],
        usage: Usage,
        style: str = "plain",
    ) -> None:
        self.name = f"reward_model:{weights[:12]}"
        self._model, self._tokenizer, self._usage = model, tokenizer, usage
        self._prompt_ids, self._token_budget, self._accuracy = prompt_ids, token_budget, accuracy
        self._limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self._cut = 0
        self._chat = chat_of(tokenizer) if style == "chat" else None

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison; the reply holds both scores.

        Each different text is scored once, whatever spaces stand around it: scored twice, equal texts would differ by rounding,
        and one of them would win.
        """
        texts: dict[str, dict[str, float]] = {}
        for comparison in comparisons:
            scores = texts.setdefault(comparison.prompt_id, {})
            scores[comparison.first.strip()] = scores[comparison.second.strip()] = float("nan")
        self._score(texts)
        verdicts = []
        for comparison in comparisons:
            scores = texts[comparison.prompt_id]
            first, second = scores[comparison.first.strip()], scores[comparison.second.strip()]
            verdicts.append(Verdict(_winner(first, second), f"first {first:.6g}, second {second:.6g}"))
        return verdicts

    def report(self) -> Mapping[str, Any]:
        """Accuracy on held-out comparisons, and how many texts were cut to the model's length."""
        return {**self._accuracy, "texts_cut_to_fit": self._cut, "used": self._usage.report()}

    def _score(self, texts: dict[str, dict[str, float]]) -> None:
        prompts = list(texts)

        def count(prompt_id: str) -> int:
            return len(texts[prompt_id])

        with Progress("judge", len(prompts), "prompts") as progress:
            for start in range(0, len(prompts), PROMPTS_AT_ONCE):
                block = sorted(prompts[start : start + PROMPTS_AT_ONCE], key=count)
                # `score_rows` takes rows with equally many completions; a text that occurs twice is there once.
                for chunk in (list(group) for _, group in itertools.groupby(block, key=count)):
                    rows = [self._row(prompt_id, list(texts[prompt_id])) for prompt_id in chunk]
                    scores = score_rows(self._model, rows, self._token_budget).tolist()
                    for prompt_id, values in zip(chunk, scores, strict=True):
                        texts[prompt_id] = dict(zip(texts[prompt_id], values, strict=True))
                    self._usage.add(len(rows) * len(rows[0].completions), sum(row.tokens for row in rows))
                    progress.update(len(chunk))

    def _row(self, prompt_id: str, texts: list[str]) -> Row:
        if prompt_id not in self._prompt_ids:
            raise UserError(f"The prompts table lacks prompt {prompt_id!r}: run the stage `prepare` again.")
        prompt = tuple(self._prompt_ids[prompt_id])
        try:
            return Row(prompt, tuple(self._completion(text, len(prompt)) for text in texts))
        except Refused as problem:
            raise UserError(
                f"{self.name} cannot read a text for prompt {prompt_id!r}, since the chat template of its model does not "
                f"take it ({problem}): take another gold_reward_model, or prompt.style 'plain'."
            ) from problem

    def _completion(self, text: str, prompt_tokens: int) -> tuple[int, ...]:
        ids = completion_ids(self._tokenizer, text) if self._chat is None else answer_ids(self._chat, text.strip())
        room = len(ids) if self._limit is None else self._limit - prompt_tokens
        if len(ids) > room:
            self._cut += 1
            ids = [*ids[: room - 1], ids[-1]]  # the score is read at the end token, which must stay
        return tuple(ids)


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a completion as in training: one leading space, the text, EOS."""
    text = text.strip()
    ids = encode_continuations(tokenizer, [" " + text] if text else [])
    return [*(ids[0] if ids else []), tokenizer.eos_token_id]


def load_judge(gold_model: Path, accuracy: Path, prompts: pd.DataFrame, token_budget: int) -> RewardModelJudge:
    """The judge that a gold reward model makes.

    Args:
        gold_model: the model's folder.
        accuracy: the held_out_scores table of this model, whose manifest says how often it agrees with people.
        prompts: the prompts table, made with the same tokenizer.
        token_budget: tokens per micro-batch.

    Raises:
        UserError: the tables were made with another tokenizer or in different styles, or the accuracy is another model's.
    """
    if prompts.attrs["manifest"].get("tokenizer_hash") != tokenizer_hash(gold_model):
        raise UserError(
            f"The prompts were tokenized with another tokenizer than that of {gold_model}: "
            f"run the stage `prepare` again."
        )
    weights = weights_hash(gold_model)
    measured = read_table(accuracy, "held_out_scores", weights_hash=weights).attrs["manifest"]
    style = prompts.attrs["manifest"].get("style", "plain")
    if measured["style"] != style:
        raise UserError(
            f"{gold_model} was trained on {measured['style']} prompts and the policies on {style} ones: set the task's "
            f"prompt.style."
        )
    return RewardModelJudge(
        load_scorer(gold_model, device=default_device()),
        load_tokenizer(gold_model),
        weights,
        dict(zip(prompts["prompt_id"], (ids.tolist() for ids in prompts["prompt_ids"]), strict=True)),
        token_budget,
        measured["accuracy"],
        Usage("judge", default_device(), "float32"),
        style,
    )


def _winner(first: float, second: float) -> Winner:
    if not np.isfinite([first, second]).all():
        return "invalid"
    return "tie" if first == second else "first" if first > second else "second"
