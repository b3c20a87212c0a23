"""Streamed Parquet shards: the same images, in an order that reads each row group once, within a stated memory."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_images import encoded, flat_folder, hugging_face, pixels
from hypothesis import given
from hypothesis import strategies as st
from object_store import serving
from records import records

from methods.base import View
from methods.views.policy import Augment
from orchestrator.data import shards as shards_module
from orchestrator.data.images import Images
from orchestrator.data.loader import Blocks, Order, read_ahead
from orchestrator.data.shards import RowGroups
from orchestrator.data.sources import open_source, parts_of
from orchestrator.data.splits import Data, DataConfig, Split, open_data
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.run import execute, prepare
from orchestrator.training.loop import Stream, make_batch

ROOT = Path(__file__).parents[3]
ROWS = 60
GROUP = 5  # rows a row group


@pytest.fixture
def shards(tmp_path) -> str:
    """Two shards of 30 images of 3 classes, in row groups of 5."""
    for number in range(2):
        seeds = range(30 * number, 30 * (number + 1))
        name = f"train-0000{number}-of-00002.parquet"
        hugging_face(tmp_path / "data" / name, seeds, [s % 3 for s in seeds], list("abc"), row_group_size=GROUP)
    return str(tmp_path / "data" / "train")


def opened(source: str, cache, *, pixels: int = 8, threads: int = 1, **options) -> Data:
    config = DataConfig(pixels=pixels, splits={"images": Split(source=source)}, **{"stream": "always", **options})
    return open_data(config, cache / "cache", seed=0, threads=threads)


def streamed(source: str, cache, **options) -> Images:
    images = opened(source, cache, **options).splits["images"]
    assert images.blocks is not None
    return images


def kilobytes(monkeypatch, limit: int) -> None:
    """Hold `limit` KiB of a streamed source, which is less than a recipe can ask for."""
    monkeypatch.setattr(DataConfig, "stream_mib", limit / 1024)
    original = open_data.__globals__["open_catalogue"]
    monkeypatch.setitem(
        open_data.__globals__, "open_catalogue",
        lambda *a, stream_bytes=None, **k: original(*a, stream_bytes=stream_bytes and limit * 1024, **k),
    )  # fmt: skip


# ---- what is read


@pytest.mark.parametrize("side", [8, 97])
@pytest.mark.parametrize("threads", [1, 3])
def test_streamed_images_are_those_of_a_copy_in_the_store(shards, tmp_path, side, threads):
    stream = streamed(shards, tmp_path, pixels=side, threads=threads)
    copy = opened(shards, tmp_path, pixels=side, stream="never").splits["images"]
    assert copy.blocks is None and not list((tmp_path / "cache").glob("*-shards/pixels.u8"))
    row_of = {identity: row for row, identity in enumerate(copy.ids.tolist())}
    same = torch.tensor([row_of[identity] for identity in stream.ids.tolist()])
    mixed = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stream.batch(mixed), copy.batch(same[mixed]))
    assert stream.label.tolist() == copy.label[same].tolist()
    assert [stream.where(row) for row in range(ROWS)] == [copy.where(row) for row in same.tolist()]


def test_rows_of_a_streamed_source_are_in_its_own_order(shards, tmp_path):
    images = streamed(shards, tmp_path)
    inside = [re.search(r"\((\d+)\.png\)", images.where(row))[1] for row in range(ROWS)]
    assert inside == [str(seed) for seed in range(ROWS)]
    assert images.blocks.tolist() == list(range(0, ROWS + 1, GROUP))


def test_draws_are_the_same_whether_streamed_or_not(shards, tmp_path):
    splits = {
        "labelled": Split(source=shards, per_class=4),
        "holdout": Split(source=shards, fraction=0.2),
        "rest": Split(source=shards),
    }
    drawn = [
        open_data(DataConfig(pixels=8, splits=splits, stream=stream), tmp_path / "cache", seed=1).splits
        for stream in ("always", "never")
    ]
    for name in splits:
        assert set(drawn[0][name].ids.tolist()) == set(drawn[1][name].ids.tolist())


def test_bad_images_and_duplicates_are_left_out_of_what_is_streamed(tmp_path):
    cells = [encoded(pixels(seed)) for seed in (0, 1, 2, 0, 3)]
    cells[1] = b"no image"
    pq.write_table(pa.table({"image": pa.array([*cells, None], pa.binary())}), tmp_path / "a.parquet", row_group_size=2)
    data = opened(str(tmp_path / "a.parquet"), tmp_path, max_bad_share=0.5)
    images = data.splits["images"]
    assert [images.where(row).rsplit(" ", 1)[1] for row in range(len(images))] == ["0", "2", "4"]
    assert [reason for _, reason in data.quarantine] == [
        "not an image: text that begins 'no image'",
        "the row holds no image",
    ]
    assert images.blocks.tolist() == [0, 1, 2, 3]


def test_auto_streams_what_a_copy_of_would_be_too_large(shards, tmp_path, monkeypatch):
    copy = ROWS * 3 * 8 * 8
    for limit, streams in ((copy, False), (copy - 1, True)):
        monkeypatch.setattr("orchestrator.data.splits.STREAM_ABOVE", limit)
        images = opened(shards, tmp_path / str(limit), stream="auto").splits["images"]
        assert (images.blocks is not None) == streams
    assert opened(flat_folder(tmp_path / "flat", range(3)).as_posix(), tmp_path).splits["images"].blocks is None


def test_a_scattered_split_is_copied_and_a_dense_one_is_not(shards, tmp_path):
    splits = {"labelled": Split(source=shards, per_class=2), "unlabelled": Split(source=shards)}
    data = open_data(DataConfig(pixels=8, splits=splits, stream="always"), tmp_path / "cache", seed=0)
    few, many = data.splits["labelled"], data.splits["unlabelled"]
    assert few.blocks is None and many.blocks is not None
    assert any("labelled: 6 images are scattered over the shards" in line for line in data.notices)
    whole = streamed(shards, tmp_path)
    row_of = {identity: row for row, identity in enumerate(whole.ids.tolist())}
    rows = torch.tensor([row_of[identity] for identity in few.ids.tolist()])
    assert torch.equal(few.batch(torch.arange(6)), whole.batch(rows)) and few.per_class() == dict.fromkeys("abc", 2)


def test_the_fingerprint_knows_what_the_shuffle_depends_on(shards, tmp_path):
    prints = {
        streamed(shards, tmp_path).fingerprint,
        streamed(shards, tmp_path, stream_mib=512).fingerprint,
        opened(shards, tmp_path, stream="never").splits["images"].fingerprint,
    }
    assert len(prints) == 3 and streamed(shards, tmp_path).fingerprint in prints


# ---- the order


starts = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(lambda sizes: np.cumsum([0, *sizes]))


@given(starts=starts, window=st.integers(1, 5), batch=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_an_epoch_in_windows_shows_every_image_once(starts, window, batch, seed):
    rows = int(starts[-1])
    order = Order(rows, batch, seed, Blocks(starts, window))
    seen = [order.at(step) for step in range(-(-order.images_per_epoch // batch))]
    places, epochs = (torch.cat(parts) for parts in zip(*seen, strict=True))
    first = places[epochs == 0]
    assert len(first.unique()) == len(first) == order.images_per_epoch
    assert 0 <= first.min() and first.max() < rows


@given(starts=starts, window=st.integers(1, 5), seed=st.integers(0, 2**31), step=st.integers(0, 40))
def test_a_step_in_windows_is_the_same_whatever_was_asked_before_and_however_many_ask(starts, window, seed, step):
    rows = int(starts[-1])
    asked = Order(rows, 8, seed, Blocks(starts, window))
    before = [asked.at(number) for number in range(3)]
    fresh = Order(rows, 8, seed, Blocks(starts, window))
    assert torch.equal(asked.at(step)[0], fresh.at(step)[0]) and torch.equal(asked.at(step)[1], fresh.at(step)[1])
    parts = torch.cat([fresh.at(step, part=part, parts=4)[0] for part in range(4)])
    assert torch.equal(parts, asked.at(step)[0]) and len(before) == 3


def test_a_batch_comes_from_two_windows_at_most_and_a_part_of_it_from_few_blocks():
    order = Order(10_000, 200, 3, Blocks(np.arange(0, 10_001, 100), 8))
    for step in range(50):
        rows = order.at(step)[0]
        assert len((rows // 100).unique()) <= 16
        each = [len((order.at(step, part=part, parts=4)[0] // 100).unique()) for part in range(4)]
        assert max(each) <= 6


def test_neighbours_in_a_shard_are_far_apart_in_an_epoch_and_epochs_and_seeds_differ():
    blocks = Blocks(np.arange(0, 1001, 10), 20)
    order = Order(1000, 100, 0, blocks)
    epoch = torch.cat([order.at(step)[0] for step in range(10)])
    assert len({tuple(batch.tolist()) for batch in epoch.split(100)}) == 10
    assert not torch.equal(epoch.sort().values, epoch)
    assert not torch.equal(epoch[:100], order.at(10)[0])
    assert not torch.equal(epoch[:100], Order(1000, 100, 1, blocks).at(0)[0])
    # rows of two windows of 200: a first batch holds half of a window, from all of its 20 blocks
    assert len((epoch[:100] // 10).unique()) > 15


def test_an_image_taken_twice_is_twice_in_an_epoch_and_beside_itself(shards, tmp_path):
    images = streamed(shards, tmp_path)
    copies = torch.arange(ROWS) % 3
    order = Order.of(images, 10, 0, copies=copies)
    places = torch.cat([order.at(step)[0] for step in range(order.images_per_epoch // 10)])
    assert order.rows == 60 and places.sort().values.tolist() == list(range(60))
    rows = torch.arange(ROWS).repeat_interleave(copies)
    ends = order.blocks.starts.tolist()
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        assert len((rows[first:last] // GROUP).unique()) == 1


# ---- memory


def counting_reads(monkeypatch) -> list[int]:
    reads: list[int] = []
    original = RowGroups._read

    def read(self, number):
        reads.append(number)
        return original(self, number)

    monkeypatch.setattr(RowGroups, "_read", read)
    return reads


@pytest.mark.parametrize("threads", [1, 3])
def test_an_epoch_reads_each_row_group_once(shards, tmp_path, monkeypatch, threads):
    kilobytes(monkeypatch, 12)  # a row group takes about 2: windows of two or three of twelve
    images = streamed(shards, tmp_path, threads=threads)
    assert 2 <= images.window <= 3
    reads = counting_reads(monkeypatch)
    order = Order.of(images, 4, 0)
    for step in range(ROWS // 4):
        images.batch(order.at(step)[0])
    assert sorted(reads) == list(range(12))


@pytest.mark.parametrize("batch", [1, 4])
def test_the_next_window_is_read_while_this_one_is_learned_from(shards, tmp_path, monkeypatch, batch):
    kilobytes(monkeypatch, 12)
    images = streamed(shards, tmp_path)
    order, readers, original = Order.of(images, batch, 0), {}, RowGroups._read

    def read(self, number):
        readers.setdefault(number, []).append(threading.current_thread().name)
        return original(self, number)

    monkeypatch.setattr(RowGroups, "_read", read)
    for step in range(ROWS // batch):
        images.batch(order.at(step)[0])
        if order.window_after(step)[0] == 0:
            wait(read_ahead(images, order, step))
    here = [number for number, names in readers.items() if not names[0].startswith("shards")]
    assert len(here) == images.window and {len(names) for names in readers.values()} == {1} and len(readers) == 12


def test_a_worker_reads_ahead_what_its_parts_of_the_next_window_come_from():
    blocks = Blocks(np.arange(0, 10_001, 100), 8)
    order = Order(10_000, 200, 3, blocks)
    for part in range(4):
        coming = {int(row) // 100 for row in blocks.first_rows(3, 0, 1, part=part, parts=4)}
        rows = torch.cat([order.at(step, part=part, parts=4)[0] for step in range(4, 8)])  # 8 x 100 rows a window
        needed, counts = (rows // 100).unique(return_counts=True)
        assert len(coming) <= 4 and counts[[int(block) in coming for block in needed]].sum() > 0.9 * len(rows)


def test_row_groups_never_hold_more_than_the_limit_however_many_threads_ask(shards, tmp_path, monkeypatch):
    images = streamed(shards, tmp_path)
    groups = images._catalogues[0].groups
    limit = 2 * int(groups._bytes.max())
    small = RowGroups(
        groups._uri, groups._files, groups._column, groups._file_of, groups._group_of, groups._starts, groups._bytes,
        limit,
    )  # fmt: skip
    most, active, original = [], set(), RowGroups._read

    def read(self, number):
        with self._room:
            active.add(number)
            most.append(sum(int(self._bytes[held]) for held in {*self._held, *active}))
        try:
            return original(self, number)
        finally:
            active.discard(number)

    monkeypatch.setattr(RowGroups, "_read", read)
    wrong: list[int] = []

    def ask(offset: int) -> None:
        for row in range(ROWS):
            row = (row * 7 + offset) % ROWS
            if small.image(row) != groups_image(images, row):
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(0, 40, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(most) > 12
    assert max(most) == limit and small._used <= limit


def groups_image(images: Images, row: int) -> bytes:
    seed = int(re.search(r"\((\d+)\.png\)", images.where(row))[1])
    return encoded(pixels(seed))


def test_a_row_group_that_cannot_be_read_gives_its_room_back(shards, tmp_path):
    images = streamed(shards, tmp_path)
    groups = images._catalogues[0].groups
    for file in (tmp_path / "data").iterdir():
        file.rename(file.with_suffix(".away"))
    with pytest.raises(OSError):
        groups.group(0)
    assert groups._used == 0 and not groups._reading
    for file in (tmp_path / "data").iterdir():
        file.rename(file.with_suffix(".parquet"))
    assert groups.image(0) == groups_image(images, 0)


def test_too_large_a_row_group_is_refused_in_one_line(tmp_path):
    cells = [os.urandom(400_000) for _ in range(2)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "a.parquet", compression="none")
    with pytest.raises(
        UserError, match=r"row group 0 of a.parquet holds 0\.8 MiB.*set stream_mib to 2 or more"
    ) as told:
        opened(str(tmp_path / "a.parquet"), tmp_path, stream_mib=1)
    assert "\n" not in str(told.value)


# ---- faults


def test_shards_that_are_gone_after_the_scan_are_an_error_and_not_black(shards, tmp_path):
    images = streamed(shards, tmp_path)
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"row 0 \(0\.png\): .*is the disk still there\? Run again to rescan"):
        images.batch(torch.tensor([0]))


def test_a_shard_that_was_written_anew_is_not_read_as_the_old_one(shards, tmp_path):
    images = streamed(shards, tmp_path)
    for file in (tmp_path / "data").iterdir():
        hugging_face(file, range(30), None, row_group_size=7)
    with pytest.raises(UserError, match="has changed since the scan"):
        images.batch(torch.tensor([0]))


def test_options_that_mean_nothing_are_named():
    for name, value in (("stream", "sometimes"), ("stream_mib", 0)):
        with pytest.raises(ValueError, match=name):
            DataConfig(pixels=8, splits={"images": Split(source="x")}, **{name: value})


# ---- a whole run


def test_a_recipe_learns_labels_and_judges_from_streamed_shards(small, untracked, tmp_path):
    for split in ("train", "test"):
        listing = open_source(f"digits/{split}", tmp_path)
        cells = [encoded(item) for item in listing.items(0, len(listing))]
        table = pa.table({"image": pa.array(cells, pa.binary()), "label": listing.label.cast(pa.string())})
        (tmp_path / "digits").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "digits" / f"{split}.parquet", row_group_size=100)
    text = small.replace("digits/", f"{tmp_path}/digits/").replace("pixels: 16", "pixels: 16\n  stream: always")
    prepared = prepare(parse(text, label="small"), tmp_path / "store", label="small")
    images = prepared.plans[0].images
    assert images["unlabelled"].blocks is not None and images["test"].blocks is not None
    assert images["labelled"].blocks is None  # two of each class among 1,437
    result = execute(prepared, use_ray=False)
    assert {stage["state"] for stage in result.stages} == {"ran"} and result.verdict is not None


# ---- object stores


@pytest.fixture
def store(shards, tmp_path, monkeypatch):
    """The same shards behind s3://bucket/data."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "buckets" / "bucket" / "data")
    with serving(tmp_path / "buckets") as (query, read):
        yield query, read


