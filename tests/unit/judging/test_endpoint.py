"""One call to servers that answer oddly, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest

from prefopt.errors import UserError
from prefopt.judging import endpoint as endpoints
from prefopt.judging.endpoint import Endpoint
from prefopt.judging.failures import words
from prefopt.judging.transport import TooLongError, Transport
from prefopt.judging.verdict_store import REFUSED, UNREADABLE, Reply
from servers import Handler, Server, completion

KEY = "sk-a-very-secret-key"
ASKED = [{"role": "user", "content": "Which of these is better? " * 3}]  # 78 bytes: 26 tokens at most
ENVIRONMENT = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server() as one:
        yield one
        one.shutdown()


def endpoint(server: Server, retries: int = 0, timeout: float = 5.0, **changes: Any) -> Endpoint:
    return Endpoint(changes.get("url", server.url), "m", "JUDGE_KEY", timeout, retries, None, changes.get("most", 50))


def unseen(_: Reply) -> None:
    """Takes calls without a reply where a test does not look at them."""


def ask(server: Server, **changes: Any) -> Reply:
    return endpoint(server, **changes).ask(ASKED, {"max_tokens": 50}, "prompt 'p0'", unseen)


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Preferred: B"}]}
NESTED: Any = "[" * 400 + "]" * 400


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (completion(), "Preferred: A"),
        (completion([THINKING, {"type": "text", "text": "It is "}, {"type": "text", "text": "A"}]), "It is A"),
        (completion([{"text": "A"}, "B", 7, None, {"type": "image_url"}]), "AB"),
        (completion({"type": "text", "text": "A"}), "A"),
        (completion(7), ""),
        (completion(None), ""),
        (completion(None, choices=[{"message": {"content": None, "refusal": "I will not."}}]), "I will not."),
        (completion(choices=[{"message": None, "finish_reason": "stop"}]), ""),
        (completion(choices=[None]), ""),
        (completion(choices=[]), ""),
        (completion("\ud83d so\ud83d\ude00"), "\ufffd so\U0001f600"),
        (completion(extra=json.loads(NESTED)), "Preferred: A"),
        (json.dumps(completion()).replace('"created": 0', '"created": ' + "9" * 6000).encode(), "Preferred: A"),
        (b"\xef\xbb\xbf" + json.dumps(completion()).encode(), "Preferred: A"),
        (completion(model=None, id=[], created="x", error=None), "Preferred: A"),
    ],
)
def test_whatever_an_answer_holds_its_text_is_found(server: Server, body: Any, text: str) -> None:
    server.answer = (200, body)
    reply = ask(server)
    assert reply.text == text
    assert server.calls == 1


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"<html>Welcome</html>",
            b"Preferred: A",
            b'{"id": "x", "choices": [{"mess',
            b"",
            b"null",
            b'"A"',
            b"[1]",
            b"\xff",
        ),
        *(b"{}", b'{"choices": null}', b'{"choices": {"a": 1}}', b"[" * 100_000),
    ],
)
def test_what_is_none_of_the_protocol_is_one_sentence(server: Server, body: bytes) -> None:
    server.answer = (200, body, {"Content-Type": "text/html"})
    said = re.escape(body.decode("utf-8", "replace")[:40].strip() or "nothing")
    with pytest.raises(UserError, match=rf"prompt 'p0': the answer is none .*text/html: {said}.*judge.chat.base_url"):
        ask(server, retries=3)
    assert server.calls == 1


def test_after_others_that_could_be_read_it_is_one_reply_that_counts(server: Server) -> None:
    one = endpoint(server)
    server.answer = (200, completion())
    one.ask(ASKED, {}, "p", unseen)
    server.answer = (200, b'{"choices": [{"mess')
    reply = one.ask(ASKED, {}, "p", unseen)
    assert reply == Reply('application/json: {"choices": [{"mess', UNREADABLE, "", 26, 50)
    server.answer = (200, completion("x" * 2**21))
    reply = one.ask(ASKED, {}, "p", unseen)
    assert reply == Reply("the answer is longer than 1,049,376 bytes", UNREADABLE, "", 26, 50)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 4}, (9, 4)),
        ({"prompt_tokens": 10**9, "completion_tokens": 1}, (10**9, 1)),
        # 78 bytes were asked, 12 answered.
        (None, (26, 4)),
        ("many", (26, 4)),
        ([], (26, 4)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (26, 4)),
        ({"prompt_tokens": -(10**9), "completion_tokens": -1}, (26, 4)),
        ({"prompt_tokens": "9", "completion_tokens": 4.5}, (26, 4)),
        ({"prompt_tokens": 10**9 + 1, "completion_tokens": 10**30}, (26, 4)),
        ({"prompt_tokens": True, "completion_tokens": {"a": 1}}, (26, 4)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (26, 4)),  # of texts that are there
        ({"prompt_tokens": 2**62, "completion_tokens": 5}, (26, 5)),
    ],
)
def test_tokens_that_cannot_be_are_estimated_and_said_once(
    server: Server, usage: Any, counted: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = (200, completion(usage=usage))
    one = endpoint(server)
    for _ in range(2):
        reply = one.ask(ASKED, {}, "p", unseen)
        assert (reply.prompt_tokens, reply.completion_tokens) == counted
    said = [record for record in caplog.records if "reports no tokens that can be counted" in record.message]
    assert len(said) == (26 in counted)


@pytest.mark.parametrize(("content", "finish"), [("", "stop"), (None, "length"), ("It is", "length")])
def test_unseen_tokens_count_as_all_that_were_allowed(server: Server, content: Any, finish: str) -> None:
    server.answer = (200, completion(content, finish, usage=None))
    assert ask(server).completion_tokens == 50


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, "status 400: too long"),
        (422, {"detail": [{"msg": "odd"}]}, 'status 422: [{"msg": "odd"}]'),
        (413, b"Entity too large", "status 413: Entity too large"),
        (400, b"", "status 400 without a word"),
        (200, {"error": "You are out of quota"}, "status 400: You are out of quota"),
        (200, {"error": {"message": "filtered", "code": "content_filter"}}, "status 400: filtered"),
        (200, {"error": {"message": "filtered", "code": 400, "metadata": {}}, "choices": []}, "status 400: filtered"),
    ],
)
def test_a_pair_may_be_refused_in_the_servers_words(server: Server, status: int, body: Any, said: str) -> None:
    server.answer = (status, body)
    assert ask(server, retries=3) == Reply(said, REFUSED, "", 0, 0)
    assert server.calls == 1


@pytest.mark.parametrize(
    ("error", "said", "calls"),
    [
        ({"message": "quota exceeded", "code": 429}, r"still refused after 1 retries \(status 429: quota exceeded", 2),
        ({"message": "upstream died", "code": "502"}, r"still refused .*status 502: upstream died", 2),
        ({"message": "who are you", "code": 401}, r"the key was refused \(status 401: who are you", 1),
    ],
)
def test_an_error_in_a_200_is_one_of_the_status_that_it_names(
    server: Server, error: Any, said: str, calls: int
) -> None:
    server.answer = (200, {"error": error})
    with pytest.raises(UserError, match=said):
        ask(server, retries=1)
    assert server.calls == calls


def test_403_is_the_key_until_another_call_was_answered(server: Server) -> None:
    one = endpoint(server)
    server.answer = (403, {"error": {"message": "flagged"}})
    with pytest.raises(UserError, match="the key was refused"):
        one.ask(ASKED, {}, "p", unseen)
    server.answer = (200, completion())
    one.ask(ASKED, {}, "p", unseen)
    server.answer = (403, {"error": {"message": "flagged"}})
    assert one.ask(ASKED, {}, "p", unseen).text == "status 403: flagged"


@pytest.mark.parametrize("shown", [KEY, KEY.upper(), KEY.replace("s", "\\u0073", 1)])
def test_a_key_that_is_echoed_goes_nowhere(server: Server, shown: str, caplog: pytest.LogCaptureFixture) -> None:
    echo = json.dumps(completion("I got KEY.", "KEY", model="KEY", usage={"prompt_tokens": "KEY"})).replace(
        "KEY", shown
    )
    server.models = (200, json.dumps({"data": [{"id": "m", "shutdown_date": "KEY"}]}).replace("KEY", shown).encode())
    server.answer = (200, echo.encode())
    one = endpoint(server)
    one.check()
    reply = one.ask(ASKED, {}, "p", unseen)
    assert (reply.text, reply.finish_reason, reply.served_model) == ("I got ***.", "***", "***")
    plain = [] if "\\" in shown else [(400, b"KEY"), (200, b"<p>KEY")]  # escapes are JSON's
    for status, body in [(400, b'{"error": {"message": "KEY"}}'), *plain]:
        server.answer = (status, body.replace(b"KEY", shown.encode()))
        assert "***" in one.ask(ASKED, {}, "p", unseen).text
    server.answer = (307, b"", {"Location": f"http://other.example/?key={KEY}"})
    with pytest.raises(UserError, match=r"key=\*\*\*") as caught:
        one.ask(ASKED, {}, "p", unseen)
    assert KEY.casefold() not in (str(caught.value) + caplog.text).casefold()


def test_a_placeholder_is_not_searched_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "A")
    server.answer = (200, completion())
    assert ask(server).text == "Preferred: A"


def test_nothing_that_a_terminal_obeys_is_passed_on(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    code = "\x1b]0;owned\x07\x9b31m\u202eevil\u200b\r\n!"
    server.models = (200, {"data": [{"id": "m", "shutdown_date": code}]})
    server.answer = (200, completion("A", code, model=code, usage={"prompt_tokens": code}))
    one = endpoint(server)
    one.check()
    reply = one.ask(ASKED, {}, "p", unseen)
    assert reply.finish_reason == reply.served_model == "]0;owned31mevil !"
    server.answer = (402, {"error": {"message": code}})
    with pytest.raises(UserError, match=r"status 402: \]0;owned31mevil !\)") as caught:
        one.ask(ASKED, {}, "p", unseen)
    for text in (str(caught.value), *(record.message for record in caplog.records)):
        assert text.isprintable()


def test_nothing_of_the_environment_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-account")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-account")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-other-account\nX-Team: team-mine")
    server.answer = (200, completion())
    one = endpoint(server)
    one.check()
    one.ask(ASKED, {}, "p", unseen)
    assert len(server.seen) == 2
    for _, headers, _ in server.seen:
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert not re.search("other-account|admin|mine", json.dumps(headers))
    Endpoint(server.url, "m", None, 5.0, 0, None, 50).ask(ASKED, {}, "p", unseen)
    assert server.seen[-1][1]["Authorization"] == "Bearer none"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_and_not_followed(server: Server, status: int) -> None:
    with Server() as other:
        other.answer = (200, completion())
        server.answer = server.models = (status, b"", {"Location": f"{other.url}/chat/completions"})
        one = endpoint(server, retries=2)
        one.check()
        with pytest.raises(UserError, match=rf"sends its callers on to {other.url}/chat.* not followed.*base_url"):
            one.ask(ASKED, {}, "p", unseen)
        assert server.calls == 1 and other.seen == []
        other.shutdown()


def test_an_error_in_an_answer_that_sends_on_stays_one_that_sends_on(server: Server) -> None:
    server.answer = (300, {"error": {"code": 429}})
    with pytest.raises(UserError, match=r"sends its callers on to somewhere else \(status 300\)"):
        ask(server)


def test_a_cause_without_words_is_called_by_its_name() -> None:
    error = openai.APIConnectionError(request=httpx2.Request("POST", "http://localhost"))
    error.__cause__ = TimeoutError()
    assert words(error) == "Connection error: TimeoutError"


def test_calls_begin_at_equal_distances(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still: 120 a minute are half a second from one to the next."""
    slept: list[float] = []
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append))
    server.answer = (200, completion())
    one = Endpoint(server.url, "m", None, 5.0, 0, 120.0, 50)
    for _ in range(3):
        one.ask(ASKED, {}, "p", unseen)
    assert slept == [0.0, 0.5, 1.0]


