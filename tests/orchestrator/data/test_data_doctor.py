import json
import shutil

import pytest
from data_images import class_folders, data_folder, flat_folder, hugging_face, needs_data, write

from orchestrator.data.doctor import inspect


def test_report_counts_what_is_there(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 12, "dog": 24})
    write(data / "dog" / "wide.png", 99, width=40, height=20)
    (data / "cat" / "bad.png").write_bytes(b"")
    shutil.copy(data / "cat" / "0.png", data / "dog" / "same.png")
    report = inspect([str(data)])
    (source,) = report.sources
    assert (source.kind, source.images, source.usable, source.labelled) == ("class folders", 39, 37, 37)
    assert source.classes == {"cat": 12, "dog": 25}
    assert source.top_tenth == pytest.approx(25 / 37)
    assert (source.widths, source.heights) == ((12, 12, 40), (10, 10, 20))
    assert source.bad == [(f"{data}/cat/bad.png", "empty file")]
    assert (source.duplicates, source.conflicts) == (1, 1)
    text = "\n".join(report.lines)
    for line in ("12 to 40, median 12", "cat/bad.png   empty file", "dog/same.png (dog) is cat/0.png (cat)"):
        assert line in text
    assert any("mend or remove the 1 bad images (2.6%)" in line for line in report.advice)


def test_images_shared_by_two_folders_are_reported(tmp_path):
    train = class_folders(tmp_path / "train", {"cat": 12, "dog": 12})
    test = flat_folder(tmp_path / "test", [3, 50, 51])
    report = inspect([str(train), str(test)])
    (leak,) = report.leaks
    assert (leak.first, leak.second, leak.images) == (str(train), str(test), 1)
    assert leak.example == (f"{train}/cat/3.png", f"{test}/3.png")
    assert any("share 1 images" in line for line in report.advice)


def test_folder_of_splits_is_looked_at_split_by_split(tmp_path):
    hugging_face(tmp_path / "train-00000-of-00001.parquet", range(24), [0, 1] * 12, ["a", "b"])
    hugging_face(tmp_path / "test-00000-of-00001.parquet", [90], [0], ["a", "b"])
    report = inspect([str(tmp_path)])
    assert [source.images for source in report.sources] == [1, 24]
    assert any(f"{tmp_path}/test has no image of b, which {tmp_path}/train has" in line for line in report.advice)


def test_advice_on_small_and_uneven_classes(tmp_path):
    report = inspect([str(class_folders(tmp_path / "data", {"cat": 45, "dog": 3}))])
    assert any("dog has 3 images" in line for line in report.advice)
    assert any("cat has 15 times the images of dog" in line for line in report.advice)


def test_a_clean_folder_needs_nothing(tmp_path):
    report = inspect([str(class_folders(tmp_path / "data", {"cat": 12, "dog": 12}))])
    assert report.advice == []
    assert report.lines[-1] == "nothing to mend"


def test_a_source_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    report = inspect([str(tmp_path / "gone"), str(flat_folder(tmp_path / "data", range(3)))])
    assert "nothing is there" in report.sources[0].error
    assert report.sources[1].usable == 3


def test_many_classes_show_the_largest_and_smallest(tmp_path):
    counts = {f"c{number}": 1 for number in range(44)} | {"big": 3}
    lines = inspect([str(class_folders(tmp_path / "data", counts))]).lines
    assert any(line.split() == ["big", "3"] for line in lines)
    assert "    and 5 between" in lines


def test_json_holds_the_same_and_is_plain(tmp_path):
    report = inspect([str(class_folders(tmp_path / "data", {"cat": 2, "dog": 3}))])
    found = json.loads(json.dumps(report.json()))
    assert found["sources"][0]["classes"] == {"cat": 2, "dog": 3}
    assert found["advice"] == report.advice


@needs_data
def test_awkward_folder(tmp_path):
    (source,) = inspect([str(data_folder() / "awkward")]).sources
    assert source.images == 33
    assert len(source.bad) == 7
    assert source.images == source.usable + source.duplicates + len(source.bad)
