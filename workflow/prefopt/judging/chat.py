"""A chat model as the judge: asked over the OpenAI protocol, or replayed from what it said before."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

from prefopt.errors import UserError
from prefopt.judging.budget import Budget, Price
from prefopt.judging.endpoint import Endpoint
from prefopt.judging.judge import Comparison, Verdict
from prefopt.judging.replies import parse_reply, reply_schema
from prefopt.judging.templates import Template, fill, question
from prefopt.judging.verdict_store import REFUSED, Reply, VerdictStore
from prefopt.judging.watch import Watch
from prefopt.runtime.progress import Progress
from prefopt.store.files import stable_hash

_SPENT_EVERY = 25  # calls between two looks at what all jobs together have spent


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """Which model is asked how, and what it may cost."""

    base_url: str
    serve: dict[str, Any] | None = None  # see `serving.ServeRecipe`; None: the endpoint is there by itself
    model: str
    api_key_env: str | None
    prompt: str
    temperature: float | None  # None: not sent, for models that take none
    seed: int | None  # None: not sent
    max_tokens: int
    max_tokens_parameter: Literal["max_tokens", "max_completion_tokens"]
    structured_output: bool
    parse_retries: int
    concurrency: int
    requests_per_minute: float | None
    timeout: float
    max_retries: int
    store: str
    budget_usd: float
    prices: dict[str, Any]  # model -> USD per million tokens: input, output


class ChatJudge:
    """Asks what its store does not hold, and reads every verdict from the store.

    Args:
        recipe: model, parameters, limits.
        template: the prompt.
        suffix: last line of the task's prompts, which the judge does not see.
        store: what was replied before.
        endpoint: who is asked; None: nobody, every reply must be stored (`recorded`).
        repeat: share of the comparisons that is judged once more, to see how far the judge agrees with itself.
    """

    def __init__(
        self,
        recipe: ChatRecipe,
        template: Template,
        suffix: str,
        store: VerdictStore,
        endpoint: Endpoint | None,
        repeat: float,
    ) -> None:
        kind = "chat" if endpoint else "recorded"
        self.name = f"{kind}:{recipe.model}/{template.name}@{template.hash[:8]}"
        self._recipe, self._template, self._suffix = recipe, template, suffix
        self._store, self._endpoint, self._repeat = store, endpoint, repeat
        self._price = Price(**recipe.prices[recipe.model])
        self._budget = Budget(
            *(self.name, recipe.base_url, recipe.model, recipe.max_tokens, recipe.budget_usd, self._price, store)
        )
        self._report: dict[str, Any] = {}
        self._contents: dict[Comparison, str] = {}

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison.

        Raises:
            UserError: a call cannot succeed, the budget does not suffice, or (`recorded`) replies are missing.
        """
        again = [comparison for comparison in comparisons if _drawn(comparison, self._repeat)]
        wanted = [*((c, 0) for c in comparisons), *((c, 1) for c in again)]
        addresses = [stable_hash(self._request(*item, 0)) for item in wanted]
        # A pair that occurs twice is asked once.
        items = dict(zip(addresses, wanted, strict=True))
        stored = [(item, self._replies(*item)) for item in items.values()]
        open_ones = [item for item, replies in stored if self._is_open(replies)]
        if open_ones and self._endpoint is None:
            raise UserError(_missing(self._recipe, [comparison for comparison, _ in open_ones]))
        calls = self._ask_all(open_ones, self._watch(stored)) if self._endpoint else 0
        replies = {address: self._replies(*item) for address, item in items.items()}
        verdicts = [self._judged(replies[address]) for address in addresses]
        # ... and paid once, too.
        seen: set[str] = set()
        for place, address in enumerate(addresses):
            if address in seen:
                verdicts[place] = dataclasses.replace(verdicts[place], cost_usd=0.0)
            seen.add(address)
        repeated = verdicts[len(comparisons) :]
        first = dict(zip(comparisons, verdicts, strict=False))
        pairs = [(first[c].winner, verdict.winner) for c, verdict in zip(again, repeated, strict=True)]
        pairs = [pair for pair in pairs if "invalid" not in pair]
        self._report = {
            "template": {"name": self._template.name, "sha256": self._template.hash},
            "calls_made": calls,
            "cost_usd": sum(verdict.cost_usd for verdict in verdicts),
            "repeated": len(pairs),
            "repeated_agree": sum(a == b for a, b in pairs),
            "served_models": sorted({r.served_model for found in replies.values() for r in found if r.says_something}),
        }
        return verdicts[: len(comparisons)]

    def report(self) -> Mapping[str, Any]:
        """The prompt, the calls that this run made, what all its verdicts cost, self-agreement, models served."""
        return self._report

    def _request(self, comparison: Comparison, repeat: int, attempt: int) -> dict[str, Any]:
        """All that a reply depends on: its address in the store."""
        return {
            "endpoint": self._recipe.base_url,
            "model": self._recipe.model,
            "template": self._template.hash,
            "messages": [{"role": "user", "content": self._content(comparison)}],
            "parameters": self._parameters(),
            "repeat": repeat,
            "attempt": attempt,
        }

    def _content(self, comparison: Comparison) -> str:
        """The prompt as it is sent; it is looked up several times a comparison, and filled once."""
        if comparison not in self._contents:
            asked = question(comparison.prompt, self._suffix)
            self._contents[comparison] = fill(self._template, asked, comparison.first, comparison.second)
        return self._contents[comparison]

    def _parameters(self) -> dict[str, Any]:
        recipe = self._recipe
        values = {
            "temperature": recipe.temperature,
            "seed": recipe.seed,
            recipe.max_tokens_parameter: recipe.max_tokens,
            "response_format": reply_schema(self._template) if recipe.structured_output else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _replies(self, comparison: Comparison, repeat: int) -> list[Reply]:
        """The stored replies to a comparison's attempts, up to the first that names a winner."""
        replies: list[Reply] = []
        for attempt in range(self._recipe.parse_retries + 1):
            reply = self._store.get(self._request(comparison, repeat, attempt))
            if reply is None:
                break
            replies.append(reply)
            if self._winner(reply) != "invalid":
                break
        return replies

    def _winner(self, reply: Reply) -> Any:
        return parse_reply(self._template, reply.text, reply.finish_reason, self._recipe.structured_output)

    def _is_open(self, replies: Sequence[Reply]) -> bool:
        """Whether there is still something to ask; a replay has done with what replies there are."""
        if not replies:
            return True
        asked_out = len(replies) > self._recipe.parse_retries or replies[-1].finish_reason == REFUSED
        return self._endpoint is not None and not asked_out and self._winner(replies[-1]) == "invalid"

    def _judged(self, replies: Sequence[Reply]) -> Verdict:
        """The verdict of a comparison's replies, of which there is one at least."""
        cost = sum(self._price.of(reply.prompt_tokens, reply.completion_tokens) for reply in replies)
        return Verdict(self._winner(replies[-1]), replies[-1].text, cost)

    def _watch(self, stored: Sequence[tuple[tuple[Comparison, int], Sequence[Reply]]]) -> Watch:
        """A watch that knows what came of the pairs that were asked out before."""
        watch = Watch(self.name, self._store, any(r.says_something for _, replies in stored for r in replies))
        for (comparison, repeat), replies in stored:
            if replies and not watch.answered and not self._is_open(replies) and replies[-1].finish_reason != REFUSED:
                watch.note(comparison.prompt_id, self._request(comparison, repeat, 0), replies, named=False)
        return watch

    def _ask_all(self, items: Sequence[tuple[Comparison, int]], watch: Watch) -> int:
        """Asks for every item; the first alone until a reply holds text, which shows that key, model and values are right.

        Args:
            items: comparisons and which repeat of them.
            watch: what it knows of the others.

        Returns:
            How many calls were answered.
        """
        assert self._endpoint is not None
        if not items:
            watch.end()
            return 0
        self._budget.announce([len(self._request(*item, 0)["messages"][0]["content"]) for item in items])
        self._endpoint.check()
        with Progress("judge", len(items), "verdicts") as progress:
            calls = 0
            rest = list(items)
            while rest and not (watch.answered and len(rest) < len(items)):
                calls += self._ask(*rest.pop(0), watch)
                spent = self._budget.check()
                progress.update(1, usd=spent)
            with ThreadPoolExecutor(self._recipe.concurrency) as pool:
                try:
                    asked = as_completed([pool.submit(self._ask, *item, watch) for item in rest])
                    for done, future in enumerate(asked, start=1):
                        calls += future.result()
                        if done % _SPENT_EVERY == 0:
                            spent = self._budget.check()
                        progress.update(1, usd=spent)
                finally:
                    # Calls in flight are waited for, and kept; none is begun.
                    pool.shutdown(cancel_futures=True)
        watch.end()
        self._budget.report()
        return calls

    def _ask(self, comparison: Comparison, repeat: int, watch: Watch) -> int:
        """Asks, and asks again where the reply names no winner; keeps every reply.

        A refusal is not asked for again. The watch keeps it as soon as other pairs are known to be answered.
        """
        assert self._endpoint is not None
        calls = 0
        replies: list[Reply] = []
        named = False
        for attempt in range(self._recipe.parse_retries + 1):
            request = self._request(comparison, repeat, attempt)
            with self._store.alone(request):
                reply = self._store.get(request)
                if reply is None:
                    about = f"prompt {comparison.prompt_id!r}"
                    lost = functools.partial(self._store.put_lost, request)
                    reply = self._endpoint.ask(request["messages"], request["parameters"], about, lost)
                    calls += 1
                    if reply.finish_reason != REFUSED:
                        self._store.put(request, reply)
            replies.append(reply)
            named = self._winner(reply) != "invalid"
            if named or reply.finish_reason == REFUSED:
                break
        watch.note(comparison.prompt_id, request, replies, named)
        return calls


def _drawn(comparison: Comparison, share: float) -> bool:
    """Whether a comparison is among those judged again: by a hash of it, whatever the rows beside it."""
    key = [comparison.prompt_id, comparison.first, comparison.second]
    return random.Random(stable_hash(key)).random() < share


def _missing(recipe: ChatRecipe, comparisons: Sequence[Comparison]) -> str:
    named = ", ".join(repr(c.prompt_id) for c in comparisons[:5])
    more = f" and {len(comparisons) - 5} more" if len(comparisons) > 5 else ""
    return (
        f"{recipe.store} lacks the verdicts of {recipe.model!r} on {len(comparisons)} pairs, those of the prompts "
        f"{named}{more}: judge.kind 'recorded' asks nobody, import a fuller store or use 'chat'."
    )
