"""Small images, folders and Parquet files that the data tests make for themselves."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

needs_data = pytest.mark.skipif(
    "ORCHESTRATOR_DATA" not in os.environ, reason="ORCHESTRATOR_DATA does not name the folder of test data"
)


def data_folder() -> Path:
    return Path(os.environ["ORCHESTRATOR_DATA"])


def pixels(seed: int, width: int = 12, height: int = 10) -> np.ndarray:
    """Random uint8 (height, width, 3), another picture for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, seed: int, **size: int) -> Path:
    """A PNG file, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels(seed, **size)))
    return path


def class_folders(root: Path, counts: Mapping[str, int], first_seed: int = 0) -> Path:
    """root/NAME/0.png ..., no two pictures equal."""
    seed = first_seed
    for name, count in counts.items():
        for number in range(count):
            write(root / name / f"{number}.png", seed)
            seed += 1
    return root


def flat_folder(root: Path, seeds: Sequence[int]) -> Path:
    for seed in seeds:
        write(root / f"{seed}.png", seed)
    return root


def hugging_face(
    path: Path, seeds: Sequence[int], labels: Sequence[int | None] | None, names: Sequence[str] = (), **options: object
) -> Path:
    """A Parquet file as the `datasets` library writes it."""
    rows = [{"bytes": encoded(pixels(seed)), "path": f"{seed}.png"} for seed in seeds]
    columns: dict[str, pa.Array] = {"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names:
        feature = {"label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path
