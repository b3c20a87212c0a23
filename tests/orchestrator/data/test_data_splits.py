import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_images import class_folders, data_folder, flat_folder, hugging_face, needs_data, pixels, write
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.decode import content_id
from orchestrator.data.splits import Data, DataConfig, Split, _apportion, open_data
from orchestrator.errors import UserError


def opened(tmp_path, splits: dict[str, Split], *, seed: int = 0, **options) -> Data:
    return open_data(DataConfig(pixels=8, splits=splits, **options), tmp_path / "cache", seed=seed)


def ids(data: Data, name: str) -> set[str]:
    found = data.splits[name].ids.tolist()
    assert len(found) == len(set(found))
    return set(found)


def noticed(data: Data, text: str) -> bool:
    return any(text in notice for notice in data.notices)


# ---- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "per_class = 0: must be at least 1"),
        ({"count": -1}, "count = -1: must be at least 1"),
        ({"fraction": 1.0}, "fraction = 1.0: must be above 0 and below 1"),
        ({"per_class": 3, "count": 5}, "count = 5: must be left out, per_class is given already"),
        ({"label_noise": 1.5}, "label_noise = 1.5: must be in [0, 1]"),
        ({"label_noise": 0.5, "labels": False}, "label_noise = 0.5: must be left out where labels are hidden"),
        ({"per_class": 3, "labels": False}, "per_class = 3: must be left out where labels are hidden"),
    ],
)
def test_split_refuses_bad_values_by_name(options, message):
    with pytest.raises(ValueError) as caught:
        Split(source="x", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": 0}, "pixels = 0: must be between 1 and 4096"),
        ({"max_bad_share": 2.0}, "max_bad_share = 2.0: must be between 0 and 1"),
        ({"on_bad_image": "skp"}, "on_bad_image = 'skp': must be skip or fail"),
        ({"splits": {}}, "splits = {}: must name at least one split"),
        ({"splits": {"a": Split(source="x", without=("bb",)), "b": Split(source="x")}}, "did you mean b"),
        ({"splits": {"a": Split(source="b"), "b": Split(source="a")}}, "must not be made from each other in a circle"),
        ({"splits": {"test": Split(source="x", label_noise=0.1)}}, "test.label_noise = 0.1: must be left out"),
        ({"splits": {"unlabelled": Split(source="x", per_class=3)}}, "unlabelled.per_class = 3: must be left out"),
    ],
)
def test_config_refuses_bad_values_by_name(options, message):
    with pytest.raises(ValueError) as caught:
        DataConfig(**{"pixels": 8, "splits": {"train": Split(source="x")}, **options})
    assert message in str(caught.value)


# ---- draws


def test_per_class_draws_exactly_that_many_of_each(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 9, "dog": 5, "emu": 7})
    split = opened(tmp_path, {"labelled": Split(source=str(data), per_class=4)}).splits["labelled"]
    assert split.per_class() == {"cat": 4, "dog": 4, "emu": 4}


def test_too_small_a_class_is_named_with_its_count(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 9, "dog": 5})
    with pytest.raises(UserError) as caught:
        opened(tmp_path, {"labelled": Split(source=str(data), per_class=6)})
    assert "labelled: per_class is 6, but in" in str(caught.value)
    assert "dog has 5; lower per_class to 5, or add images" in str(caught.value)


def test_fraction_is_stratified_and_rounds_to_the_whole(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 30, "dog": 15, "emu": 5})
    split = opened(tmp_path, {"labelled": Split(source=str(data), fraction=0.3)}).splits["labelled"]
    assert len(split) == 15  # quotas 9, 4.5 and 1.5: the tie goes to the larger class
    assert split.per_class() == {"cat": 9, "dog": 5, "emu": 1}


def test_a_split_whose_images_are_all_in_test_is_told_so(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 6, "dog": 6})
    splits = {"labelled": Split(source=str(data)), "holdout": Split(source="labelled", fraction=0.1),
              "test": Split(source=str(data))}  # fmt: skip
    with pytest.raises(UserError, match="holdout: .* has 0 to draw from; what is in test or another split is left out"):
        opened(tmp_path, splits)


