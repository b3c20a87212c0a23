"""Where images come from: what a path, a glob or a name stands for, recognised by what is found there.

`open_source` lists a source without decoding anything. What a listing says about labels:

- class folders: images lie in subfolders; the first folder below the source names the class, deeper ones do not;
- flat folder: no subfolder holds images, so there are no labels;
- Parquet, as Hugging Face writes it: the label column, its names from the schema metadata; null and -1 are no label;
- manifest: the label column; an empty cell and -1 are no label;
- a glob over image files: no labels;
- torchvision data sets and scikit-learn's digits: the data set's own labels.

An image may have several labels where the label column holds lists (Parquet), or text and the recipe names what divides
its cells (`separator`). No other cell is ever divided: "cat;dog" may be the name of one class, and no look at the cells
can tell.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from orchestrator.data.decode import BadImage
from orchestrator.errors import UserError, nearest

IMAGE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .pbm .jp2 .j2k .avif".split()
)
MANIFEST_ENDINGS = (".csv", ".tsv", ".txt")
STORE_MARKER = ".orchestrator-store"
SPLIT_WORDS = frozenset(
    "train training test testing val valid validation unlabelled unlabeled labelled labeled".split()
)
_JUNK = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir"))
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "class_name", "label_name")
SEPARATORS = (",", ";", "|")
WHOLE = "none"  # instead of a separator: every cell is one class, whatever it holds
_ROWS_PER_BLOCK = 4096
_ROWS_READ_AT_ONCE = 256

# A file's path, an encoded image, decoded pixels (H, W, 3), or why there is none.
Item = str | bytes | np.ndarray | BadImage


@dataclass(kw_only=True)
class Listing:
    """What a source holds, before anything is decoded. Rows are in the source's own order.

    `path` (N,) binary: relative to `root` for files, a description of the row otherwise. `label` (N,): class names,
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
        raise UserError(f"{source}: remote data is not read directly; copy or mount it and give the local path")
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _directory(source, path, separator)
    if os.path.isfile(path):
        return _file(source, path, separator)
    shards = _shards(path)
    if shards:
        return _parquet(source, shards, separator)
    if glob.has_magic(path):
        return _glob(source, path, separator)
    parent, name = os.path.split(path.rstrip("/"))
    known = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    if known and os.path.isdir(parent or "."):
        known = known + sorted(_parquet_splits(parent or "."))
    raise UserError(
        f"{source}: nothing is there; looked for a folder, a file, and {source}-*.parquet{nearest(name, known)}"
    )


def parts_of(source: str) -> list[str]:
    """The sources inside a folder that holds several splits (train-*.parquet beside test-*.parquet, or train/ beside
    test/), else just `source`."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        splits = _parquet_splits(path)
        if len(splits) > 1:
            return [os.path.join(source, name) for name in sorted(splits)]
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _is_junk(entry.name))
        if len(folders) > 1 and all(name.lower() in SPLIT_WORDS for name in folders):
            return [os.path.join(source, name) for name in folders]
    return [source]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which "9" comes before "10" and "b2" before "b10"."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name


def printable(path: bytes | str) -> str:
    """A path for people: bytes that are no UTF-8 are shown as replacement characters."""
    raw = path if isinstance(path, bytes) else os.fsencode(path)
    return raw.decode("utf-8", "replace")


# ---- folders and files


@dataclass
class _Walk:
    """What a folder holds: image files in sorted order, relative to the root, and what was passed over and why."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    mtimes: list[int] = field(default_factory=list)
    dangling: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def skip(self, why: str, path: str) -> None:
        self.skipped[why] += 1
        self.example.setdefault(why, path)

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


def _walk(root: str) -> _Walk:
    """Every image file below `root`: links are followed, a link back into one of its own parents is not."""
    found = _Walk()

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
                is_folder, stat = entry.is_dir(), entry.stat()
            except OSError as error:
                if os.path.splitext(name)[1].lower() not in IMAGE_ENDINGS | {""}:
                    found.skip("other files that cannot be read", path)
                    continue
                found.paths.append(path)
                found.sizes.append(-1)
                found.mtimes.append(-1)
                broken = "link to nothing" if entry.is_symlink() else "cannot be read"
                found.dangling[path] = f"{broken}: {error.strerror}"
                continue
            if is_folder:
                here = (stat.st_dev, stat.st_ino)
                if here in above:
                    found.skip("links back to a folder above them", path)
                else:
                    visit(entry.path, path + "/", above | {here})
            elif not entry.is_file() or not _looks_like_image(name, entry.path):
                found.skip(f"{os.path.splitext(name)[1].lower() or 'other'} files", path)
            else:
                found.paths.append(path)
                found.sizes.append(stat.st_size)
                found.mtimes.append(stat.st_mtime_ns)

    stat = os.stat(root)
    visit(root, "", frozenset([(stat.st_dev, stat.st_ino)]))
    return found


