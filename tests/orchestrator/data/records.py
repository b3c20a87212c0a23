"""Many small records at once: Parquet shards of PPM images, made without touching one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def records(folder: Path, count: int, *, side: int, shards: int = 1, row_group: int = 4096) -> Path:
    """`count` different random images of `side` pixels in FOLDER/train-*.parquet; the path to give as a source."""
    folder.mkdir(parents=True)
    head = np.frombuffer(f"P6 {side} {side} 255\n".encode(), np.uint8)
    for number, rows in enumerate(np.array_split(np.arange(count), shards)):
        pixels = np.random.default_rng(number).integers(0, 256, (len(rows), 3 * side**2), dtype=np.uint8)
        data = np.concatenate([np.broadcast_to(head, (len(rows), len(head))), pixels], axis=1)
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * data.shape[1]
        cells = pa.Array.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
        table = pa.table({"image": cells, "label": pa.array(rows % 10)})
        path = folder / f"train-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(table, path, row_group_size=row_group, compression="none", use_dictionary=False)
    return folder / "train"
