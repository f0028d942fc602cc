"""A judge that the jobs serve themselves, by an engine of some lines; tests/workflow/test_judges_run.py has a real one."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from prefopt.errors import UserError
from prefopt.judging import serving
from prefopt.judging.serving import ServedEndpoint, ServeRecipe, address, command, served
from prefopt.store.files import canonical_json

ENGINE = """\
#!{python}
import http.server, json, os, pathlib, sys

here = pathlib.Path(__file__).parent
with (here / "started").open("a") as file:
    file.write(json.dumps({{"words": sys.argv[1:], "pid": os.getpid(), "key": os.environ.get("JUDGE_KEY")}}) + "\\n")
{more}

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        models = json.dumps({{"object": "list", "data": [{{"id": sys.argv[2]}}]}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(models)))
        self.end_headers()
        self.wfile.write(models)

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[6])), Server).serve_forever()
"""
# A job: it asks for a server, says where, and ends when its standard input does.
JOB = """
import logging, pathlib, sys
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.judging.serving import ServeRecipe, served

logging.basicConfig(level=logging.INFO)
try:
    print(served(from_json(ServeRecipe, sys.argv[1]), pathlib.Path(sys.argv[2]), idle=float(sys.argv[3])), flush=True)
except UserError as error:
    print(f"refused: {error}", flush=True)