def _directory(source: str, path: str, separator: str | None) -> Listing:
    splits = _parquet_splits(path)
    if len(splits) > 1:
        names = ", ".join(sorted(splits))
        raise UserError(f"{source}: holds the Parquet splits {names}; name one, such as {source}/{sorted(splits)[0]}")
    if splits:
        return _parquet(source, next(iter(splits.values())), separator)
    found = _walk(path)
    if not found.paths:
        other = "; ".join(f"{count:,} {why}" for why, count in sorted(found.skipped.items())) or "nothing at all"
        raise UserError(
            f"{source}: no images; looked for files such as .jpg and .png in it and its subfolders, and for .parquet "
            f"files in it; found {other}"
        )
    top = [path.partition("/")[0] if "/" in path else None for path in found.paths]
    label, classes = _encode([None if name is None else printable(name) for name in top])
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
    paths = sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in paths if os.path.isfile(path) and not _is_junk(os.path.basename(path))]
    shards = [path for path in paths if path.endswith(".parquet")]
    if shards and len(shards) == len(paths):
        return _parquet(source, shards, separator)
    images = [path for path in paths if _looks_like_image(os.path.basename(path), path)]
    if not images:
        raise UserError(f"{source}: the pattern matches {len(paths):,} files, none of them an image or .parquet file")
    found = _Walk()
    for path in images:
        stat = os.stat(path)
        found.paths.append(os.path.abspath(path))
        found.sizes.append(stat.st_size)
        found.mtimes.append(stat.st_mtime_ns)
    notices = [] if len(images) == len(paths) else [f"{source}: skipped {len(paths) - len(images):,} other files"]
    label, classes = _encode([None] * len(images))
    return _of_files(source, "list of files", "/", found, label, classes, notices, None)