@pytest.mark.parametrize("name", ["train", "train-*.parquet", ""])
def test_shards_in_an_object_store_are_streamed(store, tmp_path, name):
    query, read = store
    images = streamed(f"s3://bucket/data/{name}?{query}", tmp_path)
    assert len(images) == ROWS and images.where(3) == "s3://bucket/data/train-00000-of-00002.parquet row 3 (3.png)"
    read.clear()
    local = streamed(str(tmp_path / "buckets" / "bucket" / "data" / "train"), tmp_path)
    rows = torch.tensor([59, 0, 31])
    assert torch.equal(images.batch(rows), local.batch(rows))
    assert set(read) == {f"data/train-0000{number}-of-00002.parquet" for number in range(2)}
    assert images.per_class() == local.per_class() == dict.fromkeys("abc", 20)


def test_a_small_remote_source_is_copied_once_and_read_from_the_store(store, tmp_path):
    query, read = store
    images = opened(f"s3://bucket/data/train?{query}", tmp_path, stream="auto").splits["images"]
    read.clear()
    assert images.blocks is None and images.batch(torch.arange(ROWS)).shape == (ROWS, 3, 8, 8) and read == []


@pytest.mark.parametrize(
    "source, why",
    [
        ("s3://bucket/no-such", "no .parquet file is there; check the name"),
        ("s3://no-such-bucket/data/train", "no .parquet file is there; check the name"),
        ("s3://closed/data/train", "cannot be read: .*ACCESS_DENIED.*check the name, the network, and AWS_ACCESS_KEY"),
    ],
)
def test_what_is_not_in_an_object_store_is_one_line(store, tmp_path, source, why):
    with pytest.raises(UserError, match=f"{source}.*{why}") as told:
        opened(f"{source}?{store[0]}", tmp_path)
    assert "\n" not in str(told.value)


