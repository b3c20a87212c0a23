"""Where images come from: what a path, a glob or a name stands for, recognised by what is found there.

`open_source` lists a source without decoding anything. What a listing says about labels:

- class folders: images lie in subfolders; the first folder below the source names the class, deeper ones do not;
- flat folder: no subfolder holds images, so there are no labels;
- Parquet, as Hugging Face writes it: the label column, its names from the schema metadata; null and -1 are no label;
- manifest: the label column; an empty cell and -1 are no label;
- a glob over image files: no labels;
- torchvision data sets and scikit-learn's digits: the data set's own labels.

Parquet may lie on any file system that pyarrow knows, given as a URI such as s3://bucket/train; everything else on this
machine's.
"""

from __future__ import annotations

import bisect
import csv
import glob
import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from orchestrator.data.decode import BadImage
from orchestrator.data.labels import SEPARATORS, WHOLE, Said, encode, label_parts, read_labels, unlabelled
from orchestrator.data.shards import (
    SPLIT_WORDS,
    Footer,
    Place,
    image_column,
    matching,
    read_cells,
    read_footers,
    refuse_missing,
    shards_of,
    splits_in,
    unreachable,
)
from orchestrator.errors import UserError, nearest

IMAGE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .pbm .jp2 .j2k .avif".split()
)
MANIFEST_ENDINGS = (".csv", ".tsv", ".txt")
STORE_MARKER = ".orchestrator-store"
_JUNK = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir"))
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "class_name", "label_name")
_ROWS_PER_BLOCK = 4096
_ROWS_READ_AT_ONCE = 256
_BYTES_READ_AT_ONCE = 2 * 2**20  # where 256 rows would be more
_EMPTY = "the row holds no image"

# A file's path, an encoded image, decoded pixels (H, W, 3), or why there is none.
Item = str | bytes | np.ndarray | BadImage


@dataclass(frozen=True)
class Shards:
    """The Parquet shards of a source: `files` on the file system of `uri`, and of their row groups (G,) the file each
    lies in, its number there, its first row in the source, and the bytes of its images by the footer."""

    uri: str
    files: list[str]
    column: str
    file_of: np.ndarray
    group_of: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray


@dataclass(kw_only=True)
class Listing:
    """What a source holds, before anything is decoded. Rows are in the source's own order.

    `path` (N,) binary: relative to `root` for files; for Parquet the path inside the row, or null; a description of the
    row otherwise. `shards`: of Parquet with images in it. `label` (N,): class names,
    dictionary-encoded, null where there is none; with several labels an image, lists of them, each class once and in
    order, empty where an image shows none. `classes`: the names in order. `label_problem`: why the labels cannot
    be used, raised only when a split wants labels. `blocks`: runs of rows [start, stop) that are scanned, and resumed,
    as one. `items(start, stop)` yields what to decode, in order. `in_files`: each row is a file of its own.
    """

    source: str
    kind: str
    root: str
    path: pa.Array
    label: pa.DictionaryArray | pa.ListArray
    classes: tuple[str, ...]
    blocks: list[tuple[int, int]]
    items: Callable[[int, int], Iterator[Item]]
    signature: str
    in_files: bool = False
    label_problem: str | None = None
    notices: list[str] = field(default_factory=list)
    shards: Shards | None = None

    def __len__(self) -> int:
        return len(self.path)

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return pa.types.is_list(self.label.type)

    @property
    def codes(self) -> pa.Array:
        """`label` as int32 places in `classes`, or lists of them."""
        if not self.several:
            return self.label.indices.cast(pa.int32())
        indices = self.label.values.indices.cast(pa.int32())
        return pa.ListArray.from_arrays(self.label.offsets, indices, mask=self.label.is_null())

    def name(self, row: int) -> str:
        """What a row is called, for people: a path below `root`, or a place in a Parquet file."""
        path = self.path[row].as_py()
        return printable(row_name(self.files, row, path) if self.shards is not None else path)

    @cached_property
    def files(self) -> list[tuple[str, int]]:
        """Of Parquet, the name of each file and its first row."""
        if self.shards is None:
            return []
        first = self.shards.starts[np.searchsorted(self.shards.file_of, np.arange(len(self.shards.files)))]
        return list(zip(map(os.path.basename, self.shards.files), first.tolist(), strict=True))

    def shown(self, row: int) -> str:
        """The labels of a row that has some, for people."""
        label = self.label[row].as_py()
        return label if isinstance(label, str) else ", ".join(label) or "none of the classes"


