"""A read-only S3 on loopback: enough of its protocol for Arrow's own client to list and read a folder's files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder`, whose subfolders are buckets; a bucket "closed" is somebody else's.

    Yields:
        what a URI needs behind its "?", and the paths of the objects that were read.
    """
    read: list[str] = []

    class Handler(_Handler):
        root, reads = folder, read

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=us-east-1", read
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    reads: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        if bucket == "closed":
            return self._error(403, "AccessDenied", body)
        if not (self.root / bucket).is_dir():
            return self._error(404, "NoSuchBucket", body)
        if not key:
            return self._list(bucket, parse_qs(url.query, keep_blank_values=True)) if body else self._send(200, b"", {})
        path = self.root / bucket / key
        if not path.is_file():
            return self._error(404, "NoSuchKey", body)
        data, headers = (
            path.read_bytes(),
            {"ETag": '"x"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)},
        )
        if not body:
            return self._send(200, b"", {**headers, "Content-Length": str(len(data))})
        self.reads.append(key)
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            status, data = 206, data[int(first) : stop]
        self._send(status, data, headers)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        files = sorted(p.relative_to(self.root / bucket).as_posix() for p in (self.root / bucket).rglob("*"))
        found, folders = [], set()
        for name in files:
            path = self.root / bucket / name
            if not name.startswith(prefix) or not path.is_file():
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            found.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{path.stat().st_size}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        count = len(found) + len(folders)
        text = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>'
            f"<KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>{''.join(found)}{common}</ListBucketResult>"
        )
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _error(self, status: int, code: str, body: bool) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self._send(status, text.encode() if body else b"", {"Content-Type": "application/xml"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""
