"""A run's model on image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from methods.base import is_classifier
from orchestrator.artifacts import Checkpoint, Decision
from orchestrator.data.decode import BadImage, open_rgb, square
from orchestrator.errors import UserError, nearest
from orchestrator.runs import read_head
from orchestrator.store import Store

CHUNK = 64  # images decoded and classified at a time


def final_model(store: Store, folder: Path, stage: str | None = None) -> Checkpoint:
    """The checkpoint of a stage of a run, or the final one: what the verdict names, or what the last gate promoted.

    Raises:
        UserError: there is no such stage, it is not finished, or it is no classifier.
    """
    head = read_head(folder)
    stages = {s["name"]: s for s in head["stages"]}
    if stage is None and head.get("verdict"):
        key = head["verdict"]["scores"]["final"]["key"]
    else:
        finished = [name for name, s in stages.items() if s["kind"] in ("Train", "Gate") and store.has(s["key"])]
        if stage is None and not finished:
            raise UserError(f"run {folder.name}: no model is finished yet; `orchestrator status {folder.name}`")
        name = stage if stage is not None else finished[-1]
        if name not in stages:
            raise UserError(
                f"stage {name}: not in {folder.name}{nearest(name, stages) or '; it has ' + ', '.join(stages)}"
            )
        key = stages[name]["key"]
        if not store.has(key):
            raise UserError(f"stage {name}: not finished yet; `orchestrator status {folder.name}`")
    artifact = store.open_artifact(key)
    if isinstance(artifact, Decision):
        artifact = store.open_artifact(artifact.facts["promoted"])
    if not isinstance(artifact, Checkpoint) or not artifact.classes or not is_classifier(artifact.build()):
        raise UserError(f"stage {stage}: is no classifier; name a supervised or student stage")
    return artifact


def predict_files(store: Store, folder: Path, paths: Sequence[Path], stage: str | None = None) -> list[dict[str, Any]]:
    """A row for each image: path, class, confidence, probabilities by class; or path and error.

    Raises:
        UserError: a path does not exist, or no path holds a file.
    """
    checkpoint = final_model(store, folder, stage)
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder")
    files = [
        file
        for path in paths
        for file in (sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])
    ]
    if not files:
        raise UserError(f"{paths[0]}: holds no files")
    logits: Any = checkpoint.build().logits  # a classifier's; other methods have none
    classes, pixels = checkpoint.classes, checkpoint.model["pixels"]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), CHUNK):
        good, images = [], []
        for file in files[start : start + CHUNK]:
            try:
                images.append(torch.from_numpy(square(open_rgb(file.read_bytes(), shrink_to=pixels), pixels)))
                good.append(len(rows))
                rows.append({"path": str(file)})
            except (BadImage, OSError) as error:
                rows.append({"path": str(file), "error": str(error)})
        if images:
            with torch.inference_mode():
                probability = logits(torch.stack(images).float() / 255).softmax(dim=1)
            for row, p in zip(good, probability.tolist(), strict=True):
                best = max(range(len(p)), key=p.__getitem__)
                rows[row] |= {
                    "class": classes[best],
                    "confidence": p[best],
                    "probabilities": dict(zip(classes, p, strict=True)),
                }
    return rows
