"""The catalogue: what a source holds, found by decoding everything in it once, kept on disk and read as memory maps.

A catalogue is a folder named after a signature of the source (paths, sizes, modification times), of `pixels` and of the
decode rule, so it is made once and found again. It holds:

- `catalogue.arrow`: a row for each item of the source, good or bad, in the source's order;
- `pixels.u8`: for small images, row i's (3, pixels, pixels) bytes at i * 3 * pixels^2; raw, so that a batch is one
  gather from one matrix, a scan writes in place, and rows of bad images take no disk; or
- `encoded-NNNNN.bin`: for large images of Parquet and arrays, the encoded bytes: a Parquet row cannot be read alone; or
- `groups.arrow`: for streamed Parquet, a row for each row group: nothing of the images is copied.

Large images that are files of their own stay where they are. No Python object is kept for a row.

The scan works in blocks. Each finished block leaves a journal, so a killed scan goes on where it was; two scans of one
source write equal bytes to equal places, and the first rename decides.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from orchestrator.data.decode import DECODE_VERSION, BadImage, content_id, open_rgb, square
from orchestrator.data.shards import RowGroups
from orchestrator.data.sources import Item, Listing, printable, row_name
from orchestrator.errors import UserError

Progress = Callable[[str, int, int], None]
LARGEST_STORED_DECODED = 96  # pixels: 27 KB an image, 14 GB for 500 thousand; above, JPEG is 5 to 20 times smaller
STREAM_BYTES = 2**30  # of row groups that a process holds of a streamed source, where nobody says otherwise
_OPEN_BLOCKS = 64  # of encoded images; each takes one of the files that a process may have open
_AT_ONCE = 32  # items handed to a thread together: fewer costs more in hand-over than it gains in balance
_BYTES_AT_ONCE = 2**20  # or so many encoded bytes of them
_JOURNAL = pa.schema(
    [
        ("id", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reason", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)


class Catalogue:
    """One source's finished catalogue. Opens large files when first needed; pickles as its path."""

    def __init__(self, folder: Path, stream_bytes: int = STREAM_BYTES) -> None:
        self._open(folder, stream_bytes)

    def _open(self, folder: Path, stream_bytes: int) -> None:
        self.folder, self.stream_bytes = folder, stream_bytes
        with pa.memory_map(str(folder / "catalogue.arrow")) as file:
            self.table = pa.ipc.open_file(file).read_all()
        self.about: dict = json.loads(self.table.schema.metadata[b"orchestrator"])
        self.pixels: int | None = self.about["pixels"]
        self._decoded: Tensor | None = None
        self._block = lru_cache(maxsize=_OPEN_BLOCKS)(self._open_block)

    def __getstate__(self) -> tuple[Path, int]:
        return self.folder, self.stream_bytes

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self._open(*state)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def kept(self) -> np.ndarray:
        """Rows (M,) int64 of the usable images, without duplicates, in the order of their ids; of a streamed source, in
        its own order, in which they can be read."""
        rows = np.flatnonzero(self.table["kept"].to_numpy())
        return rows if self.streamed else rows[np.argsort(self._ids()[rows], kind="stable")]

    def _ids(self) -> np.ndarray:
        """(N,) bytes of 32, zeros where an image is bad."""
        return _fixed(self.table["id"])

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Content ids of `rows`, (len(rows),) bytes of 32 hex digits."""
        return self._ids()[rows]

    def label_names(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(code into `about["classes"]` int64, labelled bool) of `rows`; the code is 0 where there is no label, and
        everywhere with several labels an image: see `targets`."""
        codes = self.table["label"].combine_chunks()
        labelled = codes.is_valid().to_numpy(zero_copy_only=False)[rows]
        if pa.types.is_list(codes.type):
            return np.zeros(len(rows), np.int64), labelled
        return np.where(labelled, codes.fill_null(0).to_numpy()[rows], 0).astype(np.int64), labelled

    def targets(self, rows: np.ndarray) -> np.ndarray | None:
        """(len(rows), K) bool, which of `about["classes"]` an image shows; None where each has one label or none."""
        codes = self.table["label"].combine_chunks()
        if not pa.types.is_list(codes.type):
            return None
        shown = np.zeros((len(self), len(self.about["classes"])), bool)
        shown[pc.list_parent_indices(codes), codes.flatten()] = True
        return shown[rows]

    def sizes(self, side: str, rows: np.ndarray) -> np.ndarray:
        """ "width" or "height" in pixels, as decoded, of usable `rows`."""
        return self.table[side].combine_chunks().fill_null(0).to_numpy()[rows]

    def bad(self) -> list[tuple[str, str]]:
        """(path, reason) of everything that did not decode."""
        rows = np.flatnonzero(self.table["reason"].is_valid().to_numpy())
        return [(self.path(row), self.table["reason"][row].as_py()) for row in rows.tolist()]

    def path(self, row: int) -> str:
        """Where row `row` came from, for people."""
        name, files = self.table["path"][row].as_py(), self.about.get("files")
        return printable(os.path.join(os.fsencode(self.about["root"]), row_name(files, row, name) if files else name))

    @property
    def streamed(self) -> bool:
        """Whether images are read from the source's own Parquet shards, a row group at a time."""
        return self.about["storage"] == "shards"

    @cached_property
    def groups(self) -> RowGroups:
        """The row groups of a streamed source, with what is held of them."""
        with pa.memory_map(str(self.folder / "groups.arrow")) as file:
            table = pa.ipc.open_file(file).read_all()
        column = {name: table[name].to_numpy() for name in table.column_names}
        about = self.about["shards"]
        return RowGroups(
            about["uri"], about["files"], about["column"], column["file"], column["group"],
            np.append(column["start"], len(self)), column["bytes"], self.stream_bytes,
        )  # fmt: skip

    @property
    def window(self) -> int:
        """How many row groups of a streamed source are shuffled together: as many of the largest as fit into half of
        `stream_bytes`. The other half is for those of the next window."""
        return max(1, self.stream_bytes // 2 // max(1, self.about["shards"]["largest"]))

    @property
    def window_rows(self) -> int:
        """How many rows a window has on average."""
        return min(len(self), round(self.window * len(self) / len(self.groups.sizes)))

    @property
    def decoded(self) -> Tensor | None:
        """Memory-mapped uint8 (N, 3 * pixels^2), or None where images stay encoded."""
        if self.about["storage"] != "decoded":
            return None
        if self._decoded is None:
            name, width = self.folder / "pixels.u8", 3 * self.about["pixels"] ** 2
            size = name.stat().st_size if name.exists() else 0
            if size != len(self) * width:
                raise UserError(f"{name}: holds {size:,} bytes, needs {len(self) * width:,}: delete {self.folder}")
            flat = torch.from_file(str(name), shared=False, size=size, dtype=torch.uint8)
            self._decoded = flat.view(len(self), width)
        return self._decoded

    def encoded(self, row: int) -> bytes:
        """The encoded image of a row, from its own file, its shard, or the catalogue's copy. Raises OSError when it is
        gone."""
        if self.about["storage"] == "files":
            path = os.path.join(os.fsencode(self.about["root"]), self.table["path"][row].as_py())
            with open(path, "rb") as file:
                return file.read()
        if self.streamed:
            return self.groups.image(row) or b""
        block = int(np.searchsorted(self.about["starts"], row, side="right")) - 1
        start, length = self.table["offset"][row].as_py(), self.table["length"][row].as_py()
        return self._block(block)[start : start + length].tobytes()

    def _open_block(self, number: int) -> np.ndarray:
        return np.memmap(self.folder / f"encoded-{number:05d}.bin", np.uint8, "r")


def copy_bytes(listing: Listing, pixels: int) -> int:
    """About how many bytes of images a catalogue would keep of a Parquet source that is not streamed."""
    if pixels <= LARGEST_STORED_DECODED:
        return len(listing) * 3 * pixels**2
    return 0 if listing.shards is None else int(listing.shards.bytes.sum())


def open_catalogue(
    listing: Listing, cache: Path, *, pixels: int | None, threads: int = 1, progress: Progress | None = None,
    stream_bytes: int | None = None,
) -> Catalogue:  # fmt: skip
    """The catalogue of a source: found in `cache`, or made there by decoding everything once.

    Args:
        pixels: side of the square images are held at; None only looks (doctor).
        threads: decoding threads.
        progress: called with (source, done, total) after every block and every few hundred items.
        stream_bytes: images of a Parquet source stay where they are, and at most so many bytes of them are held.
    Raises:
        UserError: the disk is too small, or a row group too large to be streamed.
    """
    storage = "none" if pixels is None else "files" if listing.in_files else "encoded"
    if pixels is not None and pixels <= LARGEST_STORED_DECODED:
        storage = "decoded"
    if stream_bytes is not None and listing.shards is not None and pixels is not None:
        storage = "shards"
        _check_groups(listing, stream_bytes)
    held = STREAM_BYTES if stream_bytes is None else stream_bytes
    streamed = "-shards" if storage == "shards" else ""
    final = cache / f"{listing.signature[:24]}-{pixels or 'look'}-v{DECODE_VERSION}{streamed}"
    if (final / "catalogue.arrow").exists():
        return Catalogue(final, held)
    partial = final.with_name(final.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if storage == "decoded" and pixels is not None:
            _reserve(partial / "pixels.u8", len(listing) * 3 * pixels**2)
        scan = _Scan(listing, partial, storage, pixels, threads, progress)
        for block in range(len(listing.blocks)):
            scan.block(block)
        _finish(listing, partial, storage, pixels)
        os.rename(partial, final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            text = f"{cache}: the disk is full while scanning {listing.source}; free space and run again to go on"
            raise UserError(text) from error
        if not (final / "catalogue.arrow").exists():
            raise
        shutil.rmtree(partial, ignore_errors=True)  # another process was first: its catalogue is the same
    for journal in final.glob("journal-*.arrow"):
        journal.unlink(missing_ok=True)
    return Catalogue(final, held)


def _check_groups(listing: Listing, stream_bytes: int) -> None:
    """Refuse row groups of which not even two fit: one to read from, and one that comes."""
    assert listing.shards is not None
    number = int(np.argmax(listing.shards.bytes))
    largest, most = int(listing.shards.bytes[number]), stream_bytes // 2
    if largest > most:
        file = os.path.basename(listing.shards.files[int(listing.shards.file_of[number])])
        raise UserError(
            f"{listing.source}: row group {listing.shards.group_of[number]} of {file} holds {largest / 2**20:,.1f} MiB "
            f"of images, and streaming reads whole ones, of at most half of stream_mib: write the shards with fewer "
            f"rows a row group (row_group_size=1000), or set stream_mib to {math.ceil(2 * largest / 2**20):,} or more"
        )


def _reserve(path: Path, size: int) -> None:
    """Give the file its size without touching what an earlier, interrupted scan wrote."""
    free = shutil.disk_usage(path.parent).free
    written = path.stat().st_blocks * 512 if path.exists() else 0
    if size - written > free:
        need = f"needs {size / 1e9:.1f} GB for decoded images, {free / 1e9:.1f} GB are free"
        raise UserError(f"{path.parent.parent}: {need}; free space, or choose another folder")
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        os.ftruncate(file, size)
    finally:
        os.close(file)


class _Scan:
    """Decodes blocks of a listing into a partial catalogue."""

    def __init__(
        self, listing: Listing, folder: Path, storage: str, pixels: int | None, threads: int, progress: Progress | None
    ) -> None:
        self.listing, self.folder, self.storage, self.pixels = listing, folder, storage, pixels
        self.threads, self.progress = max(threads, 1), progress

    def block(self, number: int) -> None:
        """Scan one block and leave its journal, unless an earlier scan did."""
        start, stop = self.listing.blocks[number]
        journal = self.folder / f"journal-{number:05d}.arrow"
        if not journal.exists():
            temporary = self.folder / f"encoded-{number:05d}.{os.getpid()}"
            decoded = os.open(self.folder / "pixels.u8", os.O_RDWR) if self.storage == "decoded" else None
            encoded = open(temporary, "wb") if self.storage == "encoded" else None
            try:
                records = self._decode(start, stop, decoded, encoded)
                if decoded is not None:
                    os.fsync(decoded)
            finally:
                if decoded is not None:
                    os.close(decoded)
                if encoded is not None:
                    encoded.close()
            if encoded is not None:
                os.replace(temporary, self.folder / f"encoded-{number:05d}.bin")
            columns = zip(zip(*records, strict=True), _JOURNAL.types, strict=True)
            _write(pa.table([pa.array(column, kind) for column, kind in columns], schema=_JOURNAL), journal)
        if self.progress is not None:
            self.progress(self.listing.source, stop, len(self.listing))

    def _decode(self, start: int, stop: int, decoded: int | None, encoded: io.BufferedWriter | None) -> list[tuple]:
        records: list[tuple] = []
        offset = 0
        for row, (record, data) in enumerate(self._looked_at(start, stop, decoded), start):
            length = len(data) if data is not None else 0
            if encoded is not None and data is not None:
                encoded.write(data)
            records.append((*record, offset, length))
            offset += length
            if self.progress is not None and row % 500 == 499:
                self.progress(self.listing.source, row + 1, len(self.listing))
        if len(records) != stop - start:
            got = f"{len(records):,} of {stop - start:,} rows could be read"
            raise UserError(f"{self.listing.source}: {got}; did it change during the scan? Run again")
        return records

    def _looked_at(self, start: int, stop: int, decoded: int | None) -> Iterator[tuple[tuple, bytes | None]]:
        """What `_look` says of every item, in order; a few chunks ahead in threads, never the whole block in memory."""
        items = zip(range(start, stop), self.listing.items(start, stop), strict=False)
        chunks = _chunks(items)
        if self.threads == 1:
            for chunk in chunks:
                for row, item in chunk:
                    yield self._look(row, item, decoded)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Future] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(lambda chunk: [self._look(*pair, decoded) for pair in chunk], chunk))
                if len(waiting) > 2 * self.threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def _look(self, row: int, item: Item, decoded: int | None) -> tuple[tuple, bytes | None]:
        """Decode one item: ((id, width, height, reason), the bytes to keep). Small images are written on the spot."""
        try:
            if isinstance(item, BadImage):
                raise item
            if isinstance(item, str) and self.storage == "shards":
                raise BadImage(f"the row only names a file ({os.path.basename(item)}): nothing to stream")
            if isinstance(item, np.ndarray):
                image, data = Image.fromarray(item), None
            else:
                data = Path(item).read_bytes() if isinstance(item, str) else item
                image = open_rgb(data)
        except (BadImage, OSError) as error:
            reason = str(error) if isinstance(error, BadImage) else f"cannot be read: {error.strerror}"
            return (None, None, None, reason), None
        record = (content_id(np.asarray(image)).encode(), image.width, image.height, None)
        if decoded is not None and self.pixels is not None:
            small = square(image, self.pixels).tobytes()
            if os.pwrite(decoded, small, row * len(small)) != len(small):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.storage not in ("encoded", "shards"):
            return record, None
        if data is None:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
        return record, data


def _chunks(items: Iterator[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """Items to be decoded together."""
    chunk: list[tuple[int, Item]] = []
    size = 0
    for row, item in items:
        chunk.append((row, item))
        size += len(item) if isinstance(item, bytes) else 0
        if len(chunk) == _AT_ONCE or size >= _BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _finish(listing: Listing, folder: Path, storage: str, pixels: int | None) -> None:
    """Join the journals with paths and labels, mark duplicates, and write `catalogue.arrow`."""
    journals = []
    for number in range(len(listing.blocks)):
        with pa.memory_map(str(folder / f"journal-{number:05d}.arrow")) as file:
            journals.append(pa.ipc.open_file(file).read_all())
    table = pa.concat_tables(journals).combine_chunks()
    codes = listing.codes
    kept, first_of = _first_of_each(table, codes)
    again = np.flatnonzero(first_of >= 0)
    label = _one_number(codes).to_numpy(zero_copy_only=False)
    differ = again[(label[again] != label[first_of[again]]) & codes.is_valid().to_numpy(zero_copy_only=False)[again]]

    def pairs(rows: np.ndarray) -> list[list[str]]:
        return [[listing.name(int(row)) for row in (first_of[again], again)] for again in rows]

    about: dict = {
        "source": listing.source,
        "kind": listing.kind,
        "root": listing.root,
        "classes": listing.classes,
        "label_problem": listing.label_problem,
        "notices": listing.notices,
        "pixels": pixels,
        "storage": storage,
        "starts": [start for start, _ in listing.blocks],
        "files": listing.files,
        "duplicates": len(again),
        "duplicate_examples": pairs(again[:20]),
        "conflicts": len(differ),
        "conflict_examples": [
            [*pair, listing.shown(int(first_of[row])), listing.shown(int(row))]
            for pair, row in zip(pairs(differ[:20]), differ[:20], strict=True)
        ],
    }
    if storage == "shards":
        about["shards"] = _write_groups(listing, table["length"].to_numpy(), folder)
    table = pa.table(
        {
            "path": listing.path,
            "label": codes,
            "kept": pa.array(kept),
            **{name: table[name] for name in ("id", "width", "height", "reason")},
            **({name: table[name] for name in ("offset", "length")} if storage == "encoded" else {}),
        }
    ).replace_schema_metadata({"orchestrator": json.dumps(about, ensure_ascii=True)})
    _write(table, folder / "catalogue.arrow")


def _write_groups(listing: Listing, length: np.ndarray, folder: Path) -> dict:
    """Write `groups.arrow` with the bytes of each row group as they were read, which a footer may understate, and say
    where the shards are."""
    shards = listing.shards
    assert shards is not None
    filled = np.flatnonzero(np.diff(shards.starts))  # an empty row group has no first row
    start = shards.starts[filled]
    size = np.add.reduceat(length, start)
    columns = {"file": shards.file_of[filled], "group": shards.group_of[filled], "start": start, "bytes": size}
    _write(pa.table(columns), folder / "groups.arrow")
    return {"uri": shards.uri, "files": shards.files, "column": shards.column, "largest": int(size.max())}


def _one_number(codes: pa.Array) -> pa.Array:
    """Codes as they are; of lists of codes a number for each list, equal for equal lists."""
    if not pa.types.is_list(codes.type):
        return codes
    return pc.binary_join(codes.cast(pa.list_(pa.string())), " ").dictionary_encode().indices


def _first_of_each(table: pa.Table, codes: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(kept (N,) bool, first_of (N,) int64): of equal images the first labelled one is kept, else the first; `first_of`
    names it for each of the others and is -1 elsewhere."""
    ids = _fixed(table["id"])
    good = np.flatnonzero(table["reason"].combine_chunks().is_null().to_numpy(zero_copy_only=False))
    unlabelled = codes.is_null().to_numpy(zero_copy_only=False)[good]
    order = good[np.lexsort((good, unlabelled, ids[good]))]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ids[order][1:] != ids[order][:-1]
    kept = np.zeros(len(ids), bool)
    kept[order[is_first]] = True
    first_of = np.full(len(ids), -1, np.int64)
    leader = order[is_first][np.cumsum(is_first) - 1]
    first_of[order[~is_first]] = leader[~is_first]
    return kept, first_of


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size binary(32) column as (N,) numpy bytes, without Python objects; nulls read as zeros."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    raw = np.frombuffer(array.buffers()[1], "S32", count=len(array), offset=array.offset * 32)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, b"", raw) if missing.any() else raw


def _write(table: pa.Table, path: Path) -> None:
    """Write an Arrow file whole: under its own name only once it is on disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
