"""Labels that people corrected: reviewed CSV files, checked row by row, and one canonical form under its digest."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import nearest

COLUMNS = ("round", "id", "corrected")
LEAVE_OUT = ("?", "drop")  # what a reviewer may write for an image that belongs to no class


@dataclass(frozen=True)
class Corrections:
    """What people decided: `rows` map (round whose labels were looked at, image id) to a class name, or to None where
    the image is to be left out."""

    rows: Mapping[tuple[int, str], str | None]
    classes: tuple[str, ...]

    @property
    def text(self) -> str:
        """A CSV of the columns round, id, corrected, in their order: equal for equal decisions, whatever file they
        came from."""
        leave_out = next((word for word in LEAVE_OUT if word not in self.classes), LEAVE_OUT[0])
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (number, key), name in sorted(self.rows.items(), key=lambda row: row[0]):
            writer.writerow([number, key, leave_out if name is None else name])
        return out.getvalue()

    @property
    def digest(self) -> str:
        """sha256 of `text`, 32 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    def before(self, number: int | None) -> Corrections:
        """What was decided about rounds before `number`, which is what that round may use; None: everything."""
        kept = {place: name for place, name in self.rows.items() if number is None or place[0] < number}
        return Corrections(kept, self.classes)

    def decisions(self) -> dict[str, str | None]:
        """Image id to class name or None; of two reviews the later round's holds."""
        return {key: self.rows[number, key] for number, key in sorted(self.rows)}

    def __or__(self, other: Corrections) -> Corrections:
        return Corrections({**self.rows, **other.rows}, self.classes)


def read(
    files: Mapping[str, bytes], classes: Sequence[str], *, number: int | None = None,
    known: Mapping[int, Collection[str]] | None = None,
) -> tuple[Corrections, list[str]]:  # fmt: skip
    """Read reviewed files: what `--export` wrote, with the column `corrected` filled in where somebody looked.

    A class name there is the image's class; "?" or "drop" leaves the image out, unless a class is called so; empty
    means not reviewed. Spreadsheets are met half-way: commas, semicolons or tabs, UTF-8 with or without a mark, UTF-16.

    Args:
        files: name to content. Together they are one review: the same image must not get two answers.
        classes: the data's class names.
        number: the round that rows without a column `round` speak of.
        known: round to the ids of its images; None: they are not checked.
    Returns:
        The rows that are right, and a line for every problem, "labels.csv line 3: ...".
    """
    reader = _Reader(tuple(classes), number, known)
    for name, content in files.items():
        reader.file(name, content)
    return Corrections(reader.rows, tuple(classes)), reader.problems


class _Reader:
    """One review; its rows and problems so far."""

    def __init__(
        self, classes: tuple[str, ...], number: int | None, known: Mapping[int, Collection[str]] | None
    ) -> None:
        self.number, self.known = number, known
        self.words = {_spelled(name): name for name in classes}
        self.rows: dict[tuple[int, str], str | None] = {}
        self.places: dict[tuple[int, str], str] = {}
        self.problems: list[str] = []

    def file(self, name: str, content: bytes) -> None:
        text = self._decoded(name, content)
        if text is None:
            return
        first = text.partition("\n")[0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
        try:
            columns = self._columns(name, next(rows, []))
            for line, cells in self._cells(rows):
                if columns is not None and any(cells):
                    self._row(f"{name} line {line}", columns, cells)
        except csv.Error as error:
            self.problems.append(f"{name} line {rows.line_num}: not CSV ({error}); nothing after it was read")

    def _decoded(self, name: str, content: bytes) -> str | None:
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            self.problems.append(f"{name} line {line}: not UTF-8; save it as CSV in UTF-8")
            return None

    @staticmethod
    def _cells(rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
        while True:
            line = rows.line_num + 1  # type: ignore[attr-defined]
            cells = next(rows, None)
            if cells is None:
                return
            yield line, cells

    def _columns(self, name: str, header: list[str]) -> list[str] | None:
        header = [cell.strip() for cell in header]
        before = len(self.problems)
        for column in COLUMNS:
            if header.count(column) > 1:
                self.problems.append(f"{name} line 1: has the column {column} {header.count(column)} times")
            if column not in header and not (column == "round" and self.number is not None):
                which = nearest(column, header) or f"; it has {', '.join(filter(None, header)) or 'none'}"
                self.problems.append(f"{name} line 1: has no column {column}{which}")
        return header if len(self.problems) == before else None

    def _row(self, where: str, columns: list[str], cells: list[str]) -> None:
        if len(cells) != len(columns):
            self.problems.append(f"{where}: {len(cells)} cells, the header has {len(columns)}")
            return
        row, before = dict(zip(columns, cells, strict=True)), len(self.problems)
        number, key = self._round(where, row.get("round")), row["id"].strip()
        if not key or (self.known is not None and number is not None and key not in self.known[number]):
            of = "" if number is None else f": no image of round {number}"
            self.problems.append(f"{where}: unknown id {key or '(empty)'}{of}")
        answer = self._answer(where, row["corrected"])
        if not row["corrected"].strip() or number is None or len(self.problems) > before:
            return
        place = number, key
        if self.rows.setdefault(place, answer) != answer:
            new, old = (name or "left out" for name in (answer, self.rows[place]))
            self.problems.append(f"{where}: image {key} is {new} here and {old} in {self.places[place]}")
        self.places.setdefault(place, where)

    def _round(self, where: str, cell: str | None) -> int | None:
        if cell is None:
            return self.number
        cell = cell.strip()
        if not (cell.isascii() and cell.isdigit()):
            self.problems.append(f"{where}: round {cell or '(empty)'}: must be a number, as `--export` writes it")
        elif self.known is not None and int(cell) not in self.known:
            rounds = ", ".join(map(str, sorted(self.known)))
            self.problems.append(f"{where}: round {cell}: not in this run, which has {rounds}")
        else:
            return int(cell)
        return None

    def _answer(self, where: str, cell: str) -> str | None:
        word = _spelled(cell)
        word = word if word in self.words else word.strip()  # a folder's name may end in a space
        if word in self.words:
            return self.words[word]
        if word and word.lower() not in {*LEAVE_OUT} - {*self.words}:
            hint = nearest(word, self.words) or f"; there are {', '.join(self.words)}"
            self.problems.append(f"{where}: unknown class {word}{hint}")
        return None


def _spelled(name: str) -> str:
    """A spreadsheet may write ö as o and two dots; the eye sees no difference."""
    return unicodedata.normalize("NFC", name)