def open_source(source: str, downloads: Path, *, separator: str | None = None) -> Listing:
    """List what `source` stands for; torchvision data sets are downloaded to `downloads`.

    Args:
        separator: one of SEPARATORS, what divides the labels in a cell of a text column; or WHOLE. Ignored where labels
            are no text: the listing's `several` says what came of it.
    Raises:
        UserError: nothing usable is there, in one line saying what was looked for; or no such separator.
    """
    if separator not in (None, WHOLE, *SEPARATORS):
        raise UserError(f"separator {separator!r}: must be one of {' '.join(SEPARATORS)} or {WHOLE}")
    if source in ("digits/train", "digits/test"):
        return _digits(source)
    if source.startswith("torchvision:"):
        return _torchvision(source, downloads)
    if "://" in source:
        return _remote(source, separator)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _directory(source, path, separator)
    if os.path.isfile(path):
        return _file(source, path, separator)
    place = Place.of(path)
    if os.path.isdir(os.path.dirname(place.path)) and (shards := shards_of(place)):
        return _parquet(source, place, shards, separator)
    if glob.has_magic(path):
        return _glob(source, path, separator)
    parent, name = os.path.split(path.rstrip("/"))
    known = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    if known and os.path.isdir(parent or "."):
        known = known + sorted(splits_in(Place.of(parent or ".")))
    raise UserError(
        f"{source}: nothing is there; looked for a folder, a file, and {source}-*.parquet{nearest(name, known)}"
    )


def parts_of(source: str) -> list[str]:
    """The sources inside a folder that holds several splits (train-*.parquet beside test-*.parquet, or train/ beside
    test/), else just `source`."""
    if "://" in source:
        place = Place.of(source)
        splits = splits_in(place)
        return [place.at(f"{place.path}/{name}").uri() for name in sorted(splits)] if len(splits) > 1 else [source]
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        splits = splits_in(Place.of(path))
        if len(splits) > 1:
            return [os.path.join(source, name) for name in sorted(splits)]
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _is_junk(entry.name))
        if len(folders) > 1 and all(name.lower() in SPLIT_WORDS for name in folders):
            return [os.path.join(source, name) for name in folders]
    return [source]


def printable(path: bytes | str) -> str:
    """A path for people: bytes that are no UTF-8 are shown as replacement characters."""
    raw = path if isinstance(path, bytes) else os.fsencode(path)
    return raw.decode("utf-8", "replace")


def row_name(files: Sequence[tuple[str, int]], row: int, inside: bytes | None) -> bytes:
    """What a row of Parquet is called: "train-0.parquet row 7 (cat.png)" for `inside` b"cat.png"."""
    file, first = files[bisect.bisect_right(files, row, key=lambda file: file[1]) - 1]
    return os.fsencode(f"{file} row {row - first}") + (b" (" + inside + b")" if inside else b"")


# ---- folders and files


