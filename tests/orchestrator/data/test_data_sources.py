import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from data_images import class_folders, encoded, flat_folder, hugging_face, pixels, write
from PIL import Image

from orchestrator.data.decode import BadImage, decode_rgb
from orchestrator.data.labels import natural
from orchestrator.data.sources import Listing, open_source, parts_of
from orchestrator.errors import UserError


def listed(source: object, downloads: object = "unused") -> Listing:
    return open_source(str(source), Path(str(downloads)))


def names(listing: Listing) -> list[str]:
    return [os.fsdecode(path) for path in listing.path.to_pylist()]


def contents(listing: Listing) -> list[np.ndarray | str]:
    """Every item decoded, or the reason it is bad, block by block."""

    def one(item):
        if isinstance(item, str):
            with open(item, "rb") as file:
                item = file.read()
        return item if isinstance(item, np.ndarray) else str(item) if isinstance(item, BadImage) else decode_rgb(item)

    return [one(item) for start, stop in listing.blocks for item in listing.items(start, stop)]


# ---- folders


def test_first_folder_below_the_source_names_the_class(tmp_path):
    write(tmp_path / "cat" / "2021" / "a.png", 0)
    write(tmp_path / "dog" / "b.png", 1)
    listing = listed(tmp_path)
    assert (listing.kind, listing.classes) == ("class folders", ("cat", "dog"))
    label = dict(zip(names(listing), listing.label.to_pylist(), strict=True))
    assert label == {"cat/2021/a.png": "cat", "dog/b.png": "dog"}


def test_flat_folder_has_no_labels(tmp_path):
    listing = listed(flat_folder(tmp_path, range(3)))
    assert (listing.kind, listing.classes, listing.label.null_count) == ("flat folder", (), 3)


def test_classes_are_in_natural_order(tmp_path):
    assert listed(class_folders(tmp_path, {"10": 1, "9": 1, "1": 1})).classes == ("1", "9", "10")
    assert sorted(["b10", "b9", "a", "b"], key=natural) == ["a", "b", "b9", "b10"]


def test_images_beside_class_folders_have_no_label_and_are_reported(tmp_path):
    write(class_folders(tmp_path, {"cat": 1, "dog": 1}) / "stray.png", 9)
    listing = listed(tmp_path)
    assert listing.label.to_pylist() == ["cat", "dog", None]
    assert any("1 images beside the 2 class folders have no label" in notice for notice in listing.notices)


def test_hidden_and_system_files_are_no_classes_and_are_reported(tmp_path):
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    for junk in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "cat/._0.png", ".hidden.png", "dog/Thumbs.db"):
        write(tmp_path / junk, 50)
    listing = listed(tmp_path)
    assert (listing.classes, len(listing)) == (("cat", "dog"), 2)
    assert any("skipped 5 hidden or system files and folders" in notice for notice in listing.notices)