def test_a_remote_folder_with_several_splits_asks_which(store, tmp_path):
    hugging_face(tmp_path / "buckets" / "bucket" / "data" / "test.parquet", [99], [0])
    source = f"s3://bucket/data?{store[0]}"
    with pytest.raises(UserError, match="holds the Parquet splits test, train; name one"):
        opened(source, tmp_path)
    assert [part.partition("?")[0] for part in parts_of(source)] == ["s3://bucket/data/test", "s3://bucket/data/train"]
    assert all(len(open_source(part, tmp_path)) for part in parts_of(source))


@pytest.mark.parametrize(
    "source, told",
    [
        ("s3://key:secret@bucket/x", "credentials do not belong into a recipe"),
        ("nothing://bucket/x", "Unrecognized filesystem.*s3://, gs://"),
    ],
)
def test_a_remote_source_that_cannot_be_read_says_what_to_do(tmp_path, source, told):
    with pytest.raises(UserError, match=told) as error:
        open_source(source, tmp_path)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_file_uri_is_read_like_any_other_file_system(shards, tmp_path):
    assert len(streamed(f"file://{shards}", tmp_path)) == ROWS
    assert shards_module.Place.of(f"file://{shards}").uri() == f"file://{shards}"


# ---- under a limit of memory


UNDER_A_LIMIT = """
import json, resource, sys
from pathlib import Path
import torch
from orchestrator.data.loader import Order
from orchestrator.data.splits import DataConfig, Split, open_data
from records import records

folder, stream, allowed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)

def epoch(source, name):
    config = DataConfig(pixels=256, splits={"images": Split(source=source)}, stream=stream, stream_mib=8)
    images = open_data(config, folder / name, seed=0).splits["images"]
    order, total = Order.of(images, 32, 0), torch.zeros(len(images), dtype=torch.int64)
    for step in range(order.images_per_epoch // 32):
        rows = order.at(step)[0]
        total[rows] += images.batch(rows).amax(dim=(1, 2, 3))
    return int((total > 0).sum())

def mapped(field="VmSize"):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])

epoch(str(records(folder / "small", 64, side=256, shards=1, row_group=8)), "warm")  # imports, threads, first buffers
base = mapped()
resource.setrlimit(resource.RLIMIT_AS, (base + allowed, resource.RLIM_INFINITY))
seen = epoch(sys.argv[4], "cache")
print(json.dumps({"seen": seen, "grown": mapped("VmPeak") - base}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and Linux keeps RLIMIT_AS")
def test_data_three_times_the_memory_are_scanned_and_learned_from(tmp_path):
    """226 MB of decoded images under 64 MiB above what the imports take; a copy that is mapped whole does not fit."""
    source = records(tmp_path / "large", 1152, side=256, shards=2, row_group=8)
    allowed = 64 * 2**20
    assert 1152 * 3 * 256**2 > 3 * allowed
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "MALLOC_ARENA_MAX": "1",  # an arena reserves 64 MiB of addresses for each thread
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # mimalloc reserves a GiB
        "OMP_NUM_THREADS": "1",
    }
    ended = {}
    for stream in ("always", "never"):
        folder = tmp_path / stream
        command = [sys.executable, "-c", UNDER_A_LIMIT, str(folder), stream, str(allowed), str(source)]
        ended[stream] = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended["always"].returncode == 0, ended["always"].stderr
    told = json.loads(ended["always"].stdout)
    assert told["seen"] == 1152 and told["grown"] <= allowed
    assert re.search("Cannot allocate memory|MemoryError", ended["never"].stderr)


def python_objects(count: int, folder: Path) -> tuple[int, int]:
    """Small Python objects that are there while an epoch of `count` records passes loader and views, and at most during
    their scan."""
    source = str(records(folder / "data", count, side=8, shards=2))
    scanning: list[int] = []
    gc.collect()
    before = sys.getallocatedblocks()
    config = DataConfig(pixels=8, splits={"images": Split(source=source, labels=False)})
    data = open_data(
        config, folder / "cache", seed=0, progress=lambda *step: scanning.append(sys.getallocatedblocks() - before)
    )
    images = data.splits["images"]
    stream = Stream("unlabelled", images, Order.of(images, 1000, 0))
    views = (View("view1", Augment().build(8)), View("view2", Augment().build(8)))
    seen = torch.zeros(count, dtype=torch.bool)
    most = 0
    for step in range(count // 1000):
        batch, _ = make_batch(views, [stream], step, seed=0, device=torch.device("cpu"))
        assert batch["view1"].shape == batch["view2"].shape == (1000, 3, 8, 8)
        seen[batch["unlabelled.index"]] = True
        most = max(most, sys.getallocatedblocks() - before)
    assert len(images) == count and seen.all()
    return most, max(scanning)


def test_a_row_takes_no_python_object(tmp_path):
    python_objects(1_000, tmp_path / "warm")
    few, _ = python_objects(5_000, tmp_path / "few")
    many, scanned = python_objects(15_000, tmp_path / "many")
    assert many - few < 1_000  # for 10,000 rows more
    assert scanned < 15 * 4096  # a block of the scan has its records as tuples


@pytest.mark.slow
def test_an_epoch_of_a_million_records_passes_loader_and_views_without_an_object_for_each(tmp_path):
    python_objects(1_000, tmp_path / "warm")
    learned, scanned = python_objects(1_000_000, tmp_path / "million")
    assert learned < 20_000 and scanned < 15 * 4096