def _of_files(
    source: str,
    kind: str,
    root: str,
    found: _Walk,
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
        *_label_parts(label),
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
        return _parquet(source, [path], separator)
    if name.endswith(MANIFEST_ENDINGS):
        return _manifest(source, path, *_read_manifest(source, path), separator)
    if _looks_like_image(name, path):
        return _glob(source, glob.escape(path))
    raise UserError(f"{source}: neither an image, nor .parquet, nor a list of paths ({', '.join(MANIFEST_ENDINGS)})")


def _read_manifest(source: str, path: str) -> tuple[list[str], pa.Array | None]:
    """The paths of a CSV, TSV or plain list, and its label column where it has one."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise UserError(f"{source}: the file is empty; it needs one image path a line, or the columns path,label")
    first = data.lstrip().splitlines()[0].decode("utf-8", "replace")
    folder = os.path.dirname(path)
    whole = os.path.exists(os.path.join(folder, first)) or os.path.splitext(first)[1].lower() in IMAGE_ENDINGS
    if path.lower().endswith(".txt") and whole:
        lines = data.decode("utf-8", "surrogateescape").splitlines()  # paths with commas or spaces survive
        return [line.strip() for line in lines if line.strip()], None
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
    column = next(name for name in _PATH_COLUMNS if name in names)
    label = next((_flat(table[name]) for name in _LABEL_COLUMNS if name in names and name != column), None)
    paths = table[column]
    if paths.null_count:
        raise UserError(f"{source}: {paths.null_count:,} rows have an empty {column}; every row needs one")
    return paths.to_pylist(), label


def _manifest(source: str, path: str, paths: Sequence[str], labels: pa.Array | None, separator: str | None) -> Listing:
    root, found = os.path.dirname(os.path.abspath(path)), _Walk()
    for relative in paths:
        found.paths.append(relative)
        try:
            stat = os.stat(os.path.join(root, relative))
        except OSError as error:
            found.dangling[relative] = f"listed in {os.path.basename(path)}: {error.strerror}"
            found.sizes.append(-1)
            found.mtimes.append(-1)
        else:
            found.sizes.append(stat.st_size)
            found.mtimes.append(stat.st_mtime_ns)
    said = _unlabelled(len(paths)) if labels is None else _labels(source, labels, None, separator)
    return _of_files(source, "manifest", root, found, said.label, said.classes, list(said.notices), said.problem)


# ---- Parquet


def _shard_prefix(name: str) -> str:
    """ "train" for train-00000-of-00004.parquet, train-0.parquet and train.parquet."""
    return re.sub(r"-\d+(-of-\d+)?$", "", name.removesuffix(".parquet"))


def _parquet_splits(folder: str) -> dict[str, list[str]]:
    """The Parquet files of a folder, or of its subfolder `data` as on the Hugging Face hub, by split name."""
    for place in (folder, os.path.join(folder, "data")):
        splits: dict[str, list[str]] = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(place), "*.parquet"))):
            splits.setdefault(_shard_prefix(os.path.basename(path)), []).append(path)
        if splits:
            # Shards numbered without a common name (part-0, 0000 ...) are one set: no name says that they are splits.
            named = all(name.lower() in SPLIT_WORDS for name in splits)
            return splits if named else {"all": sorted(path for paths in splits.values() for path in paths)}
    return {}


def _shards(path: str) -> list[str]:
    """For PATH/train: the files PATH/train-*.parquet, PATH/train.parquet, or the same in PATH/data."""
    folder, name = os.path.split(path)
    for place in (folder, os.path.join(folder, "data")):
        found = glob.glob(os.path.join(glob.escape(place), glob.escape(name) + "*.parquet"))
        found = sorted(file for file in found if _shard_prefix(os.path.basename(file)) == name)
        if found:
            return found
    return []


def _refuse_missing_shards(source: str, files: Sequence[str]) -> None:
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


def _parquet(source: str, files: Sequence[str], separator: str | None) -> Listing:
    _refuse_missing_shards(source, files)
    paths: list[bytes] = []
    labels: list[pa.ChunkedArray] = []
    groups_of: dict[tuple[int, int], tuple[str, list[int]]] = {}  # of each block: which file, which row groups
    schema = image = label_column = None
    for file in files:
        try:
            with pq.ParquetFile(file) as shard:
                if schema is None:
                    schema = shard.schema_arrow
                    image = _image_column(schema)
                    if image is None:
                        return _parquet_manifest(source, files, shard, separator)
                    label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
                assert image is not None
                names = _inner_paths(shard, image)
                start = len(paths)
                paths.extend(
                    os.fsencode(f"{os.path.basename(file)} row {row}" + (f" ({name})" if name else ""))
                    for row, name in enumerate(names)
                )
                if label_column is not None:
                    labels.append(shard.read(columns=[label_column])[label_column])
                groups, stop = [], start
                for group in range(shard.num_row_groups):
                    groups.append(group)
                    stop += shard.metadata.row_group(group).num_rows
                    if stop - start >= _ROWS_PER_BLOCK or (stop > start and group + 1 == shard.num_row_groups):
                        groups_of[start, stop] = (file, groups)
                        groups, start = [], stop
        except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, OSError) as error:
            raise UserError(f"{file}: cannot be read as Parquet like its neighbours: {error}") from error
    if not paths:
        raise UserError(f"{source}: {len(files)} Parquet files and no rows in them")
    if label_column is None:
        said = _unlabelled(len(paths))
    else:
        tables = [pa.table({"label": column}) for column in labels]
        stacked = pa.concat_tables(tables, promote_options="permissive")["label"]
        said = _labels(source, _flat(stacked), _hugging_face_names(schema, label_column), separator)
    root = os.path.dirname(os.path.abspath(files[0]))

    def items(start: int, stop: int) -> Iterator[Item]:
        file, groups = groups_of[start, stop]
        with pq.ParquetFile(file) as shard:
            for batch in shard.iter_batches(_ROWS_READ_AT_ONCE, row_groups=groups, columns=[image]):
                for cell in batch.column(0).to_pylist():
                    data, inside = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                    if data is not None:
                        yield data
                    else:
                        yield os.path.join(root, inside) if inside else BadImage("the row holds no image")

    stats = [os.stat(file) for file in files]
    parts = [*(os.path.abspath(file) for file in files), *(f"{s.st_size} {s.st_mtime_ns}" for s in stats)]
    if separator is not None or pa.types.is_list(said.label.type):  # the same file, read otherwise
        parts.append(f"labels {separator}")
    signature = _signature("parquet", *parts)
    return Listing(
        source=source,
        kind=f"Parquet, {len(files)} file{'s' if len(files) > 1 else ''}",
        root=root,
        path=pa.array(paths, pa.large_binary()),
        label=said.label,
        classes=said.classes,
        blocks=list(groups_of),
        items=items,
        signature=signature,
        label_problem=said.problem,
        notices=list(said.notices),
    )


def _image_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded images: struct<bytes, ...> or binary."""

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and holds_images(kind.field(place).type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [column.name for column in schema if holds_images(column.type)]
    return next((name for name in ("image", "img") if name in found), found[0] if found else None)


def _inner_paths(shard: pq.ParquetFile, image: str) -> list[str | None]:
    """The path beside each image's bytes, where the file has one."""
    kind = shard.schema_arrow.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return [None] * shard.metadata.num_rows
    return pc.struct_field(shard.read(columns=[f"{image}.path"])[image], "path").to_pylist()


def _parquet_manifest(source: str, files: Sequence[str], shard: pq.ParquetFile, separator: str | None) -> Listing:
    names = shard.schema_arrow.names
    column = next((name for name in _PATH_COLUMNS if name in names), None)
    if column is None or len(files) > 1:
        raise UserError(
            f"{source}: columns {', '.join(names)}: needs an image column (struct of bytes and path, or binary), or, "
            "in a single file, a column named path"
        )
    label_column = next((name for name in _LABEL_COLUMNS if name in names and name != column), None)
    table = shard.read(columns=[column] + ([label_column] if label_column else []))
    labels = _flat(table[label_column]) if label_column else None
    return _manifest(source, files[0], table[column].cast(pa.string()).to_pylist(), labels, separator)


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


# ---- labels


def _encode(names: Sequence[str | None]) -> tuple[pa.DictionaryArray, tuple[str, ...]]:
    """Class names, dictionary-encoded in natural order, and that order."""
    classes = tuple(sorted({name for name in names if name is not None}, key=natural))
    code = {name: number for number, name in enumerate(classes)}
    codes = pa.array([None if name is None else code[name] for name in names], pa.int32())
    return pa.DictionaryArray.from_arrays(codes, pa.array(classes, pa.string())), classes


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; an empty or single-chunk one included."""
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


class _Said(NamedTuple):
    """What a label column says: the labels, as in `Listing`; why they cannot be used; what a reader should know."""

    label: pa.DictionaryArray | pa.ListArray
    classes: tuple[str, ...]
    problem: str | None = None
    notices: tuple[str, ...] = ()


def _unlabelled(count: int, problem: str | None = None) -> _Said:
    return _Said(*_encode([None] * count), problem)


def _label_parts(label: pa.DictionaryArray | pa.ListArray) -> tuple[str, ...]:
    """A source's labels as parts of its signature."""
    if pa.types.is_list(label.type):
        return "labels", json.dumps(label.to_pylist())
    return ("\0".join(name or "" for name in label.to_pylist()),)


def _labels(source: str, values: pa.Array, names: tuple[str, ...] | None, separator: str | None = None) -> _Said:
    """A label column as class names, or as lists of them."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _several(source, values.cast(pa.list_(kind.value_type)), names, "each row is a list")
    if pa.types.is_floating(kind):  # integers with gaps, as pandas writes them
        try:
            values = pc.if_else(pc.is_nan(values), None, values).cast(pa.int64())
        except pa.ArrowInvalid:
            example = values.drop_null()[0]
            return _unlabelled(len(values), f"{source}: labels are fractions such as {example}; classes are needed")
    if pa.types.is_integer(values.type):
        return _numbered(source, values, names)
    if not _is_text(kind):
        return _unlabelled(len(values), f"{source}: labels of type {kind}; class names or whole numbers are needed")
    text = _named(values)
    if separator in SEPARATORS:
        return _several(source, pc.split_pattern(text, separator), None, f"cells are divided at {separator!r}")
    if separator == WHOLE:
        return _Said(*_encode(text.to_pylist()))
    problem, notices = _compound(source, text)
    return _unlabelled(len(text), problem) if problem else _Said(*_encode(text.to_pylist()), None, notices)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _named(values: pa.Array) -> pa.Array:
    """Class names without space around them, null where there is none."""
    text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    return pc.if_else(pc.is_in(text, value_set=pa.array(["", "-1"])), None, text)


def _numbered(source: str, values: pa.Array, names: tuple[str, ...] | None, owner: np.ndarray | None = None) -> _Said:
    """Whole numbers, below 0 for no label, as the class names they stand for; `owner`: which row each is of."""
    values = pc.if_else(pc.less(values, 0), None, values.cast(pa.int64()))
    top = pc.max(values).as_py()
    if names is not None and top is not None and top >= len(names):
        place = pc.index(values, pa.scalar(top, pa.int64())).as_py()
        row = place if owner is None else int(owner[place])
        return _unlabelled(len(values), f"{source}: row {row} has the label {top}, but names end at {len(names) - 1}")
    present = sorted(value for value in pc.unique(values).to_pylist() if value is not None)
    codes = pc.index_in(values, value_set=pa.array(present, pa.int64()))
    classes = tuple(names[value] if names else str(value) for value in present)
    return _Said(pa.DictionaryArray.from_arrays(codes, pa.array(classes, pa.string())), classes)


def _compound(source: str, text: pa.Array) -> tuple[str | None, tuple[str, ...]]:
    """Cells that may hold several labels though nobody says so: (why they cannot be used, or None; notices)."""
    known = {name for name in pc.unique(text).to_pylist() if name is not None}
    marked = {mark: sorted((cell for cell in known if mark in cell), key=natural) for mark in SEPARATORS}

    def row_of(cell: str) -> str:
        return f"row {pc.index(text, cell).as_py()} has the label {cell!r}"

    for mark, cells in marked.items():
        # A comma alone gives a cell away; elsewhere only its parts being classes too does.
        sure = [cell for cell in cells if mark == "," or {part.strip() for part in cell.split(mark)} - {""} <= known]
        if sure:
            return (
                f"{source}: {row_of(sure[0])}, which reads as several labels; if it is, give separator: {mark!r} "
                f"beside from: in the recipe's data, and if it is one class, separator: {WHOLE}"
            ), ()
    return None, tuple(
        f"{source}: {row_of(cells[0])}, which stays one class; if cells hold several labels, give separator: {mark!r} "
        "beside from: in the recipe's data"
        for mark, cells in marked.items() if cells
    )  # fmt: skip


def _several(source: str, rows: pa.ListArray, names: tuple[str, ...] | None, rule: str) -> _Said:
    """Several labels an image. An empty list says that an image shows none of the classes; null, and a list of nothing
    but -1 and empty names, is no label."""
    values, owner = rows.flatten(), pc.list_parent_indices(rows).to_numpy()
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    length = pc.list_value_length(rows).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(values.type):
        given = length[rows.is_valid().to_numpy(zero_copy_only=False)]
        if len(values) and given.min() == given.max() > 1 and set(pc.unique(values).to_pylist()) == {0, 1}:
            example = rows.drop_null()[0].as_py()
            return _unlabelled(len(rows), (
                f"{source}: every row has {int(given[0])} numbers of 0 and 1, such as {example}, which reads as a yes "
                "or no for each class; list the classes that an image shows"
            ))  # fmt: skip
        said = _numbered(source, values, names, owner)
    elif _is_text(values.type):
        said = _Said(*_encode(_named(values).to_pylist()))
    else:
        problem = f"{source}: lists of labels of type {values.type}; class names or whole numbers are needed"
        return _unlabelled(len(rows), problem)
    if said.problem or not said.classes:
        return _unlabelled(len(rows), said.problem)
    codes, width = said.label.indices, len(said.classes)
    known = codes.is_valid().to_numpy(zero_copy_only=False)
    pairs = np.unique(owner[known].astype(np.int64) * width + codes.drop_null().to_numpy())  # each class once a row
    sizes = np.bincount(pairs // width, minlength=len(rows))
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    none = length == 0  # a null row's length is NaN
    encoded = pa.DictionaryArray.from_arrays(pa.array(pairs % width, pa.int32()), pa.array(said.classes, pa.string()))
    label = pa.ListArray.from_arrays(offsets, encoded, mask=pa.array((sizes == 0) & ~none))
    notices = [f"{source}: several labels an image: {rule}"]
    if none.any():
        notices.append(
            f"{source}: {int(none.sum()):,} lists are empty: these images count as showing none of the classes"
        )
    return _Said(label, said.classes, None, tuple(notices))


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
    said = _labels(source, pa.array(target[rows]), None)
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
    said = _labels(source, values, names)

    def items(start: int, stop: int) -> Iterator[Item]:
        for row in range(start, stop):
            yield np.asarray(data[row][0].convert("RGB"))

    paths = [f"{source}[{row}]".encode() for row in range(len(data))]
    return _of_arrays(source, "torchvision", paths, said, items)


def _of_arrays(
    source: str,
    kind: str,
    paths: list[bytes],
    said: _Said,
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
