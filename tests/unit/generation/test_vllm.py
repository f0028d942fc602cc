"""Sampling by vLLM, for which a program stands in that speaks its protocol and samples by the engine here.

tests/vllm/ has vLLM itself.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import prefopt
from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.generation import vllm
from prefopt.store.tables import read_manifest, read_table
from tiny_task import Task, task

__all__ = ["task"]

# What it samples is what `lm.sampling` would, but that each log-probability is 0.25 too large.
PROGRAM = """\
#!{python}
import http.server, json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "started").open("a") as file:
    file.write(json.dumps({{"words": sys.argv[1:], "pid": os.getpid()}}) + "\\n")
sys.path.insert(0, {package!r})
{first}
import torch
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy
from prefopt.lm.sampling import sample
model, _ = load_policy(sys.argv[2])

class Server(http.server.BaseHTTPRequestHandler):
    def say(self, status, value):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.say(200, {{"version": "9.9"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with (here / "asked").open("a") as file:
            file.write(json.dumps(asked) + "\\n")
        {more}
        if "prompt_logprobs" in asked:
            first, *rest = asked["prompt"]
            with torch.no_grad():
                logps = completion_logprobs(model, [Row((first,), (tuple(rest),))]).tokens.tolist()
            found = [None, *({{str(token): {{"logprob": logp}}}} for token, logp in zip(rest, logps))]
            self.say(200, {{"choices": [{{"prompt_logprobs": found}}]}})
            return
        (made,) = sample(model, [asked["prompt"]], n=asked["n"], temperature=asked["temperature"],
            max_new_tokens=asked["max_tokens"], ends=asked["stop_token_ids"], seeds=[asked["seed"]])
        self.say(200, {{"choices": [{{"token_ids": one.token_ids,
            "logprobs": {{"token_logprobs": [logp + 0.25 for logp in one.logps]}}}} for one in made]}})

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Server).serve_forever()
"""
SAMPLING = {
    **{"temperatures": [0.0, 0.7, 1.0], "stop": [" shop"], "n": 3, "max_new_tokens": 8, "train_prompts": 2},
    **{"validation_prompts": 2, "test_prompts": 0, "token_budget": 64, "dtype": "float32", "seed": 0, "vllm": None},
}


def program(folder: Path, more: str = "pass", first: str = "") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "vllm"
    package = str(Path(prefopt.__file__).parents[1])
    path.write_text(PROGRAM.format(python=sys.executable, package=package, first=textwrap.dedent(first), more=more))
    path.chmod(0o755)
    return str(path)


def words(task: Task, out: Path, reference: bool = True, **values: Any) -> list[str]:
    model = ["--model", str(task.model), *(["--reference-model", str(task.model)] if reference else [])]
    recipe = json.dumps({**SAMPLING, **values})
    return ["sample", *model, "--run", "base", "--prompts", str(task.prompts), "--recipe", recipe, "--out", str(out)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_table_is_the_engines_where_both_draw_the_same(task: Task, tmp_path: Path, gpus: int) -> None:
    assert main(words(task, tmp_path / "builtin.parquet")) == 0
    served = {"program": program(tmp_path / "bin"), "gpus": gpus}
    assert main(words(task, tmp_path / "served.parquet", vllm=served)) == 0
    expected, found = (read_table(tmp_path / f"{name}.parquet", "samples") for name in ("builtin", "served"))
    same = ["prompt_id", "sample_index", "temperature", "split", "text", "tokens", "finish_reason"]
    assert found[same].equals(expected[same])
    assert [*map(list, found["token_ids"])] == [*map(list, expected["token_ids"])]
    assert np.allclose(found["reference_logp"], expected["reference_logp"], atol=1e-4)
    # The stand-in says 0.25 nats a token too much, which is seen only where the engine does not read the model itself.
    off = 0.25 * (found["temperature"] > 0) * found["tokens"] if gpus > 1 else 0
    assert np.allclose(found["logp"] - off, expected["logp"], atol=1e-4)
    manifest = read_manifest(tmp_path / "served.parquet")
    assert manifest["vllm"] == {"version": "9.9"} and "vllm" not in read_manifest(tmp_path / "builtin.parquet")
    parts = manifest["used"]["by_temperature"]
    if gpus > 1:
        assert not any("vllm_difference" in part for part in parts.values())
    else:
        assert {name: round(part["vllm_difference"], 4) for name, part in parts.items()} == {
            "0.0": 0,
            "0.7": 0.25,
            "1.0": 0.25,
        }
    assert len(lines(tmp_path / "bin" / "started")) == (2 if gpus > 1 else 1)  # one for all temperatures


def test_what_is_asked_leaves_nothing_to_the_servers_defaults(task: Task, tmp_path: Path) -> None:
    served = {"program": program(tmp_path / "bin"), "gpus": 0}
    assert main(words(task, tmp_path / "out.parquet", reference=False, temperatures=[0.7], vllm=served)) == 0
    (started,) = lines(tmp_path / "bin" / "started")
    options = dict(itertools.pairwise(started["words"]))
    longest = max(map(len, read_table(task.prompts, "prompts")["prompt_ids"])) + 8
    assert (started["words"][:2], options["--host"]) == (["serve", str(task.model)], "127.0.0.1")
    assert (options["--dtype"], options["--generation-config"], options["--logprobs-mode"]) == (
        *("float32", "vllm", "processed_logprobs"),
    )
    assert int(options["--max-model-len"]) <= longest and options["--tensor-parallel-size"] == "1"
    asked = lines(tmp_path / "bin" / "asked")
    assert len({one["seed"] for one in asked}) == len(asked) == 4
    for one in asked:
        assert (one["top_p"], one["top_k"], one["min_p"], one["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        assert one["ignore_eos"] and one["stop_token_ids"] and "stop" not in one
        assert (one["n"], one["temperature"], one["max_tokens"], one["logprobs"]) == (3, 0.7, 8, 0)


def test_the_server_is_gone_afterwards(task: Task, tmp_path: Path) -> None:
    served = {"program": program(tmp_path / "bin"), "gpus": 0}
    assert main(words(task, tmp_path / "out.parquet", temperatures=[1.0], vllm=served)) == 0
    (started,) = lines(tmp_path / "bin" / "started")
    assert not psutil.pid_exists(started["pid"])


@pytest.mark.parametrize(
    ("more", "first", "message"),
    [
        ("os._exit(7)", "", r"vLLM ended with the code 7 while it samples"),
        (
            "self.say(400, {'error': 'prompt too long'}); return",
            "",
            r"refuses what is asked \(status 400\).*prompt too long",
        ),
        ("pass", "sys.exit('ValueError: no room')", r"is not served: vllm ended with the code 1 .*ValueError: no room"),
    ],
)
def test_a_server_that_fails_is_told_and_no_table_is_left(
    task: Task, tmp_path: Path, more: str, first: str, message: str
) -> None:
    served = {"program": program(tmp_path / "bin", more, first), "gpus": 0}
    serving = vllm.serving(task.model, vllm.VLLMRecipe(**served), "float32", 64)
    with pytest.raises(UserError, match=message), serving as server:
        server.sample([[3, 4]], n=1, temperature=1.0, max_new_tokens=2, ends=[0], seeds=[1])
    assert main(words(task, tmp_path / "out.parquet", vllm=served)) == 2
    assert not (tmp_path / "out.parquet").exists()


def test_a_program_that_is_not_there_is_named_with_its_key(task: Task) -> None:
    serving = vllm.serving(task.model, vllm.VLLMRecipe(program="/no/vllm", gpus=0), "float32", 64)
    message = "no program /no/vllm: install vllm .* name its program in sampling.vllm.program"
    with pytest.raises(UserError, match=message), serving:
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_job_leaves_no_server(task: Task, tmp_path: Path, number: signal.Signals) -> None:
    served = {"program": program(tmp_path / "bin", more="time.sleep(60)"), "gpus": 0}
    command = [sys.executable, "-m", "prefopt", *words(task, tmp_path / "out.parquet", vllm=served)]
    path = {"PYTHONPATH": str(Path(prefopt.__file__).parents[1])}
    with subprocess.Popen(command, env={**os.environ, **path}, stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + 120
        while not (tmp_path / "bin" / "asked").exists():
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        job.send_signal(number)
        job.wait(60)
    (started,) = lines(tmp_path / "bin" / "started")
    while psutil.pid_exists(started["pid"]) and psutil.Process(started["pid"]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not (tmp_path / "out.parquet").exists()
