"""What is kept of an answer, however much it says."""

from __future__ import annotations

import json

from prefopt.judging.answers import error_words, listed_models, read_completion
from prefopt.judging.verdict_store import Reply


def test_what_an_answer_says_of_itself_is_cut() -> None:
    choice = {"message": {"content": "Preferred: A"}, "finish_reason": "stop\n" * 50}
    usage = {"prompt_tokens": "9" * 90, "completion_tokens": 3}
    answer = json.dumps({"choices": [choice], "model": "m" * 300, "usage": usage})
    kept = Reply("Preferred: A", ("stop " * 16).strip(), "m" * 200, 2, 3)
    assert read_completion(answer, [{"content": "abcd"}, {"content": "é"}], 50) == (kept, f"prompt_tokens {'9' * 40}")
    del usage["completion_tokens"]
    without = json.dumps({"choices": [choice], "usage": usage})
    found = read_completion(without, [{"content": "ab"}], 50)
    assert found == (
        Reply("Preferred: A", kept.finish_reason, "", 1, 50),
        f"prompt_tokens {'9' * 40}, completion_tokens missing",
    )
    assert listed_models(json.dumps([{"id": "m", "shutdown_date": "x" * 90}, "n", 3])) == {"m": "x" * 40, "n": ""}
    assert error_words({"error": {"message": "y" * 900}}) == "y" * 500
