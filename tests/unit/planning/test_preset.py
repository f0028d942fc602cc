"""What `python -m prefopt preset` makes of a model's size and a machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt import cli
from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged
from prefopt.experiment.methods import METHODS
from prefopt.planning import preset
from prefopt.planning.estimate import hardware
from prefopt.planning.preset import PRESETS
from prefopt.planning.stages import estimates
from prefopt.resources import DEFAULTS


@pytest.fixture
def config_for(tmp_path: Path) -> Any:
    """Writes an overlay of a task of one's own with a base of the hub."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')

    def of(base: str, runs: str = "{}") -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(
            f"tasks:\n  chat:\n    like: tldr\n    data: {{ source: records, records: [{tmp_path}/pairs.jsonl] }}\n"
            f"    base: {{ source: hub, name: {base} }}\n    runs: {runs}\n"
        )
        return path

    return of


def made(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], list[str]]:
    """The overlay that the command prints, and its comments."""
    assert cli.main(["preset", *words]) == 0
    text = capsys.readouterr().out
    return yaml.safe_load(text), [line[2:] for line in text.splitlines() if line.startswith("# ")]


def test_small_models_keep_the_values_of_config_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    overlay, notes = made(capsys, "cpu", "--cores", "4", "--memory", "8")
    assert notes[-1] == "All models have fewer than 2e+07 parameters: config.yaml is made for them."
    assert set(overlay) == {"compute"} and overlay["compute"]["dtype"] == "float32"
    assert (overlay["compute"]["threads"], overlay["compute"]["gpus"]) == (1, 0), "one job a core"
    assert overlay["compute"]["hardware"]["memory_gib"] == 8


def test_a_model_that_fits_is_trained_whole(capsys: pytest.CaptureFixture[str], config_for: Any) -> None:
    own = config_for("EleutherAI/pythia-2.8b")
    overlay, notes = made(capsys, "h200", "--gpus", "2", "--cores", "16", "--configfile", str(own))
    assert overlay["compute"] == {
        **{"threads": 8, "gpus": 2, "dtype": "bfloat16", "activation_checkpointing": False, "token_budget": 32768},
        "hardware": {**PRESETS["gpus"]["h200"], "utilisation": 0.4},
    }
    assert overlay["tasks"] == {
        "chat": {
            "sft": {"batch_size": 64, "learning_rate": 1e-5, "warmup_steps": 100},
            "preferred_ft": {"batch_size": 64, "learning_rate": 1e-5, "warmup_steps": 100},
            "dpo": {"batch_size": 64, "learning_rate": 1e-6, "warmup_steps": 150},
            "reward_model": {"batch_size": 64, "learning_rate": 1e-5, "warmup_steps": 100},
            "gold_reward_model": {"batch_size": 64, "learning_rate": 1e-5, "warmup_steps": 100},
            "ppo": {"learning_rate": 3e-6},
            "evaluation": {"validation_prompts": 128, "test_prompts": 256},
        }
    }
    assert notes[1] == f"snakemake ... --configfile preset.yaml {own}"
    assert notes[2] == "chat: EleutherAI/pythia-2.8b, 2,775,208,960 parameters; all weights are trained."


def test_one_that_does_not_gets_adapters_and_the_first_micro_batch_that_fits(
    capsys: pytest.CaptureFixture[str], config_for: Any, tmp_path: Path
) -> None:
    own = config_for("EleutherAI/pythia-2.8b", "{ ppo: null }")
    overlay, notes = made(capsys, "rtx4090", "--cores", "16", "--configfile", str(own))
    assert notes[2].endswith("; adapters are trained, since all weights do not fit.")
    section = overlay["tasks"]["chat"]
    assert section["dpo"] == {
        "batch_size": 64,
        "learning_rate": pytest.approx(1e-5),
        "warmup_steps": 150,
        "adapter": {"rank": 16, "alpha": 32},
    }
    assert section["gold_reward_model"]["adapter"] == {"rank": 16, "alpha": 32}
    # Everything fits with it, and not with the micro-batch before.
    option = [overlay["compute"]["activation_checkpointing"], overlay["compute"]["token_budget"]]
    place = PRESETS["micro_batches"]["gpu"].index(option)
    assert place > 0
    for checkpointing, budget in (option, PRESETS["micro_batches"]["gpu"][place - 1]):
        tried = {**overlay, "compute": {**overlay["compute"], "token_budget": budget}}
        tried["compute"]["activation_checkpointing"] = checkpointing
        config = resolve(merged([DEFAULTS, tried, own]))
        fits = [one.fits(hardware(config), True) for one in estimates(config, "chat")]
        assert all(fits) == (budget == option[1] and checkpointing == option[0])
    # As a file before one's own, as it is meant.
    written = tmp_path / "preset.yaml"
    written.write_text(yaml.safe_dump(overlay))
    assert cli.main(["plan", "--configfile", str(written), str(own)]) == 0
    assert "warning:" not in capsys.readouterr().out