@dataclass
class Walk:
    """What a folder holds: image files in sorted order, relative to the root, and what was passed over and why.

    `dangling`: of those that cannot be looked at, the reason.
    """

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes: list[int] = field(default_factory=list)
    dangling: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, about: os.stat_result) -> None:
        self.paths.append(path)
        self.sizes.append(about.st_size)
        self.mtimes.append(about.st_mtime_ns)

    def add_bad(self, path: str, reason: str) -> None:
        self.paths.append(path)
        self.sizes.append(-1)
        self.mtimes.append(-1)
        self.dangling[path] = reason

    def skip(self, why: str, path: str) -> None:
        self.skipped[why] += 1
        self.example.setdefault(why, path)

    @property
    def others(self) -> str:
        """What was passed over, in words."""
        return "; ".join(f"{count:,} {why}" for why, count in sorted(self.skipped.items())) or "nothing at all"

    def notices(self, source: str) -> list[str]:
        return [
            f"{source}: skipped {count:,} {why} (such as {printable(self.example[why])})"
            for why, count in sorted(self.skipped.items())
        ]


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _looks_like_image(name: str, path: str) -> bool:
    """By ending; a file without one is judged by its first bytes."""
    ending = os.path.splitext(name)[1].lower()
    if ending:
        return ending in IMAGE_ENDINGS
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _unseen(found: Walk, path: str, is_link: bool, error: OSError) -> None:
    """Count what cannot be looked at: as a bad image, unless its ending says that it is none."""
    if os.path.splitext(path)[1].lower() not in IMAGE_ENDINGS | {""}:
        found.skip("other files that cannot be read", path)
    else:
        found.add_bad(path, f"{'link to nothing' if is_link else 'cannot be read'}: {error.strerror}")


def walk(root: str) -> Walk:
    """Every image file below `root`: links are followed, a link back into one of its own parents is not."""
    found = Walk()

    def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.skip(f"folders that cannot be read ({error.strerror})", prefix)
            return
        if prefix and any(entry.name == STORE_MARKER for entry in entries):
            found.skip("stores of this program", prefix)
            return
        for entry in entries:
            name, path = entry.name, prefix + entry.name
            if _is_junk(name):
                found.skip("hidden or system files and folders", path)
                continue
            try:
                is_folder, about = entry.is_dir(), entry.stat()
            except OSError as error:
                _unseen(found, path, entry.is_symlink(), error)
                continue
            if is_folder:
                here = (about.st_dev, about.st_ino)
                if here in above:
                    found.skip("links back to a folder above them", path)
                else:
                    visit(entry.path, path + "/", above | {here})
            elif not entry.is_file() or not _looks_like_image(name, entry.path):
                found.skip(f"{os.path.splitext(name)[1].lower() or 'other'} files", path)
            else:
                found.add(path, about)

    top = os.stat(root)
    visit(root, "", frozenset([(top.st_dev, top.st_ino)]))
    return found


def _directory(source: str, path: str, separator: str | None) -> Listing:
    if shards := _only_split(source, Place.of(path)):
        return _parquet(source, Place.of(path), shards, separator)
    found = walk(path)
    if not found.paths:
        raise UserError(
            f"{source}: no images; looked for files such as .jpg and .png in it and its subfolders, and for .parquet "
            f"files in it; found {found.others}"
        )
    top = [path.partition("/")[0] if "/" in path else None for path in found.paths]
    label, classes = encode([None if name is None else printable(name) for name in top])
    beside = top.count(None)
    problem, kind = None, "class folders" if classes else "flat folder"
    notices = found.notices(source)
    if classes and beside:
        notices.append(f"{source}: {beside:,} images beside the {len(classes)} class folders have no label")
    if len(classes) > 1 and all(name.lower() in SPLIT_WORDS for name in classes):
        words = ", ".join(classes)
        problem = f"{source}: its folders are splits, not classes ({words}); name one, such as {source}/{classes[0]}"
    elif len(classes) == 1 and all(file.count("/") > 1 for file in found.paths):
        problem = (
            f"{source}: one folder, {classes[0]!r}, so one class; if its subfolders are the classes, "
            f"give {source}/{classes[0]}"
        )
    return _of_files(source, kind, path, found, label, classes, notices, problem)


