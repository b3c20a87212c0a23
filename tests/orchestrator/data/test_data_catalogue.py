import multiprocessing
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_images import class_folders, data_folder, encoded, flat_folder, hugging_face, needs_data, pixels, write
from PIL import Image

from orchestrator.data import catalogue as module
from orchestrator.data.catalogue import Catalogue, open_catalogue
from orchestrator.data.decode import content_id, decode_rgb, square
from orchestrator.data.images import Images
from orchestrator.data.sources import open_source
from orchestrator.errors import UserError


def catalogue_of(source: object, cache, *, pixels: int | None = 8, **options) -> Catalogue:
    return open_catalogue(open_source(str(source), cache), cache, pixels=pixels, **options)


def images_of(source: object, cache, *, pixels: int = 8, threads: int = 1) -> Images:
    return Images.of(catalogue_of(source, cache, pixels=pixels, threads=threads), threads=threads)


def expected(seed: int, side: int) -> np.ndarray:
    return square(Image.fromarray(pixels(seed)), side)


def seed_of(images: Images, row: int) -> int:
    return int(images.where(row).rsplit("/", 1)[-1].split(".")[0])


# ---- what is found


def test_rows_hold_id_size_and_reason(tmp_path):
    flat_folder(tmp_path / "data", range(2))
    (tmp_path / "data" / "zero.png").write_bytes(b"")
    catalogue = catalogue_of(tmp_path / "data", tmp_path)
    ids = {content_id(pixels(seed)).encode() for seed in range(2)}
    assert set(catalogue.ids(catalogue.kept)) == ids
    assert catalogue.sizes("width", catalogue.kept).tolist() == [12, 12]
    assert catalogue.bad() == [(f"{tmp_path}/data/zero.png", "empty file")]


def test_duplicates_are_kept_once_and_a_labelled_copy_wins(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 2, "dog": 2})
    write(data / "0-stray.png", 3)  # first in order, but without a label; dog/1.png is the same picture
    (data / "dog" / "copy.bmp").write_bytes(encoded(pixels(0), "BMP"))  # cat/0.png under another label
    images = images_of(data, tmp_path)
    about = images._catalogues[0].about
    assert len(images) == 4 and images.labelled.all()
    assert about["duplicates"] == 2
    assert about["conflicts"] == 1
    assert about["conflict_examples"] == [["cat/0.png", "dog/copy.bmp", "cat", "dog"]]


def test_an_image_behind_two_links_is_one_image(tmp_path):
    write(tmp_path / "far.png", 0)
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "far.png")
    assert len(images_of(tmp_path / "data", tmp_path)) == 1


# ---- reading


@pytest.mark.parametrize("side", [8, 97])  # held decoded; decoded when asked for
@pytest.mark.parametrize("kind", ["files", "parquet", "arrays"])
@pytest.mark.parametrize("threads", [1, 3])
def test_batch_gives_the_resized_picture_of_each_row(tmp_path, side, kind, threads):
    if kind == "arrays":
        images = images_of("digits/test", tmp_path, pixels=side, threads=threads)
        listing = open_source("digits/test", tmp_path)
        arrays = {content_id(a): square(Image.fromarray(a), side) for a in listing.items(0, 360)}
        rows = torch.tensor([3, 359, 3])
        want = np.stack([arrays[images.ids[row]] for row in rows.tolist()])
    else:
        if kind == "files":
            source = flat_folder(tmp_path / "data", range(70))
        else:
            source = hugging_face(tmp_path / "data.parquet", range(70), None, row_group_size=9)
        images = images_of(source, tmp_path, pixels=side, threads=threads)
        seeds = {content_id(pixels(seed)): seed for seed in range(70)}
        rows = torch.tensor([69, 0, 5, 5])
        want = np.stack([expected(seeds[images.ids[row]], side) for row in rows.tolist()])
    batch = images.batch(rows)
    assert batch.dtype == torch.uint8 and batch.is_contiguous()
    assert np.array_equal(batch.numpy(), want)


def test_batch_refuses_rows_that_do_not_exist(tmp_path):
    images = images_of(flat_folder(tmp_path / "data", range(3)), tmp_path)
    for row in (3, -1):
        with pytest.raises(IndexError):
            images.batch(torch.tensor([row]))


def test_empty_batch_has_the_shape_of_one(tmp_path):
    images = images_of(flat_folder(tmp_path / "data", range(3)), tmp_path)
    assert images.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_rows_are_in_the_order_of_ids_whatever_the_files_are_called(tmp_path):
    flat_folder(tmp_path / "one", [4, 5, 6])
    for name, seed in (("z", 4), ("a", 5), ("m", 6)):
        write(tmp_path / "two" / f"{name}.png", seed)
    one, two = images_of(tmp_path / "one", tmp_path), images_of(tmp_path / "two", tmp_path)
    assert one.ids.tolist() == two.ids.tolist() == sorted(one.ids)
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.batch(torch.arange(3)), two.batch(torch.arange(3)))


