"""A run's model on image files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from methods.base import is_classifier
from orchestrator.artifacts import Checkpoint, Decision
from orchestrator.data.decode import BadImage, open_rgb, square
from orchestrator.data.sources import printable, walk
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
        name = next((name for name, s in stages.items() if s["key"] == key), "of the verdict")
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
        raise UserError(f"stage {name}: is no classifier; name a supervised or student stage with --stage")
    return artifact


def predict_files(store: Store, folder: Path, paths: Sequence[Path], stage: str | None = None) -> list[dict[str, Any]]:
    """A row for each image: path, class, confidence, probabilities by class; or path and error.

    A folder holds the images that it would hold as a source of a recipe; what else is in it is told on stderr.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    checkpoint = final_model(store, folder, stage)
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder")
    files = [file for path in paths for file in (_images_below(path) if path.is_dir() else [(path, None)])]
    logits: Any = checkpoint.build().logits  # a classifier's; other methods have none
    classes, pixels = checkpoint.classes, checkpoint.model["pixels"]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), CHUNK):
        good, images = [], []
        for file, reason in files[start : start + CHUNK]:
            try:
                if reason is not None:
                    raise BadImage(reason)
                images.append(torch.from_numpy(square(open_rgb(file.read_bytes(), shrink_to=pixels), pixels)))
                good.append(len(rows))
                rows.append({"path": printable(str(file))})
            except (BadImage, OSError) as error:
                rows.append({"path": printable(str(file)), "error": str(error)})
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


def _images_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(image file, why it cannot be read or None). Raises UserError when there is none."""
    found, name = walk(str(folder)), printable(str(folder))
    if not found.paths:
        raise UserError(f"{name}: holds no images, but {found.others}; give image files or a folder of them")
    for line in found.notices(name):
        print(line, file=sys.stderr)
    for path in found.paths:
        yield folder / path, found.dangling.get(path)