def test_ones_own_values_come_first(capsys: pytest.CaptureFixture[str], config_for: Any) -> None:
    own = config_for("gpt2", "{ ppo: null }")
    with own.open("a") as file:
        file.write("compute: { token_budget: 777 }\n")
    overlay, notes = made(capsys, "h100", "--configfile", str(own))
    assert resolve(merged([DEFAULTS, overlay, own]))["compute"]["token_budget"] == 777
    assert overlay["tasks"]["chat"]["dpo"]["learning_rate"] == 1e-5
    assert "gpt2, 124,439,808 parameters" in notes[2]


def test_what_has_no_adapter_keeps_its_rate_and_a_list_is_written_out(
    capsys: pytest.CaptureFixture[str], config_for: Any
) -> None:
    own = config_for("EleutherAI/pythia-2.8b")
    text = own.read_text()
    own.write_text(text + text.partition("tasks:\n")[2].replace("  chat:", "  other:"))
    assert cli.main(["preset", "cpu", "--memory", "400", "--configfile", str(own)]) == 0
    text = capsys.readouterr().out
    tasks = yaml.safe_load(text)["tasks"]
    assert tasks["chat"] == tasks["other"] and "adapter" not in tasks["chat"]["dpo"] and "&id" not in text
    config = resolve(merged([DEFAULTS, own]))
    whole, adapted = (preset._values(config, "chat", 2_775_208_960, "gpu", adapter) for adapter in (False, True))
    assert adapted["ppo"] == whole["ppo"] == {"learning_rate": 3e-6}
    assert adapted["dpo"]["learning_rate"] == pytest.approx(10 * whole["dpo"]["learning_rate"])


def test_what_fits_nowhere_is_one_sentence(capsys: pytest.CaptureFixture[str], config_for: Any) -> None:
    own = config_for("EleutherAI/gpt-j-6b")
    assert cli.main(["preset", "l4", "--configfile", str(own)]) == 2
    assert re.search(
        r"nothing fits: with adapters and micro-batches of 2048 tokens the largest stage is chat ppo, which takes \d+ GiB of "
        r"22\.5 on NVIDIA L4; name more GPUs by --gpus, a larger machine or a smaller model, or leave its run out\.",
        capsys.readouterr().err,
    )
    assert cli.main(["preset", "l4", "--gpus", "0"]) == 2
    assert "--gpus is 0; allowed: a whole number at least 1." in capsys.readouterr().err


def test_a_large_model_on_a_cpu(
    capsys: pytest.CaptureFixture[str], config_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefopt.lm import precision

    own = config_for("gpt2")
    for instructions, dtype, rate in ((["avx512_bf16"], "bfloat16", 0.8), ([], "float32", 0.4), (None, "float32", 0.4)):
        monkeypatch.setattr(precision, "bfloat16_instructions", lambda found=instructions: found)
        overlay, _ = made(capsys, "cpu", "--cores", "4", "--memory", "32", "--configfile", str(own))
        compute = overlay["compute"]
        assert (compute["dtype"], compute["threads"], compute["token_budget"]) == (dtype, 4, 2048)
        assert compute["hardware"]["tflops"] == pytest.approx(rate)
    section = overlay["tasks"]["chat"]
    assert section["evaluation"] == {"validation_prompts": 32, "test_prompts": 96}
    assert section["sampling"] == {"temperatures": [0.0, 0.7]}


def test_every_trainer_has_values_at_every_size() -> None:
    trainers = {method.trainer for method in METHODS.values() if method.trainer}
    for one in PRESETS["models"]:
        assert set(one) == {"from", *trainers, "reward", "classifier"}
    assert [one["from"] for one in PRESETS["models"]] == sorted(one["from"] for one in PRESETS["models"])