def test_concat_of_two_catalogues_reads_each_row_from_its_own(tmp_path):
    one = images_of(flat_folder(tmp_path / "one", range(3)), tmp_path)
    two = images_of(flat_folder(tmp_path / "two", range(3, 6)), tmp_path)
    both = Images.concat(one, two.select([2, 0]), one.select([1]))
    rows = torch.tensor([5, 4, 3, 0])
    want = [expected(seed_of(both, row), 8) for row in rows.tolist()]
    assert np.array_equal(both.batch(rows).numpy(), np.stack(want))
    assert both.ids.tolist() == [*one.ids, two.ids[2], two.ids[0], one.ids[1]]


def test_concat_of_other_sizes_is_refused(tmp_path):
    data = flat_folder(tmp_path / "data", range(3))
    with pytest.raises(ValueError, match="8 pixels and 0 classes at 9 pixels"):
        Images.concat(images_of(data, tmp_path), images_of(data, tmp_path, pixels=9))


def test_images_travel_between_processes_as_paths(tmp_path):
    images = images_of(flat_folder(tmp_path / "data", range(4)), tmp_path)
    images.batch(torch.tensor([0]))  # maps are open
    raw = pickle.dumps(images)
    again = pickle.loads(raw)
    assert len(raw) < 10_000
    assert torch.equal(again.batch(torch.arange(4)), images.batch(torch.arange(4)))
    assert again.fingerprint == images.fingerprint


# ---- labels


def test_labels_are_null_or_numbers_in_range(tmp_path):
    images = images_of(hugging_face(tmp_path / "a.parquet", range(4), [0, -1, None, 1], ["x", "y"]), tmp_path)
    names = {seed_in_text(images.where(row)): images.label[row] if images.labelled[row] else None for row in range(4)}
    assert names == {0: 0, 1: None, 2: None, 3: 1}
    assert images.label.min() == 0
    assert images.per_class() == {"x": 1, "y": 1}


def seed_in_text(text: str) -> int:
    return int(text.rsplit("(", 1)[1].split(".")[0])


def test_relabel_goes_by_name_and_drops_unknown_classes(tmp_path):
    images = images_of(class_folders(tmp_path / "data", {"cat": 1, "dog": 2}), tmp_path)
    assert images.relabel(("dog", "emu")).per_class() == {"dog": 2, "emu": 0}
    assert images.relabel(("dog", "emu")).labelled.sum() == 2
    assert images.without_labels().labelled.sum() == 0


def test_label_out_of_range_is_refused_with_its_path(tmp_path):
    images = images_of(class_folders(tmp_path / "data", {"cat": 1, "dog": 2}), tmp_path)
    with pytest.raises(ValueError, match=r"dog/\d\.png: label 1, but there are 1 classes"):
        images._with(classes=("cat",))


def test_fingerprint_depends_on_labels_classes_pixels_and_order(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 2, "dog": 2})
    images = images_of(data, tmp_path)
    others = [
        images.without_labels(),
        images.relabel(("cat", "emu")),
        images_of(data, tmp_path, pixels=9),
        images.select([0, 1, 2]),
        images.select([3, 2, 1, 0]),
    ]
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert images.select(np.ones(4, bool)).fingerprint == images.fingerprint


# ---- cache and faults


def count_looks(monkeypatch, stop_after: int | None = None) -> list[int]:
    """Count decoded items, and interrupt the scan after some."""
    looks: list[int] = []
    original = module._Scan._look

    def look(self, row, item, decoded):
        if stop_after is not None and len(looks) == stop_after:
            raise KeyboardInterrupt
        looks.append(row)
        return original(self, row, item, decoded)

    monkeypatch.setattr(module._Scan, "_look", look)
    return looks


def test_second_opening_decodes_nothing(tmp_path, monkeypatch):
    data = flat_folder(tmp_path / "data", range(3))
    first = images_of(data, tmp_path)
    looks = count_looks(monkeypatch)
    assert images_of(data, tmp_path).fingerprint == first.fingerprint
    assert looks == []
    write(data / "more.png", 9)
    assert len(images_of(data, tmp_path)) == 4