def test_the_loop_of_calls_does_not_hold_the_process(server: Server) -> None:
    endpoint(server)
    assert {thread.daemon for thread in threading.enumerate() if thread.name == "endpoint"} == {True}


def test_what_is_none_of_the_protocol_is_quoted_to_200_characters(server: Server) -> None:
    server.answer = (200, b"x" * 300)
    with pytest.raises(UserError, match=r": x{200}\); check"):
        ask(server)


@pytest.mark.parametrize(("size", "taken"), [(10, True), (11, False)])
def test_an_answer_of_the_longest_length_is_taken(size: int, taken: bool) -> None:
    async def read() -> bytes:
        async with Transport(None, 5.0, 10) as transport:
            request = httpx2.Request("POST", "http://localhost")
            return await transport._read(httpx2.Response(200, content=b"x" * size, request=request))

    with contextlib.nullcontext() if taken else pytest.raises(TooLongError, match="longer than 10 bytes"):
        assert asyncio.run(read()) == b"x" * size


def slowly(handler: Handler, head: bytes, chunk: bytes, pause: float) -> None:
    """Sends a beginning, then chunk after chunk for at most three seconds."""
    try:
        handler.wfile.write(head)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            handler.wfile.write(chunk)
            time.sleep(pause)
    except OSError:
        pass


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "head", [HEAD + b"\r\n", HEAD + b"Content-Length: 9000\r\n\r\n", HEAD + b"X: ", b"HTTP/1.1 200 "]
)
def test_a_server_that_drips_meets_the_deadline(server: Server, head: bytes) -> None:
    server.answer = lambda handler: slowly(handler, head, b"x", 0.05)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no reply within 0.4 s in 1 attempts"):
        ask(server, timeout=0.4)
    assert time.monotonic() - start < 1.5


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize(
    ("answer", "what", "calls"),
    [
        (lambda handler: slowly(handler, HEAD + b"\r\n", b"x", 0.05), "the answer took too long", 2),
        (hang_up, "Server disconnected without sending a response.", 2),
        ((200, b"<html>"), "application/json: <html>", 1),
        ((200, completion("x" * 2**21)), "the answer is longer than 1,049,376 bytes", 1),
        ((500, b"died"), None, 2),  # it says itself that it wrote nothing
    ],
)
def test_a_call_that_gave_no_reply_counts_as_a_whole_one(
    server: Server, answer: Any, what: str | None, calls: int
) -> None:
    lost: list[Reply] = []
    one = endpoint(server, retries=1, timeout=0.4)
    server.answer = answer
    with pytest.raises(UserError):
        one.ask(ASKED, {}, "p", lost.append)
    assert server.calls == calls
    assert lost == ([Reply(what, UNREADABLE, "", 26, 50)] * calls if what else [])


