"""Reviewed files: what a cell says, one digest for equal decisions, a line for every mistake, what a round may use."""

import csv
import hashlib
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.corrections import Corrections, read

CLASSES = ("cat", "dog", "größe")
A, B, C, D = (letter * 32 for letter in "abcd")
KNOWN = {0: {A, B, C, D}, 1: {A, B, C, D}}


def file(*rows, header=("file", "round", "id", "class", "corrected"), delimiter=","):
    """A labels.csv of (round, id, corrected) rows."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(header)
    for number, key, answer in rows:
        cells = {"file": "cat/0.5.png", "round": number, "id": key, "class": "cat", "corrected": answer}
        writer.writerow([cells[column] for column in header])
    return out.getvalue().encode()


def rows_of(*contents, classes=CLASSES, **options):
    found, problems = read({f"{n}.csv": content for n, content in enumerate(contents)}, classes, **options)
    assert problems == []
    return dict(found.rows)


def test_a_cell_is_a_class_or_leaves_the_image_out_or_was_not_reviewed():
    content = file((0, A, "dog"), (0, B, "?"), (0, C, ""), (0, D, " Drop "))
    assert rows_of(content, known=KNOWN) == {(0, A): "dog", (0, B): None, (0, D): None}


def test_a_class_that_is_called_drop_is_a_class():
    found, problems = read({"f": file((0, A, "drop"), (0, B, "?"))}, ("drop", "keep"))
    assert problems == [] and found.rows == {(0, A): "drop", (0, B): None}
    assert read({"f": found.text.encode()}, ("drop", "keep"))[0].rows == found.rows
    _, problems = read({"f": file((0, A, "Drop"))}, ("drop", "keep"))
    assert problems == ["f line 2: unknown class Drop; did you mean drop?"]
    found, _ = read({"f": file((0, A, "drop"), (0, B, "?"))}, ("?", "keep"))
    assert found.rows == {(0, A): None, (0, B): "?"}
    assert read({"f": found.text.encode()}, ("?", "keep"))[0].rows == found.rows


ROWS = [(0, B, "größe"), (1, A, "?"), (0, C, "")]
SAME = {
    "another order": file(*ROWS[::-1]),
    "semicolons": file(*ROWS, delimiter=";"),
    "tabs": file(*ROWS, delimiter="\t"),
    "a mark": b"\xef\xbb\xbf" + file(*ROWS),
    "UTF-16": file(*ROWS).decode().encode("utf-16"),
    "lines of Unix": file(*ROWS).replace(b"\r\n", b"\n"),
    "two dots apart": unicodedata.normalize("NFD", file(*ROWS).decode()).encode(),
    "other columns": file(*ROWS, header=("corrected", "id", "round")),
    "an empty line": file(*ROWS) + b"\r\n,,,,\r\n",
    "a row twice": file(*ROWS, ROWS[0]),
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_equal_decisions_have_one_digest_however_the_file_is_written(content):
    first, problems = read({"f": file(*ROWS)}, CLASSES)
    again, more = read({"g": content}, CLASSES)
    assert problems == more == [] and again.digest == first.digest
    assert first.rows == {(0, B): "größe", (1, A): None}


def test_the_text_is_a_reviewed_file_itself_and_its_hash_is_the_digest():
    found = Corrections({(1, A): None, (0, B): "größe"}, CLASSES)
    assert found.text == f"round,id,corrected\n0,{B},größe\n1,{A},?\n"
    assert found.digest == hashlib.sha256(found.text.encode()).hexdigest()[:32]
    assert read({"f": found.text.encode()}, CLASSES)[0] == found


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=4, unique=True), st.data())
def test_any_class_names_survive_the_text(names, data):
    names = [unicodedata.normalize("NFC", name) for name in names if name.strip() and name.isprintable()]
    if len(names) < 2 or len(set(names)) < len(names) or {"?", "drop"} <= set(names):
        return
    answers = data.draw(st.lists(st.sampled_from([None, *names]), min_size=1, max_size=5))
    found = Corrections({(0, f"{number:032}"): name for number, name in enumerate(answers)}, tuple(names))
    again, problems = read({"f": found.text.encode()}, names)
    assert problems == [] and again == found


MISTAKES = [
    (file((0, "e" * 32, "dog")), [f"f line 2: unknown id {'e' * 32}: no image of round 0"]),
    (file((0, "1.2E+31", "")), ["f line 2: unknown id 1.2E+31: no image of round 0"]),
    (file((0, "", "dog")), ["f line 2: unknown id (empty): no image of round 0"]),
    (file((0, A, "dgo")), ["f line 2: unknown class dgo; did you mean dog?"]),
    (file((0, A, "wolverine")), ["f line 2: unknown class wolverine; there are cat, dog, größe"]),
    (file((7, A, "dog")), ["f line 2: round 7: not in this run, which has 0, 1"]),
    (file(("one", A, "dog")), ["f line 2: round one: must be a number, as `--export` writes it"]),
    (file((0, A, "dog"), (0, A, "cat")), [f"f line 3: image {A} is cat here and dog in f line 2"]),
    (file((0, A, "?"), (0, A, "cat")), [f"f line 3: image {A} is cat here and left out in f line 2"]),
    (file((0, A, "dog")) + b"1,2\r\n", ["f line 3: 2 cells, the header has 5"]),
    (file(header=("round", "id", "class")), ["f line 1: has no column corrected; it has round, id, class"]),
    (file().replace(b"corrected", b"korrected"), ["f line 1: has no column corrected; did you mean korrected?"]),
    (b"id,id,round,corrected\r\n", ["f line 1: has the column id 2 times"]),
    (b"", [f"f line 1: has no column {name}; it has none" for name in ("round", "id", "corrected")]),
    (file((0, A, "größe")).decode().encode("latin-1"), ["f line 2: not UTF-8; save it as CSV in UTF-8"]),
    (file((0, A, "dog")) + b'0,"un', ["f line 3: not CSV (unexpected end of data); nothing after it was read"]),
]


@pytest.mark.parametrize(("content", "expected"), MISTAKES)
def test_a_mistake_is_a_line_that_says_where(content, expected):
    assert read({"f": content}, CLASSES, known=KNOWN)[1] == expected


def test_all_mistakes_are_told_together_and_the_right_rows_are_read():
    content = file((0, A, "dgo"), (0, "x", "cat"), (0, B, "cat"), (9, C, "woof"))
    found, problems = read({"f": content}, CLASSES, known=KNOWN)
    assert [problem.partition(":")[0] for problem in problems] == ["f line 2", "f line 3", "f line 5", "f line 5"]
    assert found.rows == {(0, B): "cat"}


def test_a_row_of_several_lines_is_named_by_its_first():
    content = b'note,round,id,corrected\r\n"two\r\nlines",0,' + A.encode() + b',dog\r\n"",0,' + B.encode() + b",dgo\r\n"
    found, problems = read({"f": content}, CLASSES)
    assert found.rows == {(0, A): "dog"} and problems == ["f line 4: unknown class dgo; did you mean dog?"]


def test_rows_without_a_round_are_of_the_round_that_is_given():
    content = file((0, A, "dog"), header=("id", "corrected"))
    assert rows_of(content, number=3) == {(3, A): "dog"}
    assert read({"f": content}, CLASSES)[1] == ["f line 1: has no column round; it has id, corrected"]


def test_two_files_are_one_review():
    first, second = file((0, A, "dog"), (0, B, "cat")), file((0, B, "cat"), (0, C, "?"))
    assert rows_of(first, second) == {(0, A): "dog", (0, B): "cat", (0, C): None}
    _, problems = read({"one": first, "two": file((0, A, "cat"))}, CLASSES)
    assert problems == [f"two line 2: image {A} is cat here and dog in one line 2"]


def test_a_round_may_use_what_was_said_of_those_before_it_and_the_later_word_holds():
    said = Corrections({(0, A): "cat", (1, A): "dog", (1, B): None}, CLASSES)
    assert said.before(0).rows == {}
    assert said.before(1).decisions() == {A: "cat"}
    assert said.before(2).decisions() == said.before(None).decisions() == {A: "dog", B: None}
    assert said.before(1).digest == Corrections({(0, A): "cat"}, CLASSES).digest
    assert (said | Corrections({(0, A): None}, CLASSES)).before(1).decisions() == {A: None}
