"""Resolved configs: the default with overlays by name, and values by their dotted path."""

from __future__ import annotations

from typing import Any

from snakemake.utils import update_config

from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged
from prefopt.experiment.like import DEFAULTS


def config_of(*overlays: str, **values: Any) -> dict[str, Any]:
    """Overlays are names of files in config/; of a value's path each point is written as two underscores."""
    config = merged([DEFAULTS, *(DEFAULTS.with_name(name) for name in overlays)])
    for path, value in values.items():
        for key in reversed(path.split("__")):
            value = {key: value}
        update_config(config, value)
    return resolve(config)
