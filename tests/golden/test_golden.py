"""No number has moved. Where one was meant to, `python tests/golden/golden.py` writes them anew."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import golden
import pandas as pd
import pytest

# Another processor sums in another order. With PyTorch, MKL and oneDNN held to the instructions of the oldest ones losses
# moved by 4e-6 of themselves at most, and weights by 1.3e-4: their first steps divide by the root of small gradients.
LOSS = {"rel": 1e-4, "abs": 1e-5}
WEIGHT = {"rel": 1e-3, "abs": 5e-4}


def expected(name: str) -> Any:
    return json.loads((golden.EXPECTED / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return golden.training(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", expected("training"))
def test_losses_and_weights_of_a_trainer(training: dict[str, Any], name: str) -> None:
    known, found = expected("training")[name], training[name]
    assert found["losses"] == pytest.approx(known["losses"], **LOSS)
    assert found["weights"].keys() == known["weights"].keys()
    for key, values in known["weights"].items():
        assert found["weights"][key] == pytest.approx(values, **WEIGHT), key


def test_every_trainer_has_golden_numbers(training: dict[str, Any]) -> None:
    assert training.keys() == expected("training").keys()


def test_samples_of_a_policy(tmp_path: Path) -> None:
    known, found = expected("samples"), golden.samples(tmp_path)
    for key in known[0]:
        values, others = ([row[key] for row in rows] for rows in (known, found))
        assert others == (pytest.approx(values, **LOSS) if key.endswith("logp") else values), key


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return golden.tables()


@pytest.mark.parametrize("name", sorted(path.stem for path in golden.EXPECTED.glob("*.csv")))
def test_a_table_of_an_analysis(tables: dict[str, pd.DataFrame], name: str) -> None:
    known = pd.read_csv(golden.EXPECTED / f"{name}.csv")
    found = pd.read_csv(io.StringIO(tables[name].to_csv(index=False)))
    pd.testing.assert_frame_equal(found, known, rtol=1e-6, atol=1e-9)


def test_every_table_is_held(tables: dict[str, pd.DataFrame]) -> None:
    assert tables.keys() == {path.stem for path in golden.EXPECTED.glob("*.csv")}