sys.stdin.read()
"""


def engine(folder: Path, more: str = "") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "engine"
    path.write_text(ENGINE.format(python=sys.executable, more=textwrap.dedent(more)))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a judge; of one's own"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def recipe(model: Path, program: str | None) -> ServeRecipe:
    return ServeRecipe(model=str(model), engine="transformers", program=program, gpus=0)


@contextlib.contextmanager
def job(wanted: ServeRecipe, root: Path, idle: float = 30.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that asks, and what it says first."""
    words = [sys.executable, "-c", JOB, canonical_json(vars(wanted)), str(root), str(idle)]
    paths = {
        "PYTHONPATH": str(Path(serving.__file__).parents[2]),
        "JUDGE_KEY": "k",
        "PREFOPT_UNSET": "--unset=JUDGE_KEY",
    }
    with subprocess.Popen(
        words, env={**os.environ, **paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where the servers' addresses lie; what still serves from there is ended."""
    yield tmp_path / "judges"
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path / "judges") in (process.info["cmdline"] or []) or any(
            str(tmp_path) in word for word in process.info["cmdline"] or [] if "engine" in word
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def started(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "started").read_text().splitlines()]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def answers(url: str) -> bool:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    with contextlib.suppress(OSError):
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    return False


def test_jobs_share_a_server_that_ends_after_the_last(model: Path, root: Path, tmp_path: Path) -> None:
    wanted = recipe(model, engine(tmp_path / "bin"))
    with job(wanted, root, idle=1) as (first, url), job(wanted, root, idle=1) as (_, same):
        assert url == same and url.startswith("http://127.0.0.1:") and answers(url)
        first.kill()
        first.wait()
        time.sleep(2)
        assert answers(url), "the other job still asks"
    (one,) = started(tmp_path / "bin")
    words = ["serve", str(model), "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--device", "cpu"]
    assert one["words"] == [*words, "--default-seed", "0"]
    assert one["key"] is None, "the key of another judge is not the engine's"
    until(lambda: not answers(url) and not psutil.pid_exists(one["pid"]))  # type: ignore[arg-type]
    assert not list(root.glob("*/address"))
    with job(wanted, root) as (_, next_url):
        assert answers(next_url) and len(started(tmp_path / "bin")) == 2


def test_what_was_killed_is_started_again(model: Path, root: Path, tmp_path: Path) -> None:
    """With `kill -9` the keeper takes the engine with it; a server that dies takes the address."""
    wanted = recipe(model, engine(tmp_path / "bin"))
    with job(wanted, root) as (_, url):
        pid = int(started(tmp_path / "bin")[0]["pid"])  # type: ignore[call-overload]
        psutil.Process(pid).parent().kill()  # type: ignore[union-attr]
        until(lambda: not answers(url))
        assert list(root.glob("*/address"))
        with job(wanted, root) as (_, other):
            assert answers(other) and len(started(tmp_path / "bin")) == 2
            os.kill(int(started(tmp_path / "bin")[1]["pid"]), signal.SIGKILL)  # type: ignore[call-overload]
            until(lambda: not list(root.glob("*/address")))
            (log,) = root.glob("*/log")
            until(lambda: "transformers ended by itself with the code -9" in log.read_text())


def test_a_server_whose_first_job_was_killed_while_it_loads_is_waited_for(
    model: Path, root: Path, tmp_path: Path
) -> None:
    slow = engine(tmp_path / "bin", "import time; time.sleep(4)")
    wanted = recipe(model, slow)
    words = [sys.executable, "-c", JOB, canonical_json(vars(wanted)), str(root), "30"]
    paths = {"PYTHONPATH": str(Path(serving.__file__).parents[2])}
    with subprocess.Popen(words, env={**os.environ, **paths}, stdin=subprocess.PIPE) as first:
        until(lambda: (tmp_path / "bin" / "started").exists())
        first.kill()
    with job(wanted, root) as (_, url):
        assert answers(url) and len(started(tmp_path / "bin")) == 1


def test_another_model_engine_or_allocation_is_another_server(
    model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model, engine(tmp_path / "bin"))
    with job(wanted, root) as (_, first):
        (model / "config.json").write_text('{"other": 1}')
        with job(wanted, root) as (_, second):
            monkeypatch.setenv("SLURM_JOB_ID", "7")
            with job(wanted, root) as (_, third):
                assert len({first, second, third}) == 3 and all(map(answers, (first, second, third)))


def test_an_engine_that_does_not_come_up_is_told_with_its_log(model: Path, root: Path, tmp_path: Path) -> None:
    more = "print('CUDA out of memory: 80 GiB', flush=True); sys.exit(1)"
    with job(recipe(model, engine(tmp_path / "bin", more)), root) as (_, answer):
        said = "CUDA out of memory: 80 GiB | prefopt serve: transformers ended with the code 1 before it answered."
        assert answer.startswith(f"refused: The server of {model} ended while it was started: {said}")
        (log,) = root.glob("*/log")
        assert answer.endswith(f"({log} has the rest).")
    assert len(started(tmp_path / "bin")) == 1, "loading a model again would not help"


def test_a_port_that_was_taken_meanwhile(model: Path, root: Path, tmp_path: Path) -> None:
    """Another program listens there before the engine does, at first."""
    once = """
        import socket, time
        if sum(1 for _ in (here / "started").open()) == 1:
            other = socket.create_server(("127.0.0.1", int(sys.argv[6])))
            if os.fork():
                sys.exit("address already in use")
            time.sleep(5)
            os._exit(0)
    """
    with job(recipe(model, engine(tmp_path / "bin", once)), root) as (_, url):
        assert answers(url) and len(started(tmp_path / "bin")) == 2


def test_the_words_of_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = engine(tmp_path / "bin")
    base = ["serve", "m", "--host", "127.0.0.1", "--port", "80"]
    for of, gpus, rest in (
        ("transformers", 0, ["--device", "cpu", "--default-seed", "0"]),
        ("transformers", 2, ["--device", "auto", "--default-seed", "0"]),
        ("vllm", 0, ["--seed", "0", "--tensor-parallel-size", "1", "--kv-cache-memory-bytes", str(2**32)]),
        ("vllm", 4, ["--seed", "0", "--tensor-parallel-size", "4"]),
    ):
        given = ServeRecipe(model="m", engine=of, program=program, gpus=gpus)  # type: ignore[arg-type]
        assert command(given, 80) == [program, *base, *rest]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    missing = ServeRecipe(model="m", engine="vllm", program=None, gpus=0)
    with pytest.raises(
        UserError, match=r"There is no program vllm: install vllm \(vllm into an environment of its own\)"
    ):
        command(missing, 80)
    with pytest.raises(UserError, match="There is no program /no/where"):
        command(ServeRecipe(model="m", engine="vllm", program="/no/where", gpus=0), 80)


def test_the_address_in_the_store_is_engine_and_content(model: Path) -> None:
    one = address(recipe(model, None))
    assert one.startswith("served:transformers:") and address(recipe(model, "/else/where")) == one
    moved = model.rename(model.with_name("moved"))
    assert address(recipe(moved, None)) == one, "wherever it lies"
    (moved / "config.json").write_text('{"other": 1}')
    assert address(recipe(moved, None)) != one
    with pytest.raises(UserError, match=r"holds no model \(it has no config.json\)"):
        address(recipe(model, None))


def test_a_folder_that_others_may_use_is_refused(model: Path, tmp_path: Path) -> None:
    open_to_all, link = tmp_path / "open", tmp_path / "link"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "mine")
    for folder in (open_to_all, link):
        with pytest.raises(UserError, match="is a link or others may use it"):
            served(recipe(model, None), folder)


def test_nothing_is_started_before_something_is_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every reply is stored no server is needed, and none need be there."""
    asked = []
    monkeypatch.setattr(serving, "served", lambda wanted: asked.append(wanted) or "http://127.0.0.1:9")
    limits = {"timeout": 1.0, "max_retries": 0, "requests_per_minute": None, "max_tokens": 5}
    endpoint = ServedEndpoint(recipe(model, None), **limits)
    assert asked == []
    for _ in range(2):  # batches of prompts
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1"):
            endpoint.check()
    assert asked == [recipe(model, None)]


def test_the_stage_gives_up_the_lock_with_its_end(model: Path, tmp_path: Path) -> None:
    (tmp_path / "users").touch()
    broken = ServeRecipe(model=str(model), engine="vllm", program="/no/where", gpus=0)
    values = argparse.Namespace(recipe=canonical_json(vars(broken)), folder=tmp_path, idle=1.0)
    with pytest.raises(UserError, match="There is no program"):
        serving.run(values)
    assert not (tmp_path / "address").exists()