def test_count_beyond_the_source_says_what_there_is(tmp_path):
    data = flat_folder(tmp_path / "data", range(4))
    with pytest.raises(UserError, match="count is 5, but .* has 4 to draw from"):
        opened(tmp_path, {"unlabelled": Split(source=str(data), count=5)})


@given(share=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(lambda share: sum(share) > 0), data=st.data())
def test_apportioning_keeps_the_total_and_the_limits(share, data):
    share = np.array(share)
    most = np.array([data.draw(st.integers(0, int(n))) for n in share])
    total = data.draw(st.integers(0, int(most.sum())))
    given_out = _apportion(share, total, most)
    assert given_out.sum() == total
    assert (given_out <= most).all() and (given_out >= 0).all()


def test_apportioning_by_hand():
    share = np.array([1000, 1200])
    assert _apportion(share, 2200, share).tolist() == [1000, 1200]  # none is lost to rounding
    assert _apportion(np.array([3, 1]), 2, np.array([3, 1])).tolist() == [2, 0]


def test_draws_depend_on_content_and_seed_alone(tmp_path):
    class_folders(tmp_path / "one", {"cat": 20, "dog": 20})
    for row, name in enumerate(["dog"] * 20 + ["cat"] * 20):  # the same pictures under other names, in another order
        seed = row - 20 if name == "cat" else row + 20
        write(tmp_path / "two" / name / "deep" / f"{999 - row}.png", seed)
    splits = [
        opened(tmp_path, {"labelled": Split(source=str(tmp_path / name), per_class=5)}, seed=seed).splits["labelled"]
        for name, seed in (("one", 0), ("two", 0), ("one", 1))
    ]
    assert splits[0].fingerprint == splits[1].fingerprint
    assert set(splits[0].ids) != set(splits[2].ids)


def test_raising_per_class_keeps_what_was_drawn(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 20, "dog": 20})
    few, more = (ids(opened(tmp_path, {"labelled": Split(source=str(data), per_class=n)}), "labelled") for n in (3, 9))
    assert few < more


def test_unlabelled_draw_does_not_look_at_labels(tmp_path):
    shown = class_folders(tmp_path / "shown", {"cat": 20, "dog": 20})
    hidden = flat_folder(tmp_path / "hidden", range(40))
    first, second = (
        ids(opened(tmp_path, {"unlabelled": Split(source=str(source), count=10)}), "unlabelled")
        for source in (shown, hidden)
    )
    assert first == second


# ---- splits of splits


def test_holdout_is_taken_out_of_the_split_it_is_drawn_from(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 10, "dog": 10})
    data = opened(
        tmp_path,
        {
            "labelled": Split(source=str(source)),
            "holdout": Split(source="labelled", fraction=0.2),
            "test": Split(source="labelled", fraction=0.2),
        },
    )
    parts = [ids(data, name) for name in ("labelled", "holdout", "test")]
    assert [len(part) for part in parts] == [12, 4, 4]  # both fractions are of all 20
    assert len(set.union(*parts)) == 20
    assert data.splits["test"].per_class() == {"cat": 2, "dog": 2}
    assert not noticed(data, "leak")


def test_a_class_keeps_an_image_where_a_fraction_is_drawn(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 10, "dog": 1})
    splits = {"labelled": Split(source=str(source)), "holdout": Split(source="labelled", fraction=0.5)}
    data = opened(tmp_path, splits)
    assert data.splits["labelled"].per_class()["dog"] == 1
    assert noticed(data, "holdout: no image of dog")


def test_labelled_and_unlabelled_of_one_pool_are_disjoint_and_lose_nothing(tmp_path):
    pool = class_folders(tmp_path / "pool", {"cat": 10, "dog": 12})
    data = opened(
        tmp_path,
        {
            "pool": Split(source=str(pool)),
            "labelled": Split(source="pool", per_class=3),
            "unlabelled": Split(source="pool", labels=False),
        },
    )
    assert not ids(data, "labelled") & ids(data, "unlabelled")
    assert len(ids(data, "labelled") | ids(data, "unlabelled")) == 22
    assert ids(data, "pool") == ids(data, "unlabelled")  # what was drawn is taken out
    assert not data.splits["unlabelled"].labelled.any()
    assert noticed(data, "include_labelled is false")


