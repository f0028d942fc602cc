"""A chat judge whose endpoint refuses pairs, says nothing, or bills what it likes."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.experiment import targets
from prefopt.judging.chat import ChatJudge, ChatRecipe
from prefopt.judging.endpoint import Endpoint
from prefopt.judging.judge import Comparison
from prefopt.judging.templates import read_template
from prefopt.judging.verdict_store import VerdictStore
from servers import Handler, Server, completion

TEMPLATE = read_template(targets.PROMPTS / "tldr_simple.txt")
PAIRS = [Comparison(f"p{i}", f"post {i} end\n\nTL;DR:", "", f"first {i}", f"second {i}") for i in range(24)]
FILTERED = (400, {"error": {"message": "The prompt triggered a content policy", "code": "content_filter"}})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one
        one.shutdown()


def judge(server: Server, folder: Path, recorded: bool = False, **changes: Any) -> ChatJudge:
    recipe = ChatRecipe(
        base_url=server.url,
        model="m",
        api_key_env=None,
        prompt="tldr_simple",
        temperature=0.0,
        seed=None,
        max_tokens=50,
        max_tokens_parameter="max_tokens",
        structured_output=False,
        parse_retries=2,
        concurrency=1,
        requests_per_minute=None,
        timeout=5.0,
        max_retries=0,
        store=str(folder / "s.sqlite"),
        budget_usd=changes.pop("budget_usd", 1.0),
        prices={"m": {"input": 2.0, "output": 8.0}},
    )
    endpoint = None if recorded else Endpoint(server.url, "m", None, 5.0, 0, None, 50)
    return ChatJudge(recipe, TEMPLATE, "\n\nTL;DR:", VerdictStore(recipe.store, not recorded), endpoint, 0.0)


def winners(verdicts: Any) -> dict[str, int]:
    found = [verdict.winner for verdict in verdicts]
    return {winner: found.count(winner) for winner in sorted(set(found))}


def except_for(server: Server, odd: tuple[Any, ...], *numbers: int, usual: Any = None) -> None:
    """The server answers `odd` to the comparisons of these numbers, and prefers the first text of all others."""

    def answer(handler: Handler) -> None:
        content = server.seen[-1][2]["messages"][0]["content"]
        number = int(re.search(r"post (\d+) end", content)[1])  # type: ignore[index]
        handler._send(*(odd if number in numbers else (200, usual or completion())))

    server.answer = answer


@pytest.mark.parametrize(
    ("numbers", "odd"),
    [
        ((7,), FILTERED),
        ((0,), (413, b"too long")),
        ((23,), (200, {"error": "Your input was flagged"})),
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), FILTERED),
        ((3, 5, 6, 8, 20, 23), FILTERED),
    ],
)
def test_a_refused_pair_counts_as_invalid_and_the_others_are_judged(
    server: Server, tmp_path: Path, numbers: tuple[int, ...], odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    except_for(server, odd, *numbers)
    verdicts = judge(server, tmp_path).compare(PAIRS)
    assert winners(verdicts) == {"first": 24 - len(numbers), "invalid": len(numbers)}
    assert server.calls == 24
    for number in numbers:
        assert verdicts[number].winner == "invalid" and verdicts[number].cost_usd == 0
        assert verdicts[number].reply.startswith("status 4")
        assert f"refused for the prompt 'p{number}', whose pair counts as invalid (status 4" in caplog.text
    # It is known from now on, also to a replay.
    assert judge(server, tmp_path).compare(PAIRS) == verdicts
    assert judge(server, tmp_path, recorded=True).compare(PAIRS) == verdicts
    assert server.calls == 24


def test_an_account_that_is_blocked_on_the_way_stops_and_marks_no_pair(server: Server, tmp_path: Path) -> None:
    except_for(server, (400, {"error": {"message": "billing limit reached"}}), *range(12, 24))
    with pytest.raises(
        UserError, match=r"status 400: billing limit reached\).* 10 pairs in a row.*'p12', 'p13'.*5 more"
    ):
        judge(server, tmp_path).compare(PAIRS)
    assert 22 <= (before := server.calls) <= 23  # one may have begun meanwhile
    except_for(server, FILTERED)
    assert winners(judge(server, tmp_path).compare(PAIRS)) == {"first": 24}
    assert server.calls == before + 12


def test_the_only_pair_of_a_table_is_named(server: Server, tmp_path: Path) -> None:
    except_for(server, FILTERED, 0)
    with pytest.raises(UserError, match=r"content policy.*of the prompts 'p0'"):
        judge(server, tmp_path).compare(PAIRS[:1])
    # Where another was answered before, it lies with the pair.
    judge(server, tmp_path).compare(PAIRS[1:2])
    assert winners(judge(server, tmp_path).compare(PAIRS[:2])) == {"first": 1, "invalid": 1}


def test_a_judge_that_never_says_anything_is_not_paid_to_the_end(server: Server, tmp_path: Path) -> None:
    server.answer = (200, completion("", "length"))
    for _ in range(2):  # the second time nothing is asked at all
        with pytest.raises(UserError, match=r"finish_reason 'length': a reply without text\); a higher .*max_tokens"):
            judge(server, tmp_path).compare(PAIRS)
        assert server.calls == 10 * 3
    assert len(VerdictStore(tmp_path / "s.sqlite").export()) == 30  # what was paid is kept


def test_a_judge_that_names_no_winner_is_told(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers = itertools.cycle(
        [completion("Neither."), completion("Neither."), completion("Both\x1b are fine.", "weary")]
    )
    server.answer = lambda handler: handler._send(200, next(answers))
    assert winners(judge(server, tmp_path).compare(PAIRS[:11])) == {"invalid": 11}
    said = "none of the first 10 pairs got a winner; the last reply (finish_reason 'weary') begins: Both are fine."
    assert [message for message in caplog.messages if said in message] == [caplog.messages[-1]]


def test_pairs_that_were_judged_before_are_not_among_the_first_ones(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = (200, completion())
    judge(server, tmp_path).compare(PAIRS[:1])
    server.answer = (200, completion("Both are fine."))
    assert winners(judge(server, tmp_path).compare(PAIRS[:10])) == {"first": 1, "invalid": 9}
    assert "got a winner" not in caplog.text
    assert winners(judge(server, tmp_path).compare([*PAIRS[:1], *PAIRS[10:20]])) == {"first": 1, "invalid": 10}
    assert "none of the first 10 pairs got a winner" in caplog.text


@pytest.mark.parametrize("finish", ["stop", "eos_token", "end_turn", "STOP", "eos", "COMPLETE", None, "stop_sequence"])
def test_a_reply_that_came_to_its_end_is_paid_once(server: Server, tmp_path: Path, finish: str | None) -> None:
    server.answer = (200, completion(finish=finish))
    assert winners(judge(server, tmp_path).compare(PAIRS[:3])) == {"first": 3}
    assert server.calls == 3


def test_an_answer_that_is_cut_on_the_way_is_one_reply(server: Server, tmp_path: Path) -> None:
    answers = [(200, completion()), (200, b'{"choices": [{"mess'), (200, completion())]
    server.answer = lambda handler: handler._send(*answers.pop(0))
    verdicts = judge(server, tmp_path).compare(PAIRS[:2])
    assert winners(verdicts) == {"first": 2}
    # 8 * 50 / 1e6 for the tokens that may have been written.
    assert verdicts[1].cost_usd > verdicts[0].cost_usd + 4e-4
    assert judge(server, tmp_path).compare(PAIRS[:2]) == verdicts


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -1e6, "completion_tokens": None}])
def test_the_budget_holds_whatever_is_reported(server: Server, tmp_path: Path, usage: Any) -> None:
    """What 30 pairs would cost at one call each is within the budget; each is asked three times."""
    many = [Comparison(f"q{i}", f"post {i} end" + " x" * 300, "", "a", f"b {i}") for i in range(30)]
    server.answer = (200, completion("Both are fine.", usage=usage))
    with pytest.raises(UserError, match=r"0\.0\d+ USD are spent, which is over judge.chat.budget_usd, 0.033"):
        judge(server, tmp_path, budget_usd=0.033).compare(many)
    rows = VerdictStore(tmp_path / "s.sqlite").export()
    assert 26 * 3 <= len(rows) == server.calls <= 28 * 3  # at most 25 pairs late, and each that was paid is there
    content = [len(json.loads(text)["messages"][0]["content"].encode()) for text in rows["request"]]
    assert rows["prompt_tokens"].tolist() == [-(-size // 3) for size in content]
    assert set(rows["completion_tokens"]) == {5}  # 14 bytes


def test_calls_that_gave_no_reply_count_in_this_run_and_in_the_next(server: Server, tmp_path: Path) -> None:
    """Each costs 50 tokens written at 8 USD a million and a third of its bytes read at 2."""
    server.answer = (200, b"<html>")
    for number in (1, 2):
        with pytest.raises(UserError, match="none of the chat protocol"):
            judge(server, tmp_path).compare(PAIRS[:1])
        rows = VerdictStore(tmp_path / "s.sqlite").export()
        assert len(rows) == number == server.calls
        assert set(rows["completion_tokens"]) == {50}
    size = len(json.loads(rows["request"][0])["messages"][0]["content"].encode())
    lost = (50 * 8 + -(-size // 3) * 2) / 1e6
    server.answer = (200, completion())
    with pytest.raises(UserError, match=rf"on top of {2 * lost:.4f} USD spent before"):
        judge(server, tmp_path, budget_usd=2 * lost).compare(PAIRS[:1])
    # The pair stays open, and its verdict costs what its own reply costs.
    assert judge(server, tmp_path).compare(PAIRS[:1])[0].cost_usd == pytest.approx((9 * 2 + 4 * 8) / 1e6)
    rows = VerdictStore(tmp_path / "s.sqlite").export()
    assert VerdictStore(tmp_path / "t.sqlite").add(rows) == len(rows) == 3


def test_one_absurd_count_of_an_earlier_version_changes_nothing(server: Server, tmp_path: Path) -> None:
    server.answer = (200, completion())
    first = judge(server, tmp_path).compare(PAIRS[:4])
    store = VerdictStore(tmp_path / "s.sqlite")
    keys = store.export()["key"].tolist()
    for key, count in zip(keys, (2**62, 2**62, -5, "many"), strict=True):
        store._connection.execute("UPDATE replies SET prompt_tokens = ? WHERE key = ?", (count, key))
    read, written = store.tokens(server.url, "m")
    assert 4 * 200 < read < 4 * 600 and written == 16
    assert winners(judge(server, tmp_path).compare(PAIRS[:6])) == {"first": 6}
    replayed = judge(server, tmp_path, recorded=True).compare(PAIRS[:4])
    assert all(0 < b.cost_usd < 0.002 for b in replayed) and len(first) == 4
    assert VerdictStore(tmp_path / "s.sqlite").export()["prompt_tokens"].max() < 600


def test_what_a_server_serves_stands_in_the_report_without_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-the-key-of-this-judge"
    monkeypatch.setenv("K", key)
    server.answer = (200, completion(f"{key}\nPreferred: A", model=f"m {key}"))
    one = judge(server, tmp_path)
    one._endpoint = Endpoint(server.url, "m", "K", 5.0, 0, None, 50)
    with caplog.at_level(logging.INFO):
        verdict = one.compare(PAIRS[:1])[0]
    assert (verdict.winner, verdict.reply) == ("first", "***\nPreferred: A")
    assert one.report()["served_models"] == ["m ***"]
    assert key not in caplog.text + json.dumps(one.report())
    assert all(key.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_the_prompt_of_a_call_that_cannot_succeed_is_named(server: Server, tmp_path: Path) -> None:
    except_for(server, (500, b"died"), 4)
    with pytest.raises(UserError, match=r"prompt 'p4': still refused after 0 retries .*status 500: died"):
        judge(server, tmp_path).compare(PAIRS)
