"""Parquet shards on this machine's disks or on any file system of pyarrow's (s3://, gs://, abfs://, hdfs://).

The only place that opens Parquet. A source is known by its footers: which files, which row groups, how many rows and
bytes in each. `RowGroups` then reads single rows out of whole row groups, and never holds more than a stated number of
bytes. Credentials come from where the cloud's own tools look for them, never from a recipe.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from orchestrator.errors import UserError

SPLIT_WORDS = frozenset(
    "train training test testing val valid validation unlabelled unlabeled labelled labeled".split()
)
_GIVE_UP_SECONDS = 30  # Google's client would try for a quarter of an hour to reach what is not there
_FOOTERS_AT_ONCE = 16  # an object store answers in tens of milliseconds, whatever it is asked
_AHEAD = 4  # row groups read at a time, ahead of their use: about what it takes to hide the way to an object store
_WHOLE = 64 * 2**20  # bytes of a row group up to which it is read whole from afar
_PIECE = 1 << 20  # bytes of a column read at a time in a scan, instead of the whole column of a row group


@dataclass(frozen=True)
class Place:
    """A path on a file system; `scheme` and `query` are what a URI has around it, empty on this machine's disks."""

    fs: pyarrow.fs.FileSystem
    path: str
    scheme: str = ""
    query: str = ""

    @staticmethod
    def of(source: str) -> Place:
        """Where a path or URI points. Raises UserError when there is no such file system, or no way in."""
        if "://" not in source:
            return Place(pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(source)))
        parts = urlsplit(source)
        if parts.username or parts.password:
            raise UserError(
                f"{parts.scheme}://...@{parts.hostname}{parts.path}: credentials do not belong into a recipe, which is "
                "kept with every run; leave them to the environment"
            )
        location, _, query = source.partition("?")
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
            query = f"{query}&retry_limit_seconds={_GIVE_UP_SECONDS}".lstrip("&")
        query = f"?{query}" if query else ""
        try:
            fs, path = pyarrow.fs.FileSystem.from_uri(location + query)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{source}: {_line(error)}; s3://, gs://, abfs:// and local paths can be read") from error
        except OSError as error:
            raise unreachable(f"{location}", parts.scheme, error) from error
        return Place(fs, path.rstrip("/"), parts.scheme, query)

    @property
    def remote(self) -> bool:
        """Whether it was given as a URI."""
        return bool(self.scheme)

    def at(self, path: str) -> Place:
        """Another path of the same file system."""
        return Place(self.fs, path, self.scheme, self.query)

    def shown(self) -> str:
        """The path for people, a URI without its query where it is remote."""
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    def uri(self) -> str:
        """What `Place.of` makes this place of again."""
        return self.shown() + self.query

    def kind(self) -> pyarrow.fs.FileType:
        """Folder, file or nothing."""
        return self._ask(lambda: self.fs.get_file_info(self.path).type)

    def entries(self) -> list[str]:
        """Paths of the files in this folder, sorted; none where there is no such folder."""
        if not self.remote:  # pyarrow refuses names that are no UTF-8
            if not os.path.isdir(self.path):
                return []
            return sorted(entry.path for entry in os.scandir(self.path) if not entry.is_dir())
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        found = self._ask(lambda: self.fs.get_file_info(selector))
        return sorted(info.path for info in found if info.type != pyarrow.fs.FileType.Directory)

    def stats(self, paths: Sequence[str]) -> list[tuple[int, int]]:
        """(bytes, time of change in ns) of files."""
        infos = self._ask(lambda: self.fs.get_file_info(list(paths)))
        return [(info.size or 0, info.mtime_ns or 0) for info in infos]

    def _ask(self, question: Callable):
        try:
            return question()
        except (pa.ArrowException, OSError) as error:
            raise unreachable(self.shown(), self.scheme, error) from error


def unreachable(where: str, scheme: str, error: Exception) -> UserError:
    """One line for what the client of an object store says in many."""
    text = _line(error)
    if not scheme:
        return UserError(f"{where}: cannot be read: {text}")
    known = {
        "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or an AWS profile, and the region",
        "gs": "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
        "gcs": "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
    }
    way = known.get(scheme, "the credentials that this file system needs")
    return UserError(f"{where}: cannot be read: {text}; check the name, the network, and {way}")


