"""Several labels an image: where they are read, and that no class is made or divided by accident."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_images import class_folders, encoded, flat_folder, hugging_face, pixels, write
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.catalogue import open_catalogue
from orchestrator.data.doctor import inspect
from orchestrator.data.images import Images
from orchestrator.data.sources import Listing, open_source
from orchestrator.data.splits import Data, DataConfig, Split, open_data
from orchestrator.errors import UserError


def manifest(folder, cells, name="list.csv"):
    """A CSV of as many pictures as there are cells."""
    flat_folder(folder, range(len(cells)))
    lines = [f'{row}.png,"{cell}"' for row, cell in enumerate(cells)]
    (folder / name).write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    return folder / name


def parquet(path, labels, feature=None):
    """Pictures with a column of lists."""
    image = [encoded(pixels(seed)) for seed in range(len(labels))]
    table = pa.table({"image": image, "labels": labels})
    if feature is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"labels": feature}}})})
    pq.write_table(table, path)
    return path


def listed(source, separator=None) -> Listing:
    return open_source(str(source), source.parent, separator=separator)


def opened(tmp_path, splits, *, seed=0) -> Data:
    return open_data(DataConfig(pixels=8, splits=splits), tmp_path / "cache", seed=seed)


def images_of(source, tmp_path, separator=None) -> Images:
    return Images.of(open_catalogue(listed(source, separator), tmp_path / "cache", pixels=8))


def shown(images: Images) -> dict[str, set[str] | None]:
    """File to the classes it shows, None without a label."""
    assert images.targets is not None
    classes = np.array(images.classes)
    return {
        images.where(row).rpartition("/")[2]: set(classes[images.targets[row]]) if images.labelled[row] else None
        for row in range(len(images))
    }


# ---- what reads as several labels


@pytest.mark.parametrize("mark", [";", "|", ","])
def test_cells_are_divided_at_the_separator_that_is_given_and_a_notice_says_so(tmp_path, mark):
    cells = [f"dog{mark} cat", "cat", f"{mark}bird{mark}", "", "-1", mark, f"dog{mark}dog"]
    listing = listed(manifest(tmp_path, cells), mark)
    assert (listing.several, listing.classes) == (True, ("bird", "cat", "dog"))
    assert listing.label.to_pylist() == [["cat", "dog"], ["cat"], ["bird"], None, None, None, ["dog"]]
    assert any(f"several labels an image: cells are divided at '{mark}'" in line for line in listing.notices)
    assert listing.label_problem is None


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c d"]), min_size=1, max_size=5), min_size=1, max_size=12))
def test_no_cell_is_ever_divided_without_a_separator(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("cells")
    lines = [f"{number}.png,{';'.join(row)}\n" for number, row in enumerate(rows)]
    (folder / "list.csv").write_text("".join(["path,label\n", *lines]))
    listing = listed(folder / "list.csv")
    assert not listing.several
    if listing.label_problem is None:
        assert listing.label.to_pylist() == [";".join(row) for row in rows]


@pytest.mark.parametrize("mark", [";", "|"])
def test_a_class_named_with_a_separator_stays_one_class_and_a_notice_says_so(tmp_path, mark):
    name = f"cat{mark}dog"
    listing = listed(manifest(tmp_path, ["bird", name, "cat"]))
    assert listing.classes == ("bird", "cat", name) and not listing.several
    (notice,) = listing.notices
    assert f"row 1 has the label '{name}', which stays one class" in notice and f"separator: '{mark}'" in notice


@pytest.mark.parametrize("mark", [",", ";", "|"])
def test_a_cell_whose_parts_are_classes_too_is_no_class_by_accident(tmp_path, mark):
    listing = listed(manifest(tmp_path, ["cat", f"cat{mark}dog", "dog"]))
    assert listing.label.null_count == 3 and listing.classes == ()
    assert f"row 1 has the label 'cat{mark}dog', which reads as several labels" in listing.label_problem
    assert f"separator: '{mark}'" in listing.label_problem and "separator: none" in listing.label_problem


def test_separator_none_says_that_every_cell_is_one_class(tmp_path):
    listing = listed(manifest(tmp_path, ["cat", "cat;dog", "dog", "tench, Tinca tinca"]), "none")
    assert listing.classes == ("cat", "cat;dog", "dog", "tench, Tinca tinca")
    assert (listing.label_problem, listing.notices, listing.several) == (None, [], False)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_a_parquet_column_of_lists_is_several_labels_an_image(tmp_path, kind):
    labels = pa.array([["dog", "cat"], [], None, ["cat", None], [None], ["cat", "cat"]], kind(pa.string()))
    listing = listed(parquet(tmp_path / "a.parquet", labels))
    assert listing.label.to_pylist() == [["cat", "dog"], [], None, ["cat"], None, ["cat"]]
    assert any("each row is a list" in line for line in listing.notices)
    assert any("1 lists are empty: these images count as showing none of the classes" in n for n in listing.notices)


def test_lists_of_one_length_and_a_dictionary_are_lists_too(tmp_path):
    pairs = pa.array([["red", "round"], ["red", "flat"]], pa.list_(pa.string(), 2))
    assert listed(parquet(tmp_path / "a.parquet", pairs)).label.to_pylist() == [["red", "round"], ["flat", "red"]]
    coded = pa.array([["red", "round"], ["red"]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    assert listed(parquet(tmp_path / "b.parquet", coded)).classes == ("red", "round")


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": {"names": ["zebra", "ant", "bee"], "_type": "ClassLabel"}, "_type": "Sequence"},
        [{"names": ["zebra", "ant", "bee"], "_type": "ClassLabel"}],
    ],
)
def test_numbers_in_lists_take_their_names_and_order_from_the_metadata(tmp_path, feature):
    listing = listed(parquet(tmp_path / "a.parquet", pa.array([[2, 0], [0], [-1], []]), feature))
    assert listing.classes == ("zebra", "bee")
    assert listing.label.to_pylist() == [["zebra", "bee"], ["zebra"], None, []]


def test_a_number_beyond_the_names_is_reported_with_its_row_and_not_its_place_in_the_lists(tmp_path):
    feature = {"feature": {"names": ["x", "y"], "_type": "ClassLabel"}, "_type": "Sequence"}
    listing = listed(parquet(tmp_path / "a.parquet", pa.array([[0, 1, 0], None, [1, 5]]), feature))
    assert "row 2 has the label 5, but names end at 1" in listing.label_problem and not listing.several


def test_a_yes_or_no_for_each_class_is_not_taken_for_classes(tmp_path):
    listing = listed(parquet(tmp_path / "a.parquet", pa.array([[0, 1, 1], [1, 0, 0], None])))
    assert "every row has 3 numbers of 0 and 1, such as [0, 1, 1]" in listing.label_problem
    assert listed(parquet(tmp_path / "b.parquet", pa.array([[0, 1], [1], [0]]))).label_problem is None


def test_lists_without_any_class_are_no_labels(tmp_path):
    listing = listed(parquet(tmp_path / "a.parquet", pa.array([[], None, []], pa.list_(pa.string()))))
    assert (listing.several, listing.label.null_count, listing.classes) == (False, 3, ())


def test_a_manifest_in_parquet_may_hold_lists_or_divided_text(tmp_path):
    flat_folder(tmp_path, range(2))
    path = ["0.png", "1.png"]
    pq.write_table(pa.table({"path": path, "label": [["b", "a"], ["a"]]}), tmp_path / "list.parquet")
    assert listed(tmp_path / "list.parquet").label.to_pylist() == [["a", "b"], ["a"]]
    pq.write_table(pa.table({"path": path, "label": ["b|a", "a"]}), tmp_path / "text.parquet")
    assert listed(tmp_path / "text.parquet", "|").label.to_pylist() == [["a", "b"], ["a"]]


@pytest.mark.parametrize("made", ["csv", "parquet"])
def test_the_same_file_read_otherwise_is_another_catalogue(tmp_path, made):
    if made == "csv":
        source = manifest(tmp_path, ["a;b", "a;b", "c"])
    else:
        source = parquet(tmp_path / "a.parquet", pa.array(["a;b", "a;b", "c"]))
    whole, divided = listed(source), listed(source, ";")
    assert whole.signature != divided.signature == listed(source, ";").signature
    images = images_of(source, tmp_path), images_of(source, tmp_path, ";")
    assert [part.several for part in images] == [False, True]
    assert images[0].fingerprint != images[1].fingerprint and set(images[0].ids) == set(images[1].ids)


# ---- the images


def test_targets_follow_images_through_the_catalogue_sets_and_class_maps(tmp_path):
    source = manifest(tmp_path / "data", ["cat;dog", "dog", "", "bird;cat;dog"])
    images = images_of(source, tmp_path, ";")
    said = {"0.png": {"cat", "dog"}, "1.png": {"dog"}, "2.png": None, "3.png": {"bird", "cat", "dog"}}
    assert shown(images) == said and images.targets.dtype == bool and images.targets.shape == (4, 3)
    assert not images.label.any() and images.labelled.sum() == 3
    assert images.per_class() == {"bird": 1, "cat": 2, "dog": 3}
    assert shown(images.select([3, 1, 0, 2])) == said
    assert shown(images.relabel(["dog", "ant", "cat", "bird"])) == said
    assert shown(images.relabel(["dog"]))["3.png"] == {"dog"}
    assert shown(Images.concat(images.select([0]), images.select([1, 2, 3]))) == said
    assert shown(pickle.loads(pickle.dumps(images))) == said
    assert images.select([0, 1, 2, 3]).fingerprint == images.fingerprint


def test_without_labels_they_are_images_like_any_others(tmp_path):
    source = manifest(tmp_path / "data", ["a;b", "a", "b"])
    images = images_of(source, tmp_path, ";").without_labels()
    assert not images.several and not images.labelled.any()
    bare = images_of(flat_folder(tmp_path / "bare", range(3)), tmp_path)
    assert images.relabel(()).fingerprint == bare.fingerprint
    assert torch.equal(images.batch(torch.arange(3)), bare.batch(torch.arange(3)))
    mixed = Images.concat(images, images_of(source, tmp_path, ";"))
    assert mixed.labelled.tolist() == [False] * 3 + [True] * 3 and not mixed.targets[:3].any()


def test_images_of_one_label_and_of_several_are_not_joined(tmp_path):
    several = images_of(manifest(tmp_path / "data", ["a;b", "a"]), tmp_path, ";")
    one = images_of(class_folders(tmp_path / "folders", {"a": 1, "b": 1}, first_seed=9), tmp_path)
    with pytest.raises(ValueError, match="several labels and others one"):
        Images.concat(several, one)


def test_the_fingerprint_tells_other_labels_apart(tmp_path):
    found = {
        images_of(manifest(tmp_path / str(n), cells), tmp_path, ";").fingerprint
        for n, cells in enumerate((["a;b", "a"], ["a", "a;b"], ["b", "a;b"], ["a;b", ""]))
    }
    assert len(found) == 4


def test_an_image_that_goes_bad_is_replaced_by_one_that_shows_the_same(tmp_path):
    source = tmp_path / "data"
    cells = ["a;b", "a", "a;b", "b", "a"]
    for row in range(len(cells)):
        write(source / f"{row}.png", row, width=100, height=100)
    (source / "list.csv").write_text("path,label\n" + "".join(f"{r}.png,{cell}\n" for r, cell in enumerate(cells)))
    catalogue = open_catalogue(listed(source / "list.csv", ";"), tmp_path / "cache", pixels=98)
    images = Images.of(catalogue)
    row, other = ([images.where(r).endswith(f"/{n}.png") for r in range(5)].index(True) for n in (0, 2))
    (source / "0.png").write_bytes(b"")
    found = images.batch(torch.tensor([row, other]))
    assert torch.equal(found[0], found[1])


def test_copies_conflict_only_where_they_show_other_classes(tmp_path):
    source = manifest(tmp_path / "data", ["a;b", "b;a", "a;c", "", "a"])
    for row in (1, 2, 3):
        shutil.copy(tmp_path / "data" / "0.png", tmp_path / "data" / f"{row}.png")
    about = open_catalogue(listed(source, ";"), tmp_path / "cache", pixels=8).about
    assert (about["duplicates"], about["conflicts"]) == (3, 1)
    assert about["conflict_examples"] == [["0.png", "2.png", "a, b", "a, c"]]


def test_the_catalogue_keeps_codes_and_no_text_a_row(tmp_path):
    catalogue = open_catalogue(listed(manifest(tmp_path / "d", ["a;b", "a"]), ";"), tmp_path / "cache", pixels=8)
    assert catalogue.table["label"].type == pa.list_(pa.int32())


# ---- splits


SEVERAL = ["a;b", "a", "b;c", "c", "a;c", "b", "a;b;c", "c;b"] * 3


def test_one_class_map_holds_the_classes_of_all_sources(tmp_path):
    one = manifest(tmp_path / "one", ["dog;cat", "cat"])
    two = parquet(tmp_path / "two.parquet", pa.array([[], [], [], ["cat", "bird"]]))
    data = opened(tmp_path, {"train": Split(source=str(one), separator=";"), "probe": Split(source=str(two))})
    assert data.classes == ("bird", "cat", "dog")
    assert data.splits["probe"].per_class() == {"bird": 1, "cat": 1, "dog": 0}
    assert data.describe()["splits"]["train"]["per_class"] == {"bird": 0, "cat": 2, "dog": 1}
    assert any("train: 2 images, 2 classes, 1 (dog) to 2 (cat), 1.5 labels an image" in line for line in data.notices)
    assert any("cells are divided at ';'" in line for line in data.notices)


def test_draws_by_count_and_fraction_are_disjoint_and_pay_no_regard_to_classes(tmp_path):
    source = manifest(tmp_path / "data", SEVERAL)
    splits = {
        "labelled": Split(source=str(source), separator=";"),
        "test": Split(source="labelled", fraction=0.25),
        "holdout": Split(source="labelled", count=4),
    }
    data = opened(tmp_path, splits)
    sizes = {name: len(images) for name, images in data.splits.items()}
    assert sizes == {"labelled": 14, "test": 6, "holdout": 4}
    assert len({i for images in data.splits.values() for i in images.ids.tolist()}) == 24
    assert any("test: drawn without regard to classes" in line for line in data.notices)
    assert data.splits["test"].ids.tolist() == opened(tmp_path, splits).splits["test"].ids.tolist()
    assert data.splits["test"].ids.tolist() != opened(tmp_path, splits, seed=1).splits["test"].ids.tolist()
    assert all(images.several for images in data.splits.values())


@pytest.mark.parametrize(("option", "value"), [("per_class", 2), ("label_noise", 0.5)])
def test_what_needs_one_class_an_image_is_refused_in_a_line(tmp_path, option, value):
    source = manifest(tmp_path / "data", SEVERAL)
    with pytest.raises(UserError, match=rf"labelled: {option} is {value}, but images of .* may have several") as caught:
        opened(tmp_path, {"labelled": Split(source=str(source), separator=";", **{option: value})})
    assert "\n" not in str(caught.value)


def test_hidden_labels_make_no_classes_and_images_without_a_label_leave_labelled(tmp_path):
    source = manifest(tmp_path / "data", ["a;b", "", "b", "a"])
    data = opened(tmp_path, {
        "labelled": Split(source=str(source), separator=";"), "unlabelled": Split(source=str(source)),
        "pool": Split(source=str(source), labels=False),
    })  # fmt: skip
    assert {name: (len(i), i.several) for name, i in data.splits.items()} == {
        "labelled": (3, True), "unlabelled": (1, False), "pool": (4, False),
    }  # fmt: skip
    alone = opened(tmp_path, {"pool": Split(source=str(source), labels=False, separator=";")})
    assert alone.classes == () and not alone.splits["pool"].several


def test_a_class_that_only_test_shows_is_a_notice(tmp_path):
    one, two = manifest(tmp_path / "one", ["a;b", "a", "b"]), manifest(tmp_path / "two", ["a;x"] * 5)
    for row in range(5):
        write(tmp_path / "two" / f"{row}.png", 50 + row)
    data = opened(tmp_path, {"labelled": Split(source=str(one), separator=";"),
                             "test": Split(source=str(two), separator=";")})  # fmt: skip
    assert any("test: x is in no labelled image" in line for line in data.notices)


def test_one_class_and_images_without_it_are_a_set(tmp_path):
    source = parquet(tmp_path / "a.parquet", pa.array([["a"], [], ["a"]]))
    data = opened(tmp_path, {"labelled": Split(source=str(source))})
    assert data.splits["labelled"].per_class() == {"a": 2} and len(data.splits["labelled"]) == 3


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"a": Split(source="x", separator=";"), "b": Split(source="x", separator="|")}, "x is read with ';' in a"),
        ({"a": Split(source="x"), "b": Split(source="a", separator=";")}, "splits.b.separator = ';': belongs to a"),
    ],
)
def test_a_source_is_read_in_one_way(splits, message):
    with pytest.raises(ValueError) as caught:
        DataConfig(pixels=8, splits=splits)
    assert message in str(caught.value)


def test_an_unknown_separator_is_refused_also_the_empty_one_that_yaml_makes_of_a_bar():
    for mark in ("", "/"):
        with pytest.raises(ValueError) as caught:
            Split(source="x", separator=mark)
        assert f'separator = {mark!r}: must be "," or ";" or "|" or "none", in quotes' in str(caught.value)


def test_a_separator_where_no_text_can_be_divided_is_refused(tmp_path):
    folders = class_folders(tmp_path / "folders", {"a;b": 2, "c": 2})
    assert opened(tmp_path, {"labelled": Split(source=str(folders))}).classes == ("a;b", "c")
    bare = tmp_path / "folders" / "list.txt"
    bare.write_text("c/0.png\n")
    for source in (str(folders), str(bare), "digits/train"):
        with pytest.raises(UserError, match="separator is ';', but there is no label column of text to divide"):
            opened(tmp_path, {"train": Split(source=source, separator=";")})


def test_saved_splits_list_the_classes_of_every_image(tmp_path):
    several, one = manifest(tmp_path / "data", ["a;b", ""]), class_folders(tmp_path / "one", {"a": 1}, first_seed=9)
    data = opened(tmp_path, {"train": Split(source=str(several), separator=";"), "other": Split(source=str(one))})
    data.save(tmp_path / "saved")
    rows = pq.read_table(tmp_path / "saved" / "splits.parquet").to_pylist()
    found = sorted((row["split"], row["class"] or "", row["classes"] or []) for row in rows)
    assert found == [("other", "a", ["a"]), ("train", "", []), ("train", "", ["a", "b"])]


# ---- the doctor


def test_the_doctor_counts_an_image_in_each_of_its_classes(tmp_path):
    source = manifest(tmp_path / "data", SEVERAL + [""])
    (found,) = inspect([str(source)], separator=";").sources
    assert (found.usable, found.labelled, found.classes) == (25, 24, {"a": 12, "b": 15, "c": 15})
    assert found.labels_each == pytest.approx(42 / 24) and found.top_tenth == pytest.approx(15 / 42)
    report = inspect([str(source)], separator=";")
    text = "\n".join(report.lines)
    assert "24 have a label, 1.8 labels each on average" in text and "cells are divided at ';'" in text
    assert any("several labels an image: Probe's protocol svm judges by them" in line for line in report.advice)
    assert json.loads(json.dumps(report.json()))["sources"][0]["labels_each"] == pytest.approx(42 / 24)


def test_the_doctor_says_how_to_read_cells_that_look_like_several_labels(tmp_path):
    report = inspect([str(manifest(tmp_path / "data", SEVERAL))])
    assert any("which reads as several labels; if it is, give separator: ';'" in line for line in report.advice)
    with pytest.raises(UserError, match="separator '/': must be one of , ; | or none"):
        open_source(str(tmp_path / "data" / "list.csv"), tmp_path, separator="/")


# ---- one class an image stays what it was


def test_sets_of_one_class_an_image_keep_their_fingerprints(tmp_path):
    splits = {"labelled": Split(source="digits/train", per_class=6), "test": Split(source="digits/test")}
    data = open_data(DataConfig(pixels=16, splits=splits), tmp_path, seed=0)
    assert {name: images.fingerprint for name, images in data.splits.items()} == {
        "labelled": "fadc76dd86f4b5b21697122a310c1e7f096a84e8d1b863cc574730af4f163880",
        "test": "fe648de027e72aa39960d6f1fa63733d552bf1a1af83f98c37e1636329dc229a",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "4f6b3ee200915113223273ab-16-v1", "e659e40748a87edbb8ef1b6b-16-v1",
    }  # fmt: skip
    assert all(images.targets is None for images in data.splits.values())


def test_signatures_of_one_class_an_image_are_made_of_what_they_were(tmp_path):
    from orchestrator.data.sources import _signature

    source = manifest(tmp_path / "data", ["cat;dog", "bird", ""])
    stats = [(tmp_path / "data" / f"{row}.png").stat() for row in range(3)]
    assert listed(source).signature == _signature(
        "files", str(tmp_path / "data"), b"0.png\x001.png\x002.png",
        np.array([s.st_size for s in stats], np.int64).tobytes(),
        np.array([s.st_mtime_ns for s in stats], np.int64).tobytes(), "cat;dog\0bird\0",
    )  # fmt: skip
    shard = hugging_face(tmp_path / "a.parquet", range(2), [0, 1], ["x", "y"])
    stat = shard.stat()
    assert listed(shard).signature == _signature("parquet", str(shard), f"{stat.st_size} {stat.st_mtime_ns}")