def _glob(source: str, pattern: str, separator: str | None = None) -> Listing:
    found, shards = Walk(), []
    matched = 0
    for path in map(os.path.abspath, sorted(glob.glob(pattern, recursive=True))):
        if _is_junk(os.path.basename(path)):
            continue
        about: os.stat_result | OSError
        try:
            about = os.stat(path)
        except OSError as error:  # a link to nothing: said of a pattern as of a folder
            about = error
        if not isinstance(about, OSError) and not stat.S_ISREG(about.st_mode):
            continue
        matched += 1
        if path.endswith(".parquet"):
            shards.append(path)
        if isinstance(about, OSError):
            _unseen(found, path, os.path.islink(path), about)
        elif _looks_like_image(os.path.basename(path), path):
            found.add(path, about)
    if shards and len(shards) == matched:
        return _parquet(source, Place.of(shards[0]), shards, separator)
    if not found.paths:
        raise UserError(f"{source}: the pattern matches {matched:,} files, none of them an image or .parquet file")
    other = matched - len(found.paths)
    notices = [f"{source}: skipped {other:,} other files"] if other else []
    label, classes = encode([None] * len(found.paths))
    return _of_files(source, "list of files", "/", found, label, classes, notices, None)


def _of_files(
    source: str,
    kind: str,
    root: str,
    found: Walk,
    label: pa.DictionaryArray | pa.ListArray,
    classes: tuple[str, ...],
    notices: list[str],
    problem: str | None,
) -> Listing:
    root = os.path.abspath(root)

    def items(start: int, stop: int) -> Iterator[Item]:
        for path in found.paths[start:stop]:
            yield BadImage(found.dangling[path]) if path in found.dangling else os.path.join(root, path)

    encoded = [os.fsencode(path) for path in found.paths]
    signature = _signature(
        "files",
        root,
        b"\0".join(encoded),
        np.array(found.sizes, np.int64).tobytes(),
        np.array(found.mtimes, np.int64).tobytes(),
        *label_parts(label),
    )
    count = len(encoded)
    return Listing(
        source=source,
        kind=kind,
        root=root,
        path=pa.array(encoded, pa.large_binary()),
        label=label,
        classes=classes,
        blocks=[(start, min(start + _ROWS_PER_BLOCK, count)) for start in range(0, count, _ROWS_PER_BLOCK)],
        items=items,
        signature=signature,
        in_files=True,
        label_problem=problem,
        notices=notices,
    )


# ---- manifests


def _file(source: str, path: str, separator: str | None) -> Listing:
    name = os.path.basename(path).lower()
    if name.endswith(".parquet"):
        place = Place.of(path)
        return _parquet(source, place, [place.path], separator)
    if name.endswith(MANIFEST_ENDINGS):
        column, paths, labels = _read_manifest(source, path)
        return _manifest(source, path, column, paths, labels, separator)
    if _looks_like_image(name, path):
        return _glob(source, glob.escape(path))
    raise UserError(f"{source}: neither an image, nor .parquet, nor a list of paths ({', '.join(MANIFEST_ENDINGS)})")


