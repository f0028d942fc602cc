"""Files of the repository that the package reads, found in the same place in a checkout and in an installed wheel.

What stands beside this module are links into the repository, where people and catalogues look for these files; a wheel holds
what the links point at. They lie to each other as in the repository, so that the Snakefile finds its rules here too.
"""

from __future__ import annotations

from pathlib import Path

# Resolved, so that messages name a checkout's own files.
_HERE = Path(__file__).parent
DEFAULTS = (_HERE / "config" / "config.yaml").resolve()
SCHEMA = (_HERE / "workflow" / "schemas" / "config.schema.yaml").resolve()
PROMPTS = (_HERE / "workflow" / "prompts").resolve()
SHIPPED_BASE = (_HERE / "workflow" / "models" / "tldr_base").resolve()
SNAKEFILE = (_HERE / "workflow" / "Snakefile").resolve()