def test_own_store_inside_the_data_is_skipped(tmp_path):
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    write(tmp_path / "orchestrator-store" / "figure.png", 5)
    (tmp_path / "orchestrator-store" / ".orchestrator-store").touch()
    listing = listed(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert any("stores of this program" in notice for notice in listing.notices)


def test_other_files_are_counted_by_ending_and_upper_case_endings_are_found(tmp_path):
    write(tmp_path / "A.JPEG", 0)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    listing = listed(tmp_path)
    assert names(listing) == ["A.JPEG"]
    assert any("skipped 1 .mp4 files" in notice for notice in listing.notices)


def test_file_without_an_ending_is_judged_by_its_first_bytes(tmp_path):
    write(tmp_path / "0a1b2c", 0)
    (tmp_path / "README").write_text("hello")
    assert names(listed(tmp_path)) == ["0a1b2c"]


def test_links_are_followed_and_loops_are_not(tmp_path):
    class_folders(tmp_path / "far", {"cat": 2})
    data = class_folders(tmp_path / "data", {"dog": 1}, first_seed=9)
    (data / "cat").symlink_to(tmp_path / "far" / "cat")
    (data / "dog" / "up").symlink_to(data)
    (data / "dog" / "self.png").symlink_to(data / "dog" / "self.png")
    listing = listed(data)
    assert names(listing) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/self.png"]
    assert any("links back to a folder above them" in notice for notice in listing.notices)
    assert [item for item in contents(listing) if isinstance(item, str)] == [
        "link to nothing: Too many levels of symbolic links"
    ]


def test_dangling_link_is_a_bad_image(tmp_path):
    write(tmp_path / "a.png", 0)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert contents(listed(tmp_path))[1] == "link to nothing: No such file or directory"


def test_names_that_are_no_utf8_are_read(tmp_path):
    data = encoded(pixels(0))
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xff.png"), "wb") as file:
        file.write(data)
    write(tmp_path / "name with spaces – ünïcode 图像.png", 1)
    assert [item.shape for item in contents(listed(tmp_path))] == [(10, 12, 3)] * 2


def test_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no images; looked for .*\.jpg.*\.parquet.*found 1 \.txt files"):
        listed(tmp_path)


def test_missing_path_suggests_the_nearest_name(tmp_path):
    flat_folder(tmp_path / "photos", [0])
    with pytest.raises(UserError, match="nothing is there.*did you mean photos"):
        listed(tmp_path / "photo")


def test_folders_named_like_splits_are_not_taken_for_classes(tmp_path):
    class_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    class_folders(tmp_path / "test", {"cat": 1, "dog": 1})
    assert "folders are splits, not classes (test, train)" in listed(tmp_path).label_problem
    assert parts_of(str(tmp_path)) == [str(tmp_path / "test"), str(tmp_path / "train")]


def test_single_wrapping_folder_is_pointed_out(tmp_path):
    class_folders(tmp_path / "images", {"cat": 1, "dog": 1})
    assert f"give {tmp_path}/images" in listed(tmp_path).label_problem
    assert listed(class_folders(tmp_path / "other", {"cat": 2})).label_problem is None


def test_signature_changes_with_a_file_and_only_then(tmp_path):
    flat_folder(tmp_path, range(2))
    before = listed(tmp_path).signature
    assert listed(tmp_path).signature == before
    os.utime(tmp_path / "0.png", ns=(1, 1))
    assert listed(tmp_path).signature != before


def test_glob_lists_image_files_without_labels(tmp_path):
    class_folders(tmp_path, {"cat": 2, "dog": 1})
    listing = listed(f"{tmp_path}/*/*.png")
    assert (len(listing), listing.classes) == (3, ())
    with pytest.raises(UserError, match="matches 0 files"):
        listed(f"{tmp_path}/*.jpg")


def test_dangling_link_is_a_bad_image_of_a_glob_as_of_a_folder(tmp_path):
    write(tmp_path / "a.png", 0)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone.txt")
    folder = contents(listed(tmp_path))
    for pattern, notices in (("*.png", 0), ("*", 1)):
        listing = listed(f"{tmp_path}/{pattern}")
        assert contents(listing)[1] == folder[1] == "link to nothing: No such file or directory"
        assert len(listing) == 2 and len(listing.notices) == notices
    hugging_face(tmp_path / "data" / "b.parquet", [0], None)
    (tmp_path / "data" / "c.parquet").symlink_to(tmp_path / "gone.parquet")
    for source in (f"{tmp_path}/data/*.parquet", f"{tmp_path}/data"):
        with pytest.raises(UserError, match="c.parquet: cannot be read as Parquet"):
            listed(source)


# ---- manifests


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("a.csv", "path,label\n0.png,cat\n1.png,\n2.png,-1\n", ["cat", None, None]),
        ("a.csv", "\ufefffile_name,class\n0.png,01\n1.png,2\n2.png,01\n", ["01", "2", "01"]),
        ("a.csv", "0.png,cat\n1.png,dog\n2.png,dog\n", ["cat", "dog", "dog"]),
        ("a.csv", "path\n0.png\n1.png\n2.png\n", [None] * 3),
        ("a.csv", "0.png\n1.png\n2.png\n", [None] * 3),
        ("a.tsv", "label\tpath\ncat\t0.png\ndog\t1.png\n\t2.png\n", ["cat", "dog", None]),
        ("a.txt", "0.png\n1.png\n\n2.png\n", [None] * 3),
        ("a.txt", "path,label\n0.png,cat\n1.png,cat\n2.png,dog\n", ["cat", "cat", "dog"]),
        ("a.csv", "\r\n  \r\npath,label\r\n0.png,cat\r\n1.png,cat\r\n2.png,dog", ["cat", "cat", "dog"]),
        ("a.tsv", "\n\tpath\tlabel\n0\t0.png\tcat\n1\t1.png\tcat\n2\t2.png\tdog\n", ["cat", "cat", "dog"]),
        ("a.csv", "path,label,,\n0.png,cat,,\n1.png,,,\n2.png,dog,,\n", ["cat", None, "dog"]),
    ],
)
def test_manifest_gives_paths_beside_it_and_labels(tmp_path, name, text, labels):
    flat_folder(tmp_path, range(3))
    (tmp_path / name).write_text(text, encoding="utf-8")
    listing = listed(tmp_path / name)
    assert listing.label.to_pylist() == labels
    assert listing.label_problem is None
    assert all(np.array_equal(item, pixels(seed)) for seed, item in enumerate(contents(listing)))


def test_plain_list_keeps_names_with_commas_and_spaces(tmp_path):
    write(tmp_path / "a, b.png", 0)
    (tmp_path / "list.txt").write_text("a, b.png\n")
    assert names(listed(tmp_path / "list.txt")) == ["a, b.png"]