def _read_manifest(source: str, path: str) -> tuple[str, list[str | None], pa.Array | None]:
    """Of a CSV, TSV or plain list: what its column of paths is called, the paths, and its labels where it has any."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise UserError(f"{source}: the file is empty; it needs one image path a line, or the columns path,label")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{source}: is UTF-16 text; save it as UTF-8")
    data = re.sub(rb"\A\s*[\r\n]", b"", data) + b"\n"  # no more than empty lines: a tab may end an empty first cell
    first = data.splitlines()[0].decode("utf-8", "replace").strip(" ")
    folder = os.path.dirname(path)
    whole = os.path.exists(os.path.join(folder, first)) or os.path.splitext(first)[1].lower() in IMAGE_ENDINGS
    if path.lower().endswith(".txt") and whole:
        lines = data.decode("utf-8", "surrogateescape").splitlines()  # paths with commas or spaces survive
        return "path", [line.strip() for line in lines if line.strip()], None
    delimiter = "\t" if path.lower().endswith(".tsv") or ("\t" in first and "," not in first) else ","
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    lower = [cell.lower() for cell in cells]
    header = any(cell in _PATH_COLUMNS for cell in lower)
    is_path = os.path.exists(os.path.join(folder, cells[0])) or os.path.splitext(lower[0])[1] in IMAGE_ENDINGS
    if not header and not is_path:
        raise UserError(f"{source}: columns {', '.join(cells)}: none is named path, and {cells[0]!r} is no image file")
    names = lower if header else ["path", "label", *(f"column {i}" for i in range(2, len(cells)))][: len(cells)]
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(data),
            read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1 if header else 0),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=["", "-1"]
            ),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{source}: not a table of {len(names)} columns: {error}") from error
    column, label = _columns(source, names)
    return column, table[column].to_pylist(), _flat(table[label]) if label else None


def _columns(source: str, names: Sequence[str]) -> tuple[str, str | None]:
    """The columns of paths and of labels of a table that has the former."""
    column = next(name for name in _PATH_COLUMNS if name in names)
    label = next((name for name in _LABEL_COLUMNS if name in names and name != column), None)
    for name in (column, label):
        if name is not None and names.count(name) > 1:
            raise UserError(f"{source}: has {names.count(name)} columns named {name}; rename or remove all but one")
    return column, label


def _manifest(
    source: str,
    path: str,
    column: str,
    paths: Sequence[str | None],
    labels: pa.Array | None,
    separator: str | None,
) -> Listing:
    if not paths:
        raise UserError(f"{source}: has a column {column} and no rows; it needs one image path a row")
    empty = sum(not relative for relative in paths)
    if empty:
        raise UserError(f"{source}: {empty:,} rows have an empty {column}; every row needs one")
    root, found = os.path.dirname(os.path.abspath(path)), Walk()
    for row, relative in enumerate(paths):
        assert relative is not None
        if "\0" in relative:
            raise UserError(f"{source}: the {column} of row {row} holds a zero byte, which no file's name can; "
                            "save it as UTF-8 text and check that row")  # fmt: skip
        try:
            found.add(relative, os.stat(os.path.join(root, relative)))
        except OSError as error:
            found.add_bad(relative, f"listed in {os.path.basename(path)}: {error.strerror}")
    said = unlabelled(len(paths)) if labels is None else read_labels(source, labels, None, separator)
    return _of_files(source, "manifest", root, found, said.label, said.classes, list(said.notices), said.problem)


# ---- Parquet


def _remote(source: str, separator: str | None) -> Listing:
    """A URI: a shard, a folder of shards, PATH/train for PATH/train-*.parquet, or a pattern in its last part."""
    place = Place.of(source)
    if glob.has_magic(place.path):
        if files := matching(place):
            return _parquet(source, place, files, separator)
        raise UserError(f"{source}: the pattern matches no .parquet file")
    kind = place.kind()
    if kind == pyarrow.fs.FileType.File:
        files = [place.path] if place.path.endswith(".parquet") else []
    else:
        files = _only_split(source, place) if kind == pyarrow.fs.FileType.Directory else []
        files = files or shards_of(place)
    if not files:
        raise UserError(
            f"{place.shown()}: no .parquet file is there; check the name; images are read from afar out of Parquet "
            "shards, so pack them, or copy or mount the folder and give its local path"
        )
    return _parquet(source, place, files, separator)


def _only_split(source: str, folder: Place) -> list[str]:
    """The Parquet files of a folder with one split; none where it has no such file."""
    splits = splits_in(folder)
    if len(splits) > 1:
        names = ", ".join(sorted(splits))
        raise UserError(f"{source}: holds the Parquet splits {names}; name one, such as {source}/{sorted(splits)[0]}")
    return next(iter(splits.values()), [])


def _parquet(source: str, place: Place, files: Sequence[str], separator: str | None) -> Listing:
    refuse_missing(source, files)
    schema = _schema(place.at(files[0]))
    image = image_column(schema)
    if image is None:
        return _parquet_manifest(source, place, files, schema, separator)
    label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    footers = list(read_footers(place, files, image, label_column))
    shards = _shards(place, files, image, footers)
    count = int(shards.starts[-1])
    if not count:
        raise UserError(f"{source}: {len(files)} Parquet files and no rows in them")
    if label_column is None:
        said = unlabelled(count)
    else:
        tables = [pa.table({"label": footer.labels}) for footer in footers]
        stacked = pa.concat_tables(tables, promote_options="permissive")["label"]
        said = read_labels(source, _flat(stacked), _hugging_face_names(schema, label_column), separator)
    blocks = _blocks(shards)

    def items(start: int, stop: int) -> Iterator[Item]:
        file, groups = blocks[start, stop]
        root = None if place.remote else os.path.dirname(files[0])
        first, last = np.searchsorted(shards.starts, [start, stop])
        each = max(1, int(shards.bytes[first:last].sum()) // (stop - start))
        rows = max(1, min(_ROWS_READ_AT_ONCE, _BYTES_READ_AT_ONCE // each))
        for batch in read_cells(place, files[file], groups, image, rows):
            for cell in batch.to_pylist():
                data, inside = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                if data is not None:
                    yield data
                elif inside and root is not None and "\0" not in inside:
                    yield os.path.join(root, inside)
                else:
                    yield BadImage(f"the row holds no image, only the name {inside}" if inside else _EMPTY)

    stats = place.stats(files)
    parts = [*(place.at(file).shown() for file in files), *(f"{size} {changed}" for size, changed in stats)]
    if separator is not None or pa.types.is_list(said.label.type):  # the same file, read otherwise
        parts.append(f"labels {separator}")
    return Listing(
        source=source,
        kind=f"Parquet, {len(files)} file{'s' if len(files) > 1 else ''}",
        root=os.path.dirname(place.at(files[0]).shown()),
        path=_inner_paths(footers),
        label=said.label,
        classes=said.classes,
        blocks=list(blocks),
        items=items,
        signature=_signature("parquet", *parts),
        label_problem=said.problem,
        notices=list(said.notices),
        shards=shards,
    )


def _schema(shard: Place) -> pa.Schema:
    try:
        return pq.read_schema(shard.path, filesystem=shard.fs)
    except (pa.ArrowException, OSError) as error:
        if shard.remote and isinstance(error, OSError):
            raise unreachable(shard.shown(), shard.scheme, error) from error
        raise UserError(f"{shard.shown()}: cannot be read as Parquet: {error}") from error


def _shards(place: Place, files: Sequence[str], image: str, footers: Sequence[Footer]) -> Shards:
    rows = np.concatenate([[0], *(footer.rows for footer in footers)]).astype(np.int64)
    return Shards(
        uri=place.uri(),
        files=list(files),
        column=image,
        file_of=np.repeat(np.arange(len(files)), [len(footer.rows) for footer in footers]),
        group_of=np.concatenate([np.arange(len(footer.rows)) for footer in footers]),
        starts=np.cumsum(rows),
        bytes=np.concatenate([footer.bytes for footer in footers]).astype(np.int64),
    )


def _blocks(shards: Shards) -> dict[tuple[int, int], tuple[int, list[int]]]:
    """Runs of rows to be scanned as one: whole row groups of one file. Of each, which file and which row groups."""
    blocks: dict[tuple[int, int], tuple[int, list[int]]] = {}
    groups: list[int] = []
    start, last = 0, len(shards.file_of) - 1
    for number, (file, group) in enumerate(zip(shards.file_of.tolist(), shards.group_of.tolist(), strict=True)):
        stop = int(shards.starts[number + 1])
        groups.append(group)
        ends = number == last or shards.file_of[number + 1] != file
        if stop > start and (ends or stop - start >= _ROWS_PER_BLOCK):
            blocks[start, stop] = (file, groups)
            start = stop
        if ends or start == stop:
            groups = []
    return blocks


def _inner_paths(footers: Sequence[Footer]) -> pa.Array:
    """The path beside each image's bytes, null where the row has none."""
    parts = [
        pa.nulls(sum(footer.rows), pa.large_binary())
        if footer.names is None
        else _flat(pc.if_else(pc.equal(footer.names, ""), None, footer.names)).cast(pa.large_binary())
        for footer in footers
    ]
    return pa.concat_arrays(parts)


