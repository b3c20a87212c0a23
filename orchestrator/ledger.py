"""Asking the ledger of pseudo-labels: read a run's rounds, filter, export for people to look at."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchvision.io import encode_png

from orchestrator.artifacts import Labels
from orchestrator.data.splits import open_data
from orchestrator.errors import UserError, nearest
from orchestrator.recipe import parse
from orchestrator.runs import read_head
from orchestrator.store import Store


def read(store: Store, folder: Path, round_number: int | None = None) -> tuple[pa.Table, int]:
    """The rows of a round (the last finished one by default) and its number. Raises UserError when there is none."""
    stages = [s for s in read_head(folder)["stages"] if s["kind"] == "PseudoLabel" and store.has(s["key"])]
    if not stages:
        raise UserError(f"run {folder.name}: has no pseudo-labels yet; `orchestrator status {folder.name}`")
    rounds = {s["round"] or 0: s for s in stages}
    number = max(rounds) if round_number is None else round_number
    if number not in rounds:
        raise UserError(f"round {number}: not in {folder.name}, which has {', '.join(map(str, sorted(rounds)))}")
    artifact = store.open_artifact(rounds[number]["key"])
    assert isinstance(artifact, Labels)
    return artifact.table(), number


def filter_rows(
    table: pa.Table,
    *,
    name: str | None = None,
    uncertain: int | None = None,
    kept: bool | None = None,
    changed: bool = False,
) -> pa.Table:
    """Rows of a class, kept or left out, changed, and of these the `uncertain` least confident. Raises UserError."""
    if name is not None:
        names = pc.unique(table["name"]).to_pylist()
        if name not in names:
            raise UserError(
                f"--class {name}: no image is taken for it{nearest(name, names) or '; there are ' + ', '.join(names)}"
            )
        table = table.filter(pc.equal(table["name"], name))
    if kept is not None:
        table = table.filter(pc.equal(pc.greater(table["copies"], 0), kept))
    if changed:
        table = table.filter(pc.fill_null(table["changed"], False))
    if uncertain is not None:
        table = table.take(
            pc.sort_indices(table, sort_keys=[("confidence", "ascending"), ("id", "ascending")])[:uncertain]
        )
    return table


def lines(table: pa.Table, number: int) -> Iterator[str]:
    """The rows for people: a summary by class when there are many, else one line an image."""
    count = len(table)
    kept = pc.sum(pc.greater(table["copies"], 0)).as_py() or 0
    yield f"round {number}: {count} images, {kept} kept"
    if count > 50:
        by_class, by_reason = Counter(table["name"].to_pylist()), Counter(table["reason"].to_pylist())
        for reason, amount in by_reason.most_common():
            yield f"  {amount:7,}  {reason}"
        yield "by predicted class:"
        for name, amount in sorted(by_class.items()):
            yield f"  {amount:7,}  {name}"
        yield "narrow it with --class, --uncertain N, --kept, --left-out, --changed; --export DIR writes the images"
        return
    for row in table.select(["path", "name", "confidence", "margin", "reason"]).to_pylist():
        yield f"  {row['confidence']:.3f}  {row['name']:16}  {row['reason']:16}  {row['path']}"


def export(store: Store, folder: Path, table: pa.Table, target: Path) -> int:
    """Write the images, as they were learned from, into `target`/CLASS/, with labels.csv for review.

    Raises:
        UserError: the folder exists and holds files.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; give a new folder")
    recipe = parse((folder / "recipe.yaml").read_text(encoding="utf-8"), label=f"{folder.name}/recipe.yaml")
    data = open_data(recipe.data, store.root / "data", seed=recipe.seed)
    place = {key: (images, row) for images in data.splits.values() for row, key in enumerate(images.ids.tolist())}
    target.mkdir(parents=True, exist_ok=True)
    with (target / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "id", "class", "confidence", "margin", "reason", "path", "corrected"])
        for row in table.to_pylist():
            images, number = place[row["id"]]
            name = f"{row['name']}/{row['confidence']:.3f}-{row['id'][:12]}.png"
            (target / name).parent.mkdir(exist_ok=True)
            encode = encode_png(images.batch(torch.tensor([number]))[0])
            (target / name).write_bytes(encode.numpy().tobytes())
            writer.writerow([name, row["id"], row["name"], f"{row['confidence']:.4f}", f"{row['margin']:.4f}",
                             row["reason"], row["path"], ""])  # fmt: skip
    return len(table)
