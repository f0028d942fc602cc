from __future__ import annotations

import pytest

from prefopt.errors import UserError
from prefopt.judging.judge import Comparison
from prefopt.judging.oracle import OracleJudge, well_formed


def test_a_prompt_without_facts_is_refused() -> None:
    with pytest.raises(UserError, match=r"'p'.*the task's judge\.kind"):
        OracleJudge().compare([Comparison("p", "prompt", "", "a", "b")])


def test_where_there_is_no_grammar_nothing_is_well_formed_or_ill_formed() -> None:
    assert well_formed("", " any text") is None