def test_a_call_that_was_made_again_counts_beside_its_reply(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    answers = [hang_up, lambda handler: handler._send(200, completion())]
    server.answer = lambda handler: answers.pop(0)(handler)
    lost: list[Reply] = []
    assert endpoint(server, retries=1).ask(ASKED, {}, "p", lost.append).completion_tokens == 4
    assert [reply.completion_tokens for reply in lost] == [50]
    assert "p: 1 calls were sent and not answered (Server disconnected" in caplog.text


def test_a_call_that_never_reached_the_server_costs_nothing(server: Server) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        lost: list[Reply] = []
        one = endpoint(server, retries=1, url=f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
        with pytest.raises(UserError, match="cannot be reached"):
            one.ask(ASKED, {}, "p", lost.append)
    # Nor one that its own timeout ends before the server takes it: nobody accepts here, and the backlog is full.
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        queue = [socket.socket() for _ in range(4)]
        for waiting in queue:
            waiting.setblocking(False)
            waiting.connect_ex(address)
        with pytest.raises(UserError, match=r"no reply within 0\.3 s"):
            endpoint(server, timeout=0.3, url=f"http://127.0.0.1:{address[1]}/v1").ask(ASKED, {}, "p", lost.append)
        for waiting in queue:
            waiting.close()
    assert lost == []


def test_a_list_that_drips_is_not_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.models = lambda handler: slowly(handler, HEAD + b"\r\n", b" ", 0.05)
    start = time.monotonic()
    with caplog.at_level(logging.INFO):
        endpoint(server, timeout=0.3).check()
    assert time.monotonic() - start < 3
    assert "lists no models (Request timed out" in caplog.text


def test_an_answer_without_end_is_not_taken(server: Server) -> None:
    server.answer = lambda handler: slowly(handler, HEAD + b"\r\n", b" " * 2**18, 0)
    with pytest.raises(UserError, match="the answer is longer than 1,049,376 bytes"):
        ask(server, retries=3, timeout=2.0)
    assert server.calls == 1


def test_a_bomb_that_unfolds_is_not_taken(server: Server) -> None:
    import gzip

    folded = gzip.compress(b" " * 2**24)
    server.answer = (200, folded, {"Content-Encoding": "gzip"})
    with pytest.raises(UserError, match="is longer than 1,049,376 bytes"):
        ask(server)


@pytest.mark.parametrize(
    "models",
    [
        *((200, b"<html>"), (200, b""), (200, {"data": None}), (200, [{"id": "m"}]), (200, {"data": ["m"]})),
        *(
            (200, {"data": [None, 7, {"id": 7}, {"id": "m", "shutdown_date": 7}]}),
            (200, b"null"),
            (200, b"[" * 100_000),
        ),
        *(
            (404, {}),
            (500, b"no"),
            (200, {"error": "none here"}),
            (302, b"", {"Location": "/"}),
            (200, b" " * (2**23 + 1)),
        ),
    ],
)
def test_a_list_of_models_of_any_shape_is_no_error(server: Server, models: Any) -> None:
    server.models = models
    endpoint(server).check()


def test_the_end_of_a_model_is_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.models = (200, {"object": "list", "data": [{"id": "m", "object": "model", "shutdown_date": "2027-01-14"}]})
    endpoint(server).check()
    assert caplog.messages == [f"{server.url} will stop serving 'm' on 2027-01-14."]
    caplog.clear()
    server.models = (200, {"data": [{"id": "n"}]})
    endpoint(server).check()
    assert caplog.messages == [f"{server.url} does not list the model 'm'; the first call will tell."]


def test_a_key_is_refused_before_anything_is_asked(server: Server) -> None:
    server.models = (401, {"error": {"message": f"wrong key {KEY}"}})
    with pytest.raises(UserError, match=r"the key was refused \(status 401: wrong key \*\*\*\); check .* JUDGE_KEY"):
        endpoint(server).check()


@pytest.mark.parametrize("value", ["sk-a key", "sk-a\nkey", "sk-aé", "sk-“a”"])
def test_what_can_be_no_key_is_refused_unseen(server: Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match="The environment variable JUDGE_KEY holds no key") as caught:
        endpoint(server)
    assert value not in str(caught.value)


def test_proxies_and_certificates_are_named_where_a_call_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            UserError, match=r"cannot be reached \(Connection error: .+\); check .*base_url; verdicts"
        ) as one:
            ask(server, url=f"http://{nobody}/v1")
        assert "environment" not in str(one.value)
        monkeypatch.setenv("HTTP_PROXY", f"http://user:hidden@{nobody}")
        monkeypatch.setenv("no_proxy", "elsewhere.example")
        with pytest.raises(
            UserError, match="base_url, and what the environment's HTTP_PROXY, no_proxy say; verdicts"
        ) as two:
            ask(server)
        assert "hidden" not in str(two.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/no/such/hidden.pem"),
        ("HTTPS_PROXY", "ftp://user:hidden@proxy.example"),
        ("ALL_PROXY", "socks5://user:hidden@proxy.example"),
        ("HTTP_PROXY", "http://user:hidden@[bad"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    server.answer = (200, completion())
    with pytest.raises(UserError, match=rf"check judge.chat.base_url, and what the environment's {name} say") as caught:
        ask(server)
    assert "hidden" not in str(caught.value)


def test_a_certificate_that_is_not_known_says_so(server: Server) -> None:
    with pytest.raises(UserError, match=r"cannot be reached \(Connection error: .*SSL"):
        ask(server, url=server.url.replace("http:", "https:"))


@pytest.mark.parametrize("url", ["http://[bad/v1", "http://127.0.0.1:99999/v1", "http:///v1"])
def test_an_address_that_is_none_is_one_sentence(server: Server, url: str) -> None:
    with pytest.raises(UserError, match=r"check judge.chat.base_url"):
        ask(server, url=url)


def test_a_connection_that_is_cut_is_tried_again(server: Server) -> None:
    def cut(handler: Handler) -> None:
        handler.wfile.write(HEAD + b"Content-Length: 100\r\n\r\n{")
        handler.close_connection = True

    answers: list[Callable[[Handler], None]] = [cut, lambda handler: handler._send(200, completion())]
    server.answer = lambda handler: answers.pop(0)(handler)
    assert ask(server, retries=1).text == "Preferred: A"


def test_a_reply_says_something_or_not() -> None:
    reply = Reply("A", "stop", "m", 1, 1)
    assert reply.says_something
    for change in ({"text": " \n"}, {"finish_reason": REFUSED}, {"finish_reason": UNREADABLE}):
        assert not dataclasses.replace(reply, **change).says_something
    assert dataclasses.replace(reply, finish_reason="length").says_something


def test_logs_of_one_call_hold_no_key(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answer = (200, completion())
    with caplog.at_level(logging.DEBUG):
        ask(server)
    assert KEY not in caplog.text
