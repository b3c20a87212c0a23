"""What a label column says: class names, numbers or lists of them, and why they cannot be used where they cannot.

An image may have several labels where the column holds lists (Parquet), or text and the recipe names what divides its
cells (`separator`). No other cell is ever divided: "cat;dog" may be the name of one class, and no look at the cells can
tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEPARATORS = (",", ";", "|")
WHOLE = "none"  # instead of a separator: every cell is one class, whatever it holds


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which "9" comes before "10" and "b2" before "b10"."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name


def encode(names: Sequence[str | None]) -> tuple[pa.DictionaryArray, tuple[str, ...]]:
    """Class names, dictionary-encoded in natural order, and that order."""
    classes = tuple(sorted({name for name in names if name is not None}, key=natural))
    code = {name: number for number, name in enumerate(classes)}
    codes = pa.array([None if name is None else code[name] for name in names], pa.int32())
    return pa.DictionaryArray.from_arrays(codes, pa.array(classes, pa.string())), classes


def _encode_text(text: pa.Array) -> tuple[pa.DictionaryArray, tuple[str, ...]]:
    """As `encode`, of a string array, without a Python object for each row."""
    classes = tuple(sorted((name for name in pc.unique(text).to_pylist() if name is not None), key=natural))
    known = pa.array(classes, pa.string())
    return pa.DictionaryArray.from_arrays(pc.index_in(text, value_set=known), known), classes


class Said(NamedTuple):
    """What a label column says: the labels, as in `Listing`; why they cannot be used; what a reader should know."""

    label: pa.DictionaryArray | pa.ListArray
    classes: tuple[str, ...]
    problem: str | None = None
    notices: tuple[str, ...] = ()


def no_labels(count: int) -> pa.DictionaryArray:
    """(count,) labels that are all null."""
    return pa.DictionaryArray.from_arrays(pa.nulls(count, pa.int32()), pa.array([], pa.string()))


def unlabelled(count: int, problem: str | None = None) -> Said:
    """Of a source that has no labels, or none that can be used."""
    return Said(no_labels(count), (), problem)


def label_parts(label: pa.DictionaryArray | pa.ListArray) -> tuple[str, ...]:
    """A source's labels as parts of its signature."""
    if pa.types.is_list(label.type):
        return "labels", json.dumps(label.to_pylist())
    return ("\0".join(name or "" for name in label.to_pylist()),)


def read_labels(source: str, values: pa.Array, names: tuple[str, ...] | None, separator: str | None = None) -> Said:
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
            return unlabelled(len(values), f"{source}: labels are fractions such as {example}; classes are needed")
    if pa.types.is_integer(values.type):
        return _numbered(source, values, names)
    if not _is_text(kind):
        return unlabelled(len(values), f"{source}: labels of type {kind}; class names or whole numbers are needed")
    text = _named(values)
    if separator in SEPARATORS:
        return _several(source, pc.split_pattern(text, separator), None, f"cells are divided at {separator!r}")
    if separator == WHOLE:
        return Said(*_encode_text(text))
    problem, notices = _compound(source, text)
    return unlabelled(len(text), problem) if problem else Said(*_encode_text(text), None, notices)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _named(values: pa.Array) -> pa.Array:
    """Class names without space around them, null where there is none."""
    text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    return pc.if_else(pc.is_in(text, value_set=pa.array(["", "-1"])), None, text)


def _numbered(source: str, values: pa.Array, names: tuple[str, ...] | None, owner: np.ndarray | None = None) -> Said:
    """Whole numbers, below 0 for no label, as the class names they stand for; `owner`: which row each is of."""
    values = pc.if_else(pc.less(values, 0), None, values.cast(pa.int64()))
    top = pc.max(values).as_py()
    if names is not None and top is not None and top >= len(names):
        place = pc.index(values, pa.scalar(top, pa.int64())).as_py()
        row = place if owner is None else int(owner[place])
        return unlabelled(len(values), f"{source}: row {row} has the label {top}, but names end at {len(names) - 1}")
    present = sorted(value for value in pc.unique(values).to_pylist() if value is not None)
    codes = pc.index_in(values, value_set=pa.array(present, pa.int64()))
    classes = tuple(names[value] if names else str(value) for value in present)
    return Said(pa.DictionaryArray.from_arrays(codes, pa.array(classes, pa.string())), classes)


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


def _several(source: str, rows: pa.ListArray, names: tuple[str, ...] | None, rule: str) -> Said:
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
            return unlabelled(len(rows), (
                f"{source}: every row has {int(given[0])} numbers of 0 and 1, such as {example}, which reads as a yes "
                "or no for each class; list the classes that an image shows"
            ))  # fmt: skip
        said = _numbered(source, values, names, owner)
    elif _is_text(values.type):
        said = Said(*_encode_text(_named(values)))
    else:
        problem = f"{source}: lists of labels of type {values.type}; class names or whole numbers are needed"
        return unlabelled(len(rows), problem)
    if said.problem or not said.classes:
        return unlabelled(len(rows), said.problem)
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
    return Said(label, said.classes, None, tuple(notices))