def test_missing_file_of_a_manifest_is_a_bad_image(tmp_path):
    flat_folder(tmp_path, [0])
    (tmp_path / "a.csv").write_text("path\n0.png\ngone.png\n")
    assert contents(listed(tmp_path / "a.csv"))[1] == "listed in a.csv: No such file or directory"


def test_cell_with_several_labels_is_refused_with_its_row(tmp_path):
    flat_folder(tmp_path, range(2))
    (tmp_path / "a.csv").write_text('path,label\n0.png,cat\n1.png,"cat,dog"\n')
    listing = listed(tmp_path / "a.csv")
    assert "row 1 has the label 'cat,dog', which reads as several labels" in listing.label_problem
    assert listing.label.null_count == 2  # so that it is no class by accident


def test_manifest_may_be_parquet(tmp_path):
    flat_folder(tmp_path, range(2))
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": ["b", "a"]}), tmp_path / "list.parquet")
    listing = listed(tmp_path / "list.parquet")
    assert (listing.kind, listing.label.to_pylist()) == ("manifest", ["b", "a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("name,size\nx,3\n", "columns name, size: none is named path"),
        ("path,label\n0.png,cat\n,dog\n", "1 rows have an empty path"),
        ("path,label\n0.png,cat,extra\n", "not a table of 2 columns"),
        ("path,label,label\n0.png,cat,dog\n", "has 2 columns named label; rename or remove all but one"),
        ("path,Label,label\n0.png,cat,dog\n", "has 2 columns named label"),
        ("path,Path\n0.png,0.png\n", "has 2 columns named path"),
        ("path,label", "has a column path and no rows"),
        ("\npath,label\n\n", "has a column path and no rows"),
        ("path,label\n0.png,cat\n1\0.png,cat\n", "the path of row 1 holds a zero byte"),
    ],
)
def test_broken_manifest_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        listed(tmp_path / "a.csv")
    assert message in str(caught.value)
    assert str(tmp_path / "a.csv") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0.png\n1\0.png\n", "a.txt: the path of row 1 holds a zero byte"),
        ("0.png\n".encode("utf-16"), "a.txt: is UTF-16 text; save it as UTF-8"),
    ],
)
def test_plain_list_that_names_no_files_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        listed(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": pa.array([], pa.string())}, "has a column path and no rows"),
        ({"file": ["0.png", None, ""]}, "2 rows have an empty file; every row needs one"),
        ({"path": ["0.png", "1\0.png"]}, "the path of row 1 holds a zero byte"),
        ({"path": [["0.png"]]}, "column path is of type list"),
        ({"path": ["0.png"], "label": ["cat"], "also": ["dog"]}, "has 2 columns named label"),
    ],
)
def test_broken_parquet_of_paths_is_refused_in_one_line(tmp_path, columns, message):
    table = pa.table(columns)
    pq.write_table(table.rename_columns([name.replace("also", "label") for name in columns]), tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        listed(tmp_path / "a.parquet")
    assert message in str(caught.value) and str(tmp_path / "a.parquet") in str(caught.value)


# ---- Parquet


def test_shards_are_one_source_with_names_from_the_metadata(tmp_path):
    hugging_face(tmp_path / "train-00000-of-00002.parquet", range(3), [1, 0, 1], ["zebra", "ant"], row_group_size=2)
    hugging_face(tmp_path / "train-00001-of-00002.parquet", range(3, 5), [0, 1], ["zebra", "ant"])
    hugging_face(tmp_path / "test-00000-of-00001.parquet", [9], [0], ["zebra", "ant"])
    listing = listed(tmp_path / "train")
    assert listing.classes == ("zebra", "ant")  # the declared order, not the alphabet's
    assert listing.label.to_pylist() == ["ant", "zebra", "ant", "zebra", "ant"]
    assert all(np.array_equal(item, pixels(seed)) for seed, item in enumerate(contents(listing)))
    assert listing.name(3) == "train-00001-of-00002.parquet row 0 (3.png)"


def test_folder_of_several_parquet_splits_asks_for_one(tmp_path):
    for name in ("train", "test"):
        hugging_face(tmp_path / f"{name}-00000-of-00001.parquet", [0], [0])
    with pytest.raises(UserError, match=f"holds the Parquet splits test, train; name one, such as {tmp_path}/test"):
        listed(tmp_path)
    assert parts_of(str(tmp_path)) == [str(tmp_path / "test"), str(tmp_path / "train")]
    with pytest.raises(UserError, match="did you mean test"):
        listed(tmp_path / "tests")


@pytest.mark.parametrize("source", ["", "/part-0.parquet", "/*.parquet"])
def test_plain_folder_a_file_and_a_glob_of_parquet(tmp_path, source):
    hugging_face(tmp_path / "part-0.parquet", range(2), None)
    assert (len(listed(f"{tmp_path}{source}")), listed(f"{tmp_path}{source}").classes) == (2, ())


def test_missing_shard_is_noticed(tmp_path):
    for number in (0, 2):
        hugging_face(tmp_path / f"train-0000{number}-of-00003.parquet", [number], None)
    for source in (tmp_path, tmp_path / "train"):
        with pytest.raises(UserError, match=r"2 of 3 files train-\*\.parquet are there"):
            listed(source)


def test_hub_layout_with_a_data_folder(tmp_path):
    hugging_face(tmp_path / "data" / "train-00000-of-00001.parquet", [0], [0])
    hugging_face(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 2], [0, 0])
    assert len(listed(tmp_path / "test")) == 2


