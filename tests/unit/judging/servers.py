"""A server on this machine that answers chat completions as it is told to."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}


def completion(content: Any = "Preferred: A", finish: Any = "stop", **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m-2",
        "choices": choices,
        "usage": usage,
    } | changes


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))  # type: ignore[attr-defined]
        self._answer(self.server.models)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        self._answer(self.server.answer)  # type: ignore[attr-defined]

    def _answer(self, answer: Any) -> None:
        if callable(answer):
            answer(self)
        else:
            self._send(*answer)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Answers every call with `answer` and every list of models with `models`; keeps what it was sent.

    Both are a status, a body and perhaps headers, or a function of the handler.
    """

    daemon_threads = True
    answer: Any = None
    models: Any = (200, MODELS)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_: Any) -> None:  # clients that hang up
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def calls(self) -> int:
        return sum("chat" in path for path, _, _ in self.seen)
