"""What happens in a run, as lines of `records.jsonl` in its folder: whoever runs a stage appends, nobody waits.

A `Recorder` knows nothing of MLflow; `orchestrator.tracking` sends what was recorded there.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Status = Literal["FINISHED", "FAILED", "KILLED"]

RECORDS = "records.jsonl"
_BUFFERED_SECONDS = 1.0  # metrics written at most this often ...
_BUFFERED_VALUES = 1000  # ... or in this many values


class Recorder:
    """Appends a run's records to `<folder>/records.jsonl`: no server, no mlflow, no thread. Pickles as its path.

    Several recorders, in several processes of one machine, may append to one file: each write is one `O_APPEND` write
    of whole lines. A network file system gives no such promise: workers of other machines report to the driver.

    Args:
        folder: the run's folder; made when missing.
    Raises:
        OSError: from any call that writes, when the disk does not take it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._values = 0
        self._last_write = -math.inf
        self._clean = False  # whether the file is known to end in a newline

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, (self.folder,)

    def start(
        self, run: str, *, parent: str | None, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        """Begin a run, or resume it when it was started before: new parameters are added, changed ones become tags.

        Args:
            run: our name of the run, unique in this folder; the other calls refer to it.
            parent: the run it belongs under (stage under pipeline, round under stage), or None.
            name: what MLflow shows.
        """
        self._append("start", run, id=uuid.uuid4().hex, parent=parent, name=name, tags=dict(tags), params=dict(params))

    def metrics(self, run: str, values: Mapping[str, float], step: int) -> None:
        """Record `values` at `step`. Buffered: a burst is written at most every second or every 1000 values."""
        plain = {key: _json_number(float(value)) for key, value in values.items()}
        line = _line("metrics", run, step=int(step), values=plain)
        with self._lock:
            self._lines.append(line)
            self._values += len(plain)
            if self._values >= _BUFFERED_VALUES or time.monotonic() - self._last_write >= _BUFFERED_SECONDS:
                self._write()

    def tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags: lineage, verdicts, whatever may change."""
        self._append("tags", run, tags=dict(tags))

    def artifact(self, run: str, path: Path, name: str) -> None:
        """Attach the file or folder `path`, relative to the run's folder or absolute, under the name `name`."""
        self._append("artifact", run, path=os.path.relpath(self.folder / path, self.folder), name=name)

    def model(self, run: str, *, key: str, registered_name: str, alias: str) -> None:
        """Register the model of artifact `key` as a version of `registered_name` and point `alias` at it.

        MLflow keeps the alias "latest" for itself; a slash or a colon in the name becomes a dash.
        """
        self._append("model", run, key=key, name=registered_name, alias=alias)

    def data(self, run: str, name: str, digest: str, source: str, context: str) -> None:
        """Say what the run read: a data set's name, fingerprint, place, and role such as "training"."""
        self._append("data", run, name=name, digest=digest, source=source, context=context)

    def end(self, run: str, status: Status) -> None:
        """End a run. A later `start` resumes it."""
        self._append("end", run, status=status)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """The same as `flush`: nothing is held open between writes."""
        self.flush()

    def _append(self, kind: str, run: str, **fields: Any) -> None:
        with self._lock:
            self._lines.append(_line(kind, run, **fields))
            self._write()

    def _write(self) -> None:
        if not self._lines:
            return
        # A process killed in the middle of a write leaves half a line; the newline keeps the next record out of it.
        data = (b"" if self._clean else b"\n") + b"".join(self._lines)
        self._clean = False
        descriptor = os.open(self.folder / RECORDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written < len(data):
            # All lines stay buffered: one that was written twice is sent once, by its time and identity.
            raise OSError(f"{self.folder / RECORDS}: {written} of {len(data)} bytes written; is the disk full?")
        self._clean = True
        self._lines.clear()
        self._values = 0
        self._last_write = time.monotonic()


def read_records(folder: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Every whole record from byte `offset` on, each with the offset to go on from after it.

    A last line without its newline is still being written, or was torn by a crash: it is left for a later call. A line
    that is no record, which is what a torn one becomes once somebody appends, is passed over.
    """
    try:
        file = open(Path(folder) / RECORDS, "rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("run"), str) and isinstance(record.get("kind"), str):
                yield record, offset


def _line(kind: str, run: str, **fields: Any) -> bytes:
    record = {"kind": kind, "run": run, "time": int(time.time() * 1000), **fields}
    return json.dumps(record, default=str).encode("ascii") + b"\n"


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as the words that `float` reads back."""
    return value if math.isfinite(value) else str(value)