def test_unlabelled_keeps_the_labelled_images_when_asked(tmp_path):
    pool = class_folders(tmp_path / "pool", {"cat": 5, "dog": 5})
    splits = {
        "labelled": Split(source=str(pool), per_class=2),
        "unlabelled": Split(source=str(pool)),
        "test": Split(source="labelled", fraction=0.25),
    }
    data = opened(tmp_path, splits, include_labelled=True)
    assert ids(data, "labelled") < ids(data, "unlabelled")
    assert not ids(data, "test") & ids(data, "unlabelled")
    assert noticed(data, "unlabelled keeps the images that are in labelled too")


def test_without_leaves_out_another_split(tmp_path):
    pool = class_folders(tmp_path / "pool", {"cat": 6, "dog": 6})
    splits = {"probe": Split(source=str(pool), per_class=2), "train": Split(source=str(pool), without=("probe",))}
    data = opened(tmp_path, splits)
    assert (len(ids(data, "train")), ids(data, "train") & ids(data, "probe")) == (8, set())


# ---- leaks


def test_test_image_inside_other_splits_is_excluded_and_reported(tmp_path):
    class_folders(tmp_path / "labelled", {"cat": 4, "dog": 4})  # seeds 0 to 7
    write(tmp_path / "test" / "cat" / "copy.png", 1)
    write(tmp_path / "test" / "dog" / "new.png", 100)
    flat_folder(tmp_path / "unlabelled", [100, 101, 102])
    data = opened(tmp_path, {name: Split(source=str(tmp_path / name)) for name in ("labelled", "unlabelled", "test")})
    test = {content_id(pixels(1)), content_id(pixels(100))}
    assert ids(data, "test") == test
    assert (len(ids(data, "labelled")), len(ids(data, "unlabelled"))) == (7, 2)
    assert noticed(data, "leak: 1 images of test were also in labelled, such as ")
    assert noticed(data, "leak: 1 images of test were also in unlabelled, such as ")


def test_leak_is_removed_before_drawing_so_that_counts_hold(tmp_path):
    class_folders(tmp_path / "labelled", {"cat": 5, "dog": 5})
    write(tmp_path / "test" / "cat" / "copy.png", 1)
    splits = {
        "labelled": Split(source=str(tmp_path / "labelled"), per_class=4),
        "test": Split(source=str(tmp_path / "test")),
    }
    assert opened(tmp_path, splits).splits["labelled"].per_class() == {"cat": 4, "dog": 4}


def test_image_in_test_and_holdout_stays_in_test(tmp_path):
    for name, first in (("labelled", 0), ("holdout", 20), ("test", 22)):
        class_folders(tmp_path / name, {"cat": 2, "dog": 2}, first_seed=first)  # seeds 22 and 23 are in both
    data = opened(tmp_path, {name: Split(source=str(tmp_path / name)) for name in ("labelled", "holdout", "test")})
    assert (len(ids(data, "test")), len(ids(data, "holdout"))) == (4, 2)


def test_holdout_drawn_late_is_still_in_no_other_split(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 10, "dog": 10})
    data = opened(
        tmp_path,
        {
            "train": Split(source=str(source)),
            "labelled": Split(source=str(source)),
            "holdout": Split(source="train", count=4),
        },
    )
    assert len(ids(data, "holdout")) == 4
    assert len(ids(data, "labelled")) == len(ids(data, "train")) == 16
    assert not ids(data, "holdout") & (ids(data, "labelled") | ids(data, "train"))


# ---- labels and classes


def test_one_class_map_by_name_for_all_splits(tmp_path):
    class_folders(tmp_path / "labelled", {"ant": 2, "bee": 2, "cat": 2})
    test = hugging_face(tmp_path / "test.parquet", [50, 51], [0, 1], ["cat", "bee"])
    data = opened(tmp_path, {"labelled": Split(source=str(tmp_path / "labelled")), "test": Split(source=str(test))})
    assert data.classes == ("ant", "bee", "cat")
    assert data.splits["test"].per_class() == {"ant": 0, "bee": 1, "cat": 1}
    assert noticed(data, "test: no image of ant")
    assert noticed(data, "classes: ant, bee, cat")


