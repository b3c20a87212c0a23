"""A run's folder in the store: its head (`run.json`) and the outcome of each stage, as any process may read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.artifacts import write_json
from orchestrator.errors import UserError
from orchestrator.store import replace_file


def read_head(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it. Raises UserError when there is no such run."""
    path = folder / "run.json"
    if not path.exists():
        raise UserError(f"run {folder.name}: not in this store; `orchestrator status` lists the runs")
    return json.loads(path.read_text(encoding="utf-8"))


def update_head(folder: Path, **values: Any) -> None:
    """Change some of what `run.json` says, in one replacement."""
    known = read_head(folder) if (folder / "run.json").exists() else {}
    replace_file(folder / "run.json", lambda part: write_json(part, {**known, **values}))


def read_outcomes(folder: Path, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The outcomes a run's folder holds, in the order of `names`."""
    paths = [folder / "stages" / f"{name}.json" for name in names]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
