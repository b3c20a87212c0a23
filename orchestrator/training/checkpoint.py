"""The state of a training in the middle: one file, replaced whole, read back without running any code from it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from orchestrator.store import replace_file

NAME = "training.pt"


def save(workdir: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint; a crash at any time leaves the old or the new one. `state`: tensors and plain values."""
    buffer = io.BytesIO()  # written by Python, so that a full disk is an OSError: torch says something else of it
    torch.save(state, buffer)
    replace_file(workdir / NAME, lambda part: part.write_bytes(buffer.getbuffer()))


def load(workdir: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None when there is none or the disk lost part of it: training then starts again."""
    path = workdir / NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        path.rename(path.with_suffix(".damaged"))
        return None