def _parquet_manifest(
    source: str, place: Place, files: Sequence[str], schema: pa.Schema, separator: str | None
) -> Listing:
    names = schema.names
    if not set(names).intersection(_PATH_COLUMNS) or len(files) > 1 or place.remote:
        raise UserError(
            f"{source}: columns {', '.join(names)}: needs an image column (struct of bytes and path, or binary), or, "
            "in a single local file, a column named path"
        )
    column, label = _columns(source, names)
    table = pq.read_table(files[0], columns=[column] + ([label] if label else []))
    labels = _flat(table[label]) if label else None
    try:
        paths = table[column].cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        kind = table[column].type
        raise UserError(f"{source}: column {column} is of type {kind}; paths as text are needed") from error
    return _manifest(source, files[0], column, paths, labels, separator)


def _hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(column)
    if isinstance(feature, list):  # lists of labels, as older versions write them
        feature = feature[0] if feature else None
    elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # and newer ones
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; an empty or single-chunk one included."""
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


# ---- data sets by name


def _digits(source: str) -> Listing:
    """scikit-learn's 8x8 digits: 1,437 for training and 360 for testing, stratified, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, target = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(target)), test_size=360, stratify=target, random_state=0)
    rows = np.sort(train if source == "digits/train" else test)
    grey = np.rint(values[rows] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)  # 0 to 16 in the original
    images = np.repeat(grey, 3, axis=3)
    said = read_labels(source, pa.array(target[rows]), None)
    paths = [f"digits image {row}".encode() for row in rows]
    return _of_arrays(source, "scikit-learn digits", paths, said, lambda a, b: iter(images[a:b]))