def test_declared_class_order_is_kept(tmp_path):
    source = hugging_face(tmp_path / "a.parquet", range(4), [0, 1, 2, 0], ["tench", "church", "ball"])
    assert opened(tmp_path, {"labelled": Split(source=str(source))}).classes == ("tench", "church", "ball")


def test_class_of_test_that_labelled_lacks_is_refused(tmp_path):
    class_folders(tmp_path / "labelled", {"cats": 2, "dogs": 2})
    class_folders(tmp_path / "test", {"cats": 1, "dog": 3}, first_seed=50)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, {name: Split(source=str(tmp_path / name)) for name in ("labelled", "test")})
    message = "test: class 'dog' (3 images) is not in labelled, which has cats, dogs; did you mean dogs"
    assert message in str(caught.value)


def test_one_class_is_refused(tmp_path):
    source = hugging_face(tmp_path / "a.parquet", range(3), [0, 0, 0], ["cat"])
    with pytest.raises(UserError, match=r"labelled: one class only \(cat\)"):
        opened(tmp_path, {"labelled": Split(source=str(source))})


def test_labelled_without_any_label_says_what_is_needed(tmp_path):
    source = flat_folder(tmp_path / "flat", range(3))
    with pytest.raises(UserError, match="none of the 3 images of .* has a label; class folders"):
        opened(tmp_path, {"labelled": Split(source=str(source))})


def test_images_without_a_label_leave_labelled_and_stay_elsewhere(tmp_path):
    source = hugging_face(tmp_path / "a.parquet", range(5), [0, 1, None, -1, 0], ["x", "y"])
    data = opened(tmp_path, {"labelled": Split(source=str(source)), "train": Split(source=str(source))})
    assert (len(ids(data, "labelled")), len(ids(data, "train"))) == (3, 5)
    assert data.splits["train"].labelled.sum() == 3
    assert noticed(data, "labelled: 2 images of")


def test_several_labels_in_a_cell_stop_labelled_but_not_unlabelled(tmp_path):
    flat_folder(tmp_path, range(2))
    (tmp_path / "a.csv").write_text('path,label\n0.png,cat\n1.png,"cat,dog"\n')
    with pytest.raises(UserError, match="reads as several labels"):
        opened(tmp_path, {"labelled": Split(source=str(tmp_path / "a.csv"))})
    data = opened(tmp_path, {"unlabelled": Split(source=str(tmp_path / "a.csv"))})
    assert (len(ids(data, "unlabelled")), data.classes) == (2, ())
    assert noticed(data, "its labels are not read")


def test_class_folders_of_unlabelled_are_no_classes(tmp_path):
    class_folders(tmp_path / "labelled", {"cat": 2, "dog": 2})
    class_folders(tmp_path / "unlabelled", {"2021": 3, "2022": 3}, first_seed=50)
    data = opened(tmp_path, {name: Split(source=str(tmp_path / name)) for name in ("labelled", "unlabelled")})
    assert data.classes == ("cat", "dog")
    assert not data.splits["unlabelled"].labelled.any()


# ---- bad images


def test_bad_images_are_left_out_counted_and_listed(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 20, "dog": 20})
    (source / "cat" / "bad.png").write_text("<html>")
    data = opened(tmp_path, {"labelled": Split(source=str(source))})
    assert len(ids(data, "labelled")) == 40
    assert data.quarantine == [(f"{source}/cat/bad.png", "not an image: text that begins '<html>'")]
    assert noticed(data, "1 images cannot be used and are left out, such as")