@pytest.mark.parametrize("side", [8, 97])
def test_interrupted_scan_goes_on_where_it_was(tmp_path, monkeypatch, side):
    monkeypatch.setattr("orchestrator.data.sources._ROWS_PER_BLOCK", 4)
    source = hugging_face(tmp_path / "a.parquet", range(12), None, row_group_size=2)
    with monkeypatch.context() as patch:
        count_looks(patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            images_of(source, tmp_path / "cache", pixels=side)
    looks = count_looks(monkeypatch)
    resumed = images_of(source, tmp_path / "cache", pixels=side)
    assert looks == list(range(4, 12))  # the first block of four was done
    fresh = images_of(source, tmp_path / "other", pixels=side)
    assert torch.equal(resumed.batch(torch.arange(12)), fresh.batch(torch.arange(12)))


def scan_in_process(source: str, cache: str, barrier) -> None:
    from pathlib import Path

    barrier.wait()
    images_of(source, Path(cache))


def test_two_scans_of_one_source_end_in_one_catalogue(tmp_path):
    source = flat_folder(tmp_path / "data", range(40))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    arguments = (str(source), str(tmp_path / "cache"), barrier)
    racers = [context.Process(target=scan_in_process, args=arguments) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert len([folder for folder in (tmp_path / "cache").iterdir()]) == 1
    images = images_of(source, tmp_path / "cache")
    want = [expected(seed_of(images, row), 8) for row in range(40)]
    assert np.array_equal(images.batch(torch.arange(40)).numpy(), np.stack(want))


def test_too_small_a_disk_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    looks = count_looks(monkeypatch)
    with pytest.raises(UserError, match="needs 0.0 GB for decoded images, 0.0 GB are free"):
        images_of(flat_folder(tmp_path / "data", range(3)), tmp_path)
    assert looks == []


def test_disk_that_fills_up_during_the_scan_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "pwrite", lambda file, data, offset: 0)
    with pytest.raises(UserError, match="the disk is full while scanning"):
        images_of(flat_folder(tmp_path / "data", range(3)), tmp_path)


def test_truncated_cache_is_named_instead_of_read(tmp_path):
    data = flat_folder(tmp_path / "data", range(3))
    catalogue = catalogue_of(data, tmp_path)
    (catalogue.folder / "pixels.u8").write_bytes(b"short")
    with pytest.raises(UserError, match=r"holds 5 bytes, needs 576: delete"):
        images_of(data, tmp_path).batch(torch.tensor([0]))


def test_image_that_goes_bad_later_is_replaced_by_one_of_its_class_and_counted(tmp_path):
    data = class_folders(tmp_path / "data", {"cat": 3, "dog": 3})
    images = images_of(data, tmp_path, pixels=97)
    row = next(row for row in range(6) if images.where(row).endswith("cat/1.png"))
    cats = [other for other in np.flatnonzero(images.label == images.label[row]) if other != row]
    (data / "cat" / "1.png").write_bytes(b"")
    batch = images.batch(torch.tensor([row, row]))
    stand_in = min(cats, key=lambda other: (other < row, other))  # the next in row order
    assert torch.equal(batch[0], images.batch(torch.tensor([stand_in]))[0])
    assert torch.equal(batch[0], batch[1])
    assert images.replaced == {row: "empty file"}


def test_images_that_are_all_gone_are_an_error_and_not_black(tmp_path):
    data = flat_folder(tmp_path / "data", range(3))
    images = images_of(data, tmp_path, pixels=97)
    for file in data.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="No such file or directory, and so for 3 images in a row"):
        images.batch(torch.tensor([0]))


def test_progress_ends_at_the_total(tmp_path):
    seen: list[tuple[str, int, int]] = []
    data = flat_folder(tmp_path / "data", range(5))
    catalogue_of(data, tmp_path, progress=lambda *step: seen.append(step))
    assert seen[-1] == (str(data), 5, 5)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_looking_only_keeps_no_pixels(tmp_path):
    catalogue = catalogue_of(flat_folder(tmp_path / "data", range(3)), tmp_path, pixels=None)
    assert [file.name for file in catalogue.folder.iterdir()] == ["catalogue.arrow"]


@needs_data
def test_stills_are_decoded_exactly_at_their_own_size(tmp_path):
    images = images_of(data_folder() / "stills96" / "train", tmp_path, pixels=96)
    cells = pq.read_table(data_folder() / "stills96" / "train-00000-of-00001.parquet")["image"].to_pylist()
    row_of = {identity: row for row, identity in enumerate(images.ids)}
    assert len(images) == 1000
    for cell in cells[::97]:
        rgb = decode_rgb(cell["bytes"])
        batch = images.batch(torch.tensor([row_of[content_id(rgb)]]))
        assert np.array_equal(batch[0].numpy(), rgb.transpose(2, 0, 1))