def _line(error: Exception) -> str:
    """The gist of an error of pyarrow's: one line, not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


# ---- which files belong together


def prefix_of(name: str) -> str:
    """ "train" for train-00000-of-00004.parquet, train-0.parquet and train.parquet."""
    return re.sub(r"-\d+(-of-\d+)?$", "", name.removesuffix(".parquet"))


def _parquet_files(folder: Place) -> list[str]:
    return [
        path for path in folder.entries() if path.endswith(".parquet") and not os.path.basename(path).startswith(".")
    ]


def splits_in(folder: Place) -> dict[str, list[str]]:
    """The Parquet files of a folder, or of its subfolder `data` as on the Hugging Face hub, by split name."""
    for place in (folder, folder.at(f"{folder.path}/data")):
        splits: dict[str, list[str]] = {}
        for path in _parquet_files(place):
            splits.setdefault(prefix_of(os.path.basename(path)), []).append(path)
        if splits:
            # Shards numbered without a common name (part-0, 0000 ...) are one set: no name says that they are splits.
            named = all(name.lower() in SPLIT_WORDS for name in splits)
            return splits if named else {"all": sorted(path for paths in splits.values() for path in paths)}
    return {}


def shards_of(place: Place) -> list[str]:
    """For PATH/train: the files PATH/train-*.parquet, PATH/train.parquet, or the same in PATH/data."""
    folder, name = os.path.split(place.path)
    for where in (folder, f"{folder}/data"):
        found = [p for p in _parquet_files(place.at(where)) if prefix_of(os.path.basename(p)) == name]
        if found:
            return found
    return []


def matching(pattern: Place) -> list[str]:
    """The Parquet files that a pattern in the last part of a path matches."""
    folder, name = os.path.split(pattern.path)
    return [p for p in _parquet_files(pattern.at(folder)) if fnmatch.fnmatchcase(os.path.basename(p), name)]


def refuse_missing(source: str, files: Sequence[str]) -> None:
    """train-00002-of-00004 promises four files; with three, a quarter of the data would be lost without a word."""
    promised: dict[tuple[str, int], int] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)\.parquet", file):
            key = (match[1], int(match[2]))
            promised[key] = promised.get(key, 0) + 1
    for (prefix, total), found in promised.items():
        if found != total:
            name = os.path.basename(prefix)
            raise UserError(f"{source}: {found} of {total} files {name}-*.parquet are there; fetch the rest")


# ---- what a file holds


@dataclass(frozen=True)
class Footer:
    """What is known of a shard without reading its images.

    `rows` and `bytes` are of each row group: how many rows, and how large the image column is once decompressed.
    `labels` and `names` (the path beside an image's bytes) are whole columns, None where there are none.
    """

    schema: pa.Schema
    rows: list[int]
    bytes: list[int]
    labels: pa.ChunkedArray | None
    names: pa.ChunkedArray | None


def read_footers(place: Place, files: Sequence[str], image: str, label: str | None) -> Iterator[Footer]:
    """The footers of shards in their order, with their label column and inner names."""

    def one(file: str) -> Footer:
        try:
            with pq.ParquetFile(file, filesystem=place.fs) as shard:
                return _footer(shard, image, label)
        except (pa.ArrowException, KeyError, OSError) as error:
            at = place.at(file)
            if place.remote and isinstance(error, OSError):
                raise unreachable(at.shown(), at.scheme, error) from error
            raise UserError(f"{at.shown()}: cannot be read as Parquet like its neighbours: {_line(error)}") from error

    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        yield from pool.map(one, files)


def _footer(shard: pq.ParquetFile, image: str, label: str | None) -> Footer:
    about, kind = shard.metadata, shard.schema_arrow.field(image).type
    place = [about.schema.column(n).path for n in range(about.num_columns)]
    column = place.index(f"{image}.bytes" if pa.types.is_struct(kind) else image)
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    named = pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    names = shard.read(columns=[f"{image}.path"])[image] if named else None
    return Footer(
        shard.schema_arrow,
        [group.num_rows for group in groups],
        [group.column(column).total_uncompressed_size for group in groups],
        shard.read(columns=[label])[label] if label is not None else None,
        pc.struct_field(names, "path") if names is not None else None,
    )


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded images: struct<bytes, ...> or binary."""

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and holds_images(kind.field(place).type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [column.name for column in schema if holds_images(column.type)]
    return next((name for name in ("image", "img") if name in found), found[0] if found else None)


def read_cells(place: Place, file: str, groups: Sequence[int], image: str, rows: int) -> Iterator[pa.Array]:
    """The image column of some row groups, at most `rows` cells at a time.

    On a disk a column is read in small pieces, never as one. From afar a piece costs a round trip, so row groups that
    are not too large are read whole, a few at a time.
    """
    with pq.ParquetFile(file, filesystem=place.fs, pre_buffer=False, buffer_size=_PIECE) as shard:
        about = shard.metadata
        if not place.remote or max(about.row_group(number).total_byte_size for number in groups) > _WHOLE:
            for batch in shard.iter_batches(rows, row_groups=list(groups), columns=[image], use_threads=False):
                yield batch.column(0)
            return

    def whole(number: int) -> pa.ChunkedArray:
        with pq.ParquetFile(file, filesystem=place.fs, metadata=about, pre_buffer=True) as shard:
            return shard.read_row_group(number, columns=[image], use_threads=False)[image]

    todo = iter(groups)
    with ThreadPoolExecutor(_AHEAD) as pool:
        coming = deque(pool.submit(whole, number) for number in itertools.islice(todo, _AHEAD))
        while coming:
            column = coming.popleft().result()
            coming.extend(pool.submit(whole, number) for number in itertools.islice(todo, 1))
            for chunk in column.chunks:
                yield from (chunk.slice(start, rows) for start in range(0, len(chunk), rows))


# ---- single rows out of row groups


class RowGroups:
    """The encoded images of shards by row number, read a row group at a time and kept while there is room.

    Args:
        uri: any place on the file system of the shards.
        files: paths of the shards there.
        column: the image column.
        file_of, group_of: (G,) the file that each row group lies in, and its number there.
        starts: (G + 1,) the first row of each row group, and the number of all rows.
        bytes: (G,) the size of each row group's images.
        limit: most bytes of row groups that are held or being read at any moment; those of the largest at least. One
            that is being read from afar takes the bytes that came over the network besides.
    """

    def __init__(
        self, uri: str, files: Sequence[str], column: str, file_of: np.ndarray, group_of: np.ndarray,
        starts: np.ndarray, bytes: np.ndarray, limit: int,
    ) -> None:  # fmt: skip
        self._uri, self._files, self._column = uri, files, column
        self._file_of, self._group_of, self._starts, self._bytes = file_of, group_of, starts, bytes
        self._limit = max(limit, int(bytes.max(initial=0)))
        self._room = threading.Condition()
        self._held: OrderedDict[int, pa.Array] = OrderedDict()
        self._reading: dict[int, Future[pa.Array]] = {}
        self._used = 0
        self._metadata = lru_cache(maxsize=64)(self._read_metadata)

    @cached_property
    def _place(self) -> Place:
        return Place.of(self._uri)

    @property
    def sizes(self) -> np.ndarray:
        """(G,) rows of each row group."""
        return np.diff(self._starts)

    def number(self, rows: np.ndarray) -> np.ndarray:
        """Which row group each of `rows` lies in."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def image(self, row: int) -> bytes | None:
        """The encoded image of a row, None where the cell is empty; safe to call from several threads.

        Raises:
            OSError: the shard is gone, cannot be reached, or has changed.
        """
        number = int(self.number(np.asarray(row)))
        return self.group(number)[row - int(self._starts[number])].as_py()

    def read_ahead(self, now: np.ndarray, coming: np.ndarray) -> list[Future]:
        """Begin to read the row groups `coming` in the background; those of `now`, where held, go last for their room.

        A row group that cannot be read raises when it is asked for, not here. The futures end with the reading.
        """
        with self._room:
            for number in now.tolist():
                if number in self._held:
                    self._held.move_to_end(number)
        return [self._behind.submit(self.group, number) for number in coming.tolist()]

    @cached_property
    def _behind(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_AHEAD, thread_name_prefix="shards")

    def group(self, number: int) -> pa.Array:
        """All images of a row group, binary (R,); waits for room where other threads are reading."""
        size = int(self._bytes[number])
        with self._room:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number]
            coming = self._reading.get(number)
            if coming is None:
                mine = self._reading[number] = Future()
                while self._used + size > self._limit:
                    if self._held:
                        gone, _ = self._held.popitem(last=False)
                        self._used -= int(self._bytes[gone])
                    else:
                        self._room.wait()
                self._used += size
        if coming is not None:
            return coming.result()
        try:
            found = self._read(number)
        except BaseException as error:
            with self._room:
                del self._reading[number]
                self._used -= size
                self._room.notify_all()
            mine.set_exception(error)
            raise
        with self._room:
            del self._reading[number]
            self._held[number] = found
            self._room.notify_all()
        mine.set_result(found)
        return found

    def _read_metadata(self, file: int) -> pq.FileMetaData:
        return pq.read_metadata(self._files[file], filesystem=self._place.fs)

    def _read(self, number: int) -> pa.Array:
        file, rows = int(self._file_of[number]), int(self._starts[number + 1] - self._starts[number])
        try:
            with pq.ParquetFile(
                self._files[file], filesystem=self._place.fs, metadata=self._metadata(file),
                pre_buffer=self._place.remote, buffer_size=0 if self._place.remote else _PIECE,
            ) as shard:  # fmt: skip
                kind = shard.schema_arrow.field(self._column).type
                column = f"{self._column}.bytes" if pa.types.is_struct(kind) else self._column
                table = shard.read_row_group(int(self._group_of[number]), columns=[column], use_threads=False)
        except (pa.ArrowException, KeyError) as error:
            raise OSError(f"{os.path.basename(self._files[file])}: {_line(error)}") from error
        cells = table[self._column]
        if pa.types.is_struct(cells.type):
            cells = pc.struct_field(cells, "bytes")
        if len(cells) != rows:
            name = os.path.basename(self._files[file])
            raise OSError(f"{name}: row group {self._group_of[number]} has changed since the scan")
        return cells.chunk(0) if cells.num_chunks == 1 else pa.concat_arrays(cells.chunks)