def test_more_than_the_allowed_share_stops_with_the_list(tmp_path):
    source = flat_folder(tmp_path / "data", range(9))
    (source / "bad.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, {"unlabelled": Split(source=str(source))})
    assert "1 of 10 images (10.0%) cannot be used, and max_bad_share allows 5.0%" in str(caught.value)
    assert f"{source}/bad.png   empty file" in str(caught.value)
    assert len(ids(opened(tmp_path, {"unlabelled": Split(source=str(source))}, max_bad_share=0.1), "unlabelled")) == 9


def test_on_bad_image_fail_stops_at_the_first(tmp_path):
    source = flat_folder(tmp_path / "data", range(99))
    (source / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 100 images .* on_bad_image is fail"):
        opened(tmp_path, {"unlabelled": Split(source=str(source))}, on_bad_image="fail")


def test_duplicates_with_two_labels_are_reported(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 3, "dog": 3})
    shutil.copy(source / "cat" / "0.png", source / "dog" / "same.png")
    data = opened(tmp_path, {"labelled": Split(source=str(source))})
    assert len(ids(data, "labelled")) == 6
    assert noticed(data, "1 exact duplicates are left out")
    assert noticed(data, "dog/same.png (dog; kept cat/0.png, cat): correct the labels")


def test_split_that_ends_up_empty_is_named(tmp_path):
    class_folders(tmp_path / "data", {"cat": 2, "dog": 2})
    splits = {name: Split(source=str(tmp_path / "data")) for name in ("labelled", "test")}
    with pytest.raises(UserError, match="labelled: no image of .* is left"):
        opened(tmp_path, splits)


# ---- what is kept


def test_label_noise_leaves_the_share_of_right_labels_that_a_uniform_draw_gives(tmp_path):
    def labels(noise, seed=0):
        data = opened(tmp_path, {"labelled": Split(source="digits/train", label_noise=noise)}, seed=seed)
        return data, data.splits["labelled"].label

    clean = labels(0.0)[1]
    data, half = labels(0.5)
    share = (half == clean).mean()
    assert share == pytest.approx(0.55, abs=3 * (0.55 * 0.45 / len(clean)) ** 0.5)  # 1 - p + p / K
    assert noticed(data, "labels are wrong on purpose")
    more = labels(0.75)[1]
    assert (more[half != clean] == half[half != clean]).all()  # a greater share adds to a smaller one
    assert (labels(0.5)[1] == half).all() and (labels(0.5, seed=1)[1] != half).any()
    assert set(np.unique(labels(1.0)[1])) == set(range(10))


def test_saved_splits_hold_every_image_once_with_its_class(tmp_path):
    source = class_folders(tmp_path / "data", {"cat": 4, "dog": 4})
    splits = {"labelled": Split(source=str(source), per_class=2), "unlabelled": Split(source=str(source))}
    data = opened(tmp_path, splits)
    data.save(tmp_path / "saved")
    rows = pq.read_table(tmp_path / "saved" / "splits.parquet").to_pylist()
    assert {row["id"] for row in rows} == {content_id(pixels(seed)) for seed in range(8)}
    assert [row["class"] for row in rows if row["split"] == "unlabelled"] == [None] * 4
    described = json.loads((tmp_path / "saved" / "data.json").read_text())
    assert described == data.describe()
    assert described["splits"]["labelled"]["per_class"] == {"cat": 2, "dog": 2}


def test_digits_need_no_files(tmp_path):
    splits = {"labelled": Split(source="digits/train", per_class=10), "test": Split(source="digits/test")}
    data = opened(tmp_path, splits)
    assert (len(ids(data, "labelled")), len(ids(data, "test")), len(data.classes)) == (100, 360, 10)
    batch = data.splits["test"].batch(torch.arange(360))
    assert torch.equal(batch[:, 0], batch[:, 2])  # grey
    assert batch.max() == 255


@needs_data
def test_cifar10_splits(tmp_path):
    folder = data_folder() / "cifar10"
    splits = {"test": Split(source=str(folder / "test")), "probe": Split(source="test", per_class=25)}
    data = open_data(DataConfig(pixels=32, splits=splits), tmp_path, seed=0, threads=2)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert set(data.splits["probe"].per_class().values()) == {25}
    assert len(ids(data, "test") | ids(data, "probe")) == len(data.splits["test"]) + 250
