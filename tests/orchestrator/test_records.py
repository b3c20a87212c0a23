"""Records: a line each, written beside the run before anything is sent, and lost by no full disk and no kill."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator import records
from orchestrator.records import Recorder, read_records


def lines_of(folder: Path) -> list[dict]:
    return [record for record, _ in read_records(folder)]


def test_a_burst_of_metrics_is_written_in_few_writes_and_lost_by_no_later_call(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    recorder = Recorder(tmp_path)
    written = []
    for step in range(1100):
        recorder.metrics("a", {"loss": 0.0}, step)
        written.append(len(lines_of(tmp_path)) if step in (0, 1, 999, 1000, 1099) else None)
    assert [count for count in written if count is not None] == [1, 1, 1, 1001, 1001]
    now[0] += 1.0
    recorder.metrics("a", {"loss": 0.0}, 1100)
    assert len(lines_of(tmp_path)) == 1101
    recorder.metrics("a", {"loss": 0.0}, 1101)
    recorder.tags("a", {"b": "c"})
    assert [record["kind"] for record in lines_of(tmp_path)][-2:] == ["metrics", "tags"]
    recorder.metrics("a", {"loss": 0.0}, 1102)
    recorder.close()
    assert len(lines_of(tmp_path)) == 1104


def test_a_full_disk_is_said_and_a_later_write_keeps_the_records(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    recorder.tags("a", {"n": "1"})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "write", lambda descriptor, data: real(descriptor, data[:20]))
        with pytest.raises(OSError, match=r"20 of \d+ bytes written; is the disk full"):
            recorder.tags("a", {"n": "2"})
    recorder.tags("a", {"n": "3"})
    assert [record["tags"]["n"] for record in lines_of(tmp_path)] == ["1", "2", "3"]


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    missing=st.integers(0, 400),
    chunks=st.lists(st.integers(1, 90), max_size=6),
)
@example(names=["a", "b"], missing=1, chunks=[])  # only the newline is missing
@example(names=["a", "b"], missing=0, chunks=[])
def test_a_torn_line_costs_no_record_but_its_own(tmp_path_factory, names, missing, chunks):
    folder = tmp_path_factory.mktemp("torn")
    file = folder / "records.jsonl"
    recorder = Recorder(folder)
    for name in names:
        recorder.tags("a", {"name": name})
    whole = file.read_bytes()
    cut = max(0, len(whole) - missing)

    # A reader that looks while the file grows, byte by byte if need be, sees every record once and in order.
    seen, offset = [], 0

    def read_on():
        nonlocal offset
        for record, end in read_records(folder, offset):
            seen.append(record["tags"]["name"])
            offset = end

    for end in [*np.cumsum(chunks), cut]:
        file.write_bytes(whole[: min(int(end), cut)])
        read_on()
    complete = whole[:cut].count(b'"}}\n')
    assert seen == names[:complete]

    # The writer was killed there; another process goes on. Only a torn record is lost, unless just its newline was.
    Recorder(folder).tags("a", {"name": "after"})
    read_on()
    newline_only = whole[:cut].endswith(b'"}}')
    assert seen == names[: complete + newline_only] + ["after"]


@given(junk=st.binary(max_size=40).filter(lambda junk: b"\n" not in junk))
def test_a_line_that_is_no_record_is_passed_over(tmp_path_factory, junk):
    folder = tmp_path_factory.mktemp("junk")
    Recorder(folder).tags("a", {"n": "1"})
    with open(folder / "records.jsonl", "ab") as file:
        file.write(junk + b"\n")
    Recorder(folder).tags("a", {"n": "2"})
    assert [record["tags"]["n"] for record in lines_of(folder)] == ["1", "2"]
