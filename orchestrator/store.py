"""The store: artifacts under their keys, committed by one rename, and the working folders of unfinished stages.

In the folder of a store:

    .orchestrator-store      marks the folder, so that it is never read as data
    artifacts/KEY/           manifest.json and the artifact's files: complete by definition, never edited
    work/KEY/                a stage's own checkpoints while it runs; belongs to the key and outlives a crash
    corrections/             reviewed labels, each file under its digest; a recipe that uses one names its path
    features/                extracted features of the runs at work, to be extracted once; may be deleted
    data/                    catalogues of image sources
    runs/RUN/                recipe, states, records, report of one run

No file inside holds an absolute path: a store may be moved or renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.artifacts import KINDS, Artifact, write_json
from orchestrator.errors import UserError

MARKER = ".orchestrator-store"
LAYOUT = 1


def content_digest(folder: Path, facts: dict[str, Any]) -> str:
    """sha256 over facts, file names and bytes: equal for equal answers, free of times and places. 32 hex digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(file_digest(path).encode())
    return digest.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, flush it, rename it over `path`: readers see the old or the new one, whole."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Store:
    """A folder of artifacts."""

    root: Path

    @staticmethod
    def open(root: Path) -> Store:
        """Open a store, making it when the folder is new or empty. Raises UserError when it cannot be one."""
        root = root.absolute()
        marker = root / MARKER
        if not marker.exists():
            if root.is_file():
                raise UserError(f"store {root}: is a file; give a folder with --store")
            if root.is_dir() and any(root.iterdir()):
                raise UserError(
                    f"store {root}: holds other files and no {MARKER}; give a new or empty folder with --store"
                )
        try:
            for name in ("artifacts", "work", "data", "runs"):
                (root / name).mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                replace_file(marker, lambda part: part.write_text(json.dumps({"layout": LAYOUT}) + "\n"))
            probe = root / "work" / f".probe-{uuid.uuid4().hex[:8]}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"store {root}: cannot be written ({error.strerror}); give another folder with --store"
            ) from error
        return Store(root)

    def folder(self, key: str) -> Path:
        """Where the artifact of a key lies, or will lie."""
        return self.root / "artifacts" / key

    def has(self, key: str) -> bool:
        """Whether the artifact is stored, whole."""
        return (self.folder(key) / "manifest.json").exists()

    def manifest(self, key: str) -> dict[str, Any]:
        """What is known of a stored artifact."""
        return json.loads((self.folder(key) / "manifest.json").read_text(encoding="utf-8"))

    def open_artifact(self, key: str) -> Artifact:
        """A stored artifact by its key, its files checked against the manifest's sizes.

        Raises:
            UserError: a file is missing or was cut.
        """
        manifest = self.manifest(key)
        folder = self.folder(key)
        for name, known in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size if path.exists() else None
            if found != known["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes, the manifest says {known['bytes']}"
                raise UserError(f"{path}: {state}; delete the folder {folder.name} and run again to rebuild it")
        return KINDS[manifest["kind"]](folder, manifest["facts"], key)

    def workdir(self, key: str) -> Path:
        """The working folder of a stage that is not finished."""
        path = self.root / "work" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key, so that two processes never work on it at once; freed by the system when the holder dies."""
        path = self.root / "work" / f"{key}.lock"
        with path.open("w") as file:
            told = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        waiting()
                        told = True
                    time.sleep(0.1)
            yield

    def output(self, key: str) -> Path:
        """A fresh folder, on the artifact's file system, for a stage to write its answer into."""
        for old in (self.root / "artifacts").glob(f".{key}.*"):
            shutil.rmtree(old, ignore_errors=True)  # left by a killed process: the lock says nobody else writes it
        path = self.root / "artifacts" / f".{key}.{uuid.uuid4().hex[:8]}"
        path.mkdir()
        return path

    def commit(self, key: str, artifact: Artifact, manifest: dict[str, Any]) -> Artifact:
        """Make a written artifact part of the store by one rename, and drop its working folder.

        Raises:
            UserError: the disk is full, or the store cannot be written.
        """
        folder = artifact.folder
        try:
            names = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {
                p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_digest(p)} for p in names
            }
            digest = content_digest(folder, artifact.facts)
            write_json(folder / "manifest.json", {"kind": artifact.kind, "key": key, "digest": digest,
                                                  "facts": artifact.facts, **manifest, "files": files})  # fmt: skip
            for path in (*names, folder / "manifest.json", folder):
                _sync(path)
            final = self.folder(key)
            try:
                os.rename(folder, final)
            except OSError:
                if not self.has(key):  # another process won the race with an equal answer, or the disk failed
                    raise
                shutil.rmtree(folder)
            _sync(final.parent)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"store {self.root}: cannot keep {artifact.kind} {key[:8]} ({error.strerror}); free some space and run "
                "the same command again: training goes on from its last checkpoint"
            ) from error
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)
        return replace(artifact, folder=final, key=key)