def test_null_and_minus_one_are_no_label(tmp_path):
    listing = listed(hugging_face(tmp_path / "a.parquet", range(4), [0, -1, None, 1], ["x", "y"]))
    assert listing.label.to_pylist() == ["x", None, None, "y"]


def test_numbers_without_names_are_classes_in_numeric_order(tmp_path):
    listing = listed(hugging_face(tmp_path / "a.parquet", range(3), [10, 2, 1_000_000_000]))
    assert listing.classes == ("2", "10", "1000000000")


def test_class_names_without_an_image_are_no_classes(tmp_path):
    listing = listed(hugging_face(tmp_path / "a.parquet", range(2), [2, 0], ["a", "b", "c"]))
    assert (listing.classes, listing.label.to_pylist()) == (("a", "c"), ["c", "a"])


def test_label_beyond_the_names_is_reported_with_its_row(tmp_path):
    listing = listed(hugging_face(tmp_path / "a.parquet", range(3), [0, 5, 1], ["x", "y"]))
    assert "row 1 has the label 5, but names end at 1" in listing.label_problem


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (pa.array([[True], [False]]), "lists of labels of type bool"),
        (pa.array([[0.5], [1.0]]), "lists of labels of type double"),
        (pa.array([0.5, 1.0]), "fractions such as 0.5"),
        (pa.array([True, False]), "labels of type bool"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, problem):
    image = [encoded(pixels(seed)) for seed in range(2)]
    pq.write_table(pa.table({"image": image, "label": labels}), tmp_path / "a.parquet")
    assert problem in listed(tmp_path / "a.parquet").label_problem


def test_binary_column_and_labels_with_gaps_as_pandas_writes_them(tmp_path):
    image = [encoded(pixels(seed)) for seed in range(2)]
    pq.write_table(pa.table({"img": image, "label": pa.array([1.0, float("nan")])}), tmp_path / "a.parquet")
    listing = listed(tmp_path / "a.parquet")
    assert listing.label.to_pylist() == ["1", None]
    assert np.array_equal(contents(listing)[1], pixels(1))


def test_row_may_name_a_file_instead_of_holding_bytes(tmp_path):
    write(tmp_path / "x" / "a.png", 3)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": path} for path in ("x/a.png", None, "x\0.png")]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    found = contents(listed(tmp_path / "a.parquet"))
    assert np.array_equal(found[0], pixels(3))
    assert found[1] == "the row holds no image"
    assert "only the name" in found[2]


def test_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "train-0.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"train-0\.parquet: cannot be read as Parquet"):
        listed(tmp_path / "train")


# ---- data sets by name


def test_digits_are_split_once_and_for_all():
    train, test = listed("digits/train"), listed("digits/test")
    assert (len(train), len(test)) == (1437, 360)
    assert not set(names(train)) & set(names(test))
    assert train.classes == test.classes == tuple("0123456789")
    per_class = [test.label.to_pylist().count(name) for name in test.classes]
    assert min(per_class) >= 34 and max(per_class) <= 37
    image = contents(test)[0]
    assert image.shape == (8, 8, 3) and image.max() == 255


class FakeDataset:
    """Has the surface of torchvision's classification data sets."""

    classes = ["ant", ("bee", "apis")]

    def __init__(self, root, train=True, download=False):
        self.targets = [0, 1, 1] if train else [1]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        return Image.fromarray(pixels(row)), self.targets[row]


def test_torchvision_data_set_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Insects", FakeDataset, raising=False)
    listing = listed("torchvision:Insects/train", tmp_path)
    assert listing.label.to_pylist() == ["ant", "bee", "bee"]
    assert np.array_equal(contents(listing)[2], pixels(2))
    assert len(listed("torchvision:Insects/test", tmp_path)) == 1


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offline)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(UserError) as caught:
        listed("torchvision:CIFAR10/train", tmp_path)
    assert "could not be fetched (<urlopen error no route to host>)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_torchvision_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="no data set CIFAR11; did you mean CIFAR10"):
        listed("torchvision:CIFAR11/train", tmp_path)