def _torchvision(source: str, downloads: Path) -> Listing:
    import torchvision

    name, _, split = source.removeprefix("torchvision:").partition("/")
    split = split or "train"
    factory = getattr(torchvision.datasets, name, None)
    if factory is None:
        raise UserError(f"{source}: torchvision has no data set {name}{nearest(name, torchvision.datasets.__all__)}")
    root = str(downloads / "torchvision")
    for arguments in ({"train": split == "train"}, {"split": split}):
        if "train" in arguments and split not in ("train", "test"):
            continue
        try:
            data = factory(root, download=True, **arguments)
            break
        except TypeError:  # this data set names its splits the other way, or has no download
            continue
        except Exception as error:  # URLError, RuntimeError, OSError ...: each downloader has its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{source}: could not be fetched ({reason}); check the network, or put its files under {root} yourself"
            ) from error
    else:
        raise UserError(f"{source}: {name} has no split {split!r} that can be downloaded; give the files as a folder")
    targets = next((getattr(data, a) for a in ("targets", "labels", "_labels") if hasattr(data, a)), None)
    if targets is None:
        targets = [data[i][1] for i in range(len(data))]
    names = getattr(data, "classes", None)
    names = tuple(n if isinstance(n, str) else n[0] for n in names) if names is not None else None
    try:
        values = pa.array(np.asarray(targets).tolist())
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{source}: is not a classification data set: {error}") from error
    said = read_labels(source, values, names)

    def items(start: int, stop: int) -> Iterator[Item]:
        for row in range(start, stop):
            yield np.asarray(data[row][0].convert("RGB"))

    paths = [f"{source}[{row}]".encode() for row in range(len(data))]
    return _of_arrays(source, "torchvision", paths, said, items)


def _of_arrays(
    source: str,
    kind: str,
    paths: list[bytes],
    said: Said,
    items: Callable[[int, int], Iterator[Item]],
) -> Listing:
    starts = range(0, len(paths), _ROWS_PER_BLOCK)
    return Listing(
        source=source,
        kind=kind,
        root="",
        path=pa.array(paths, pa.large_binary()),
        label=said.label,
        classes=said.classes,
        blocks=[(start, min(start + _ROWS_PER_BLOCK, len(paths))) for start in starts],
        items=items,
        signature=_signature(kind, source, str(len(paths)), *(["labels"] if pa.types.is_list(said.label.type) else [])),
        label_problem=said.problem,
        notices=list(said.notices),
    )


def _signature(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else os.fsencode(part)
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
