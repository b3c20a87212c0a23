"""Images: an ordered set of images of one split, by row number, as every stage reads them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orchestrator.data.catalogue import Catalogue, open_catalogue
from orchestrator.data.decode import DECODE_VERSION, BadImage, open_rgb, square
from orchestrator.data.labels import no_labels
from orchestrator.data.sources import Listing
from orchestrator.errors import UserError

_log = logging.getLogger(__name__)
_BLOCK = 1024  # images that are not streamed, read as one among those that are
_STAND_INS = 20  # other images tried in place of one that went bad, before giving up on the disk


class Images:
    """N images with their ids and labels; pixels are read when asked for, from memory maps or by decoding.

    A row takes 19 bytes here, and no Python object; what else is known of it stays in its catalogue.

    Attributes:
        labelled: (N,) bool, which images have a label.
        label: (N,) int64 into `classes`, meaningful where `labelled` is true and 0 elsewhere.
        targets: (N, K) bool, which of the classes an image shows, where it may show several; its `label` is 0 then.
            None: one class an image, or no labels.
        classes: the class names, in the order of the numbers.
        pixels: images are `pixels` by `pixels`.
        replaced: row to reason, for images that could not be read after the scan; see `batch`.
    """

    def __init__(
        self,
        catalogues: Sequence[Catalogue],
        catalogue_of: np.ndarray,
        row_of: np.ndarray,
        *,
        label: np.ndarray,
        labelled: np.ndarray,
        classes: Sequence[str],
        pixels: int,
        threads: int = 1,
        targets: np.ndarray | None = None,
    ) -> None:
        self._catalogues = tuple(catalogues)
        self._catalogue_of = catalogue_of  # (N,) int16: which catalogue an image lies in
        self._row_of = row_of  # (N,) int64: its row there
        self.labelled = labelled
        self.label = np.where(labelled, label, 0).astype(np.int64)
        self.classes, self.pixels, self.threads = tuple(classes), pixels, threads
        self.targets = targets
        self.replaced: dict[int, str] = {}
        if targets is None and labelled.any() and not 0 <= self.label.min() <= self.label.max() < len(self.classes):
            row = int(np.argmax((self.label < 0) | (self.label >= len(self.classes))))
            raise ValueError(f"{self.where(row)}: label {self.label[row]}, but there are {len(self.classes)} classes")

    @staticmethod
    def of(catalogue: Catalogue, *, threads: int = 1) -> Images:
        """All usable images of a catalogue, in its order (`Catalogue.kept`), with the source's own classes."""
        rows = catalogue.kept
        label, labelled = catalogue.label_names(rows)
        return Images(
            [catalogue],
            np.zeros(len(rows), np.int16),
            rows,
            label=label,
            labelled=labelled,
            classes=catalogue.about["classes"],
            pixels=catalogue.about["pixels"],
            threads=threads,
            targets=catalogue.targets(rows),
        )

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def ids(self) -> np.ndarray:
        """(N,) str, a hash of each image's decoded pixels; made when asked for, 128 bytes a row."""
        return self.id_bytes.astype("U32")

    @property
    def id_bytes(self) -> np.ndarray:
        """`ids` as (N,) bytes of 32 hex digits, gathered from the catalogues when asked for."""
        found = np.empty(len(self), "S32")
        for number, catalogue in enumerate(self._catalogues):
            mine = self._catalogue_of == number
            found[mine] = catalogue.ids(self._row_of[mine])
        return found

    @cached_property
    def blocks(self) -> np.ndarray | None:
        """Where runs of rows begin that are read together, (B + 1,) int64 from 0 to N: of one row group each, or of a
        fixed size where images are not streamed. None where none is: any row is read as quickly as the next."""
        if not any(catalogue.streamed for catalogue in self._catalogues):
            return None
        group = np.arange(len(self)) // _BLOCK
        for number, catalogue in enumerate(self._catalogues):
            if catalogue.streamed:
                mine = self._catalogue_of == number
                group[mine] = catalogue.groups.number(self._row_of[mine])
        other = (group[1:] != group[:-1]) | (self._catalogue_of[1:] != self._catalogue_of[:-1])
        return np.concatenate([[0], 1 + np.flatnonzero(other), [len(self)]])

    @property
    def window(self) -> int:
        """How many `blocks` are shuffled together, so that memory is enough for them."""
        return min(catalogue.window for catalogue in self._catalogues if catalogue.streamed)

    def read_ahead(self, now: Tensor, coming: Tensor) -> list[Future]:
        """Begin to read the row groups that rows `coming` (P,) lie in; those of rows `now` are still needed."""
        futures: list[Future] = []
        for number, catalogue in enumerate(self._catalogues):
            if catalogue.streamed:
                groups = [
                    np.unique(catalogue.groups.number(self._row_of[rows[self._catalogue_of[rows] == number]]))
                    for rows in (now.numpy(), coming.numpy())
                ]
                futures += catalogue.groups.read_ahead(*groups)
        return futures

    @property
    def share_of_groups(self) -> float:
        """Of all rows in the row groups that streamed images lie in, the share that is among these images."""
        held = whole = 0
        for number, catalogue in enumerate(self._catalogues):
            if catalogue.streamed:
                rows = self._row_of[self._catalogue_of == number]
                held += len(rows)
                whole += int(catalogue.groups.sizes[np.unique(catalogue.groups.number(rows))].sum())
        return held / max(1, whole)

    def copied(
        self, cache: Path, *, threads: int = 1, progress: Callable[[str, int, int], None] | None = None
    ) -> Images:
        """The same images in the same order with a catalogue of their own in `cache`, which is made at the first time.

        Raises:
            UserError: an image that could be read at the scan no longer can, or the disk is too small.
        """

        def items(start: int, stop: int) -> Iterator[bytes]:
            for row in range(start, stop):
                try:
                    yield self._catalogues[self._catalogue_of[row]].encoded(int(self._row_of[row]))
                except OSError as error:
                    raise UserError(f"{self.where(row)}: went bad after the scan ({error}); run again") from error

        paths = pa.array((os.fsencode(self.where(row)) for row in range(len(self))), pa.large_binary())
        places = hashlib.sha256(" ".join(catalogue.folder.name for catalogue in self._catalogues).encode())
        places.update(self._catalogue_of.tobytes() + self._row_of.tobytes())
        listing = Listing(
            source="copies", kind="copies", root="", path=paths, label=no_labels(len(self)), classes=(),
            blocks=[(row, min(row + _BLOCK, len(self))) for row in range(0, len(self), _BLOCK)], items=items,
            signature=places.hexdigest(),
        )  # fmt: skip
        catalogue = open_catalogue(listing, cache, pixels=self.pixels, threads=threads, progress=progress)
        owner, rows = np.zeros(len(self), np.int16), np.arange(len(self))
        return self._with(catalogues=[catalogue], catalogue_of=owner, row_of=rows)

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.targets is not None

    def __getstate__(self) -> dict:
        hidden = ("_pool", "_rows", "blocks", "fingerprint")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    # ---- pixels

    def batch(self, rows: Tensor) -> Tensor:
        """The images of `rows` (B,) int64, as contiguous uint8 (B, 3, pixels, pixels) on the CPU.

        An image that could be read at the scan and no longer can is replaced by another one of the same label (or, like
        itself, without one): the next in row order that can be read. It is logged once and kept in `replaced`.

        Raises:
            IndexError: a row is not in [0, N).
            UserError: nothing near can be read either, as when a disk is gone.
        """
        places = self._rows.index_select(0, rows)
        if len(self._catalogues) == 1 and (decoded := self._catalogues[0].decoded) is not None:
            return decoded.index_select(0, places).view(-1, 3, self.pixels, self.pixels)
        images = torch.empty(len(rows), 3, self.pixels, self.pixels, dtype=torch.uint8)
        owner = torch.from_numpy(self._catalogue_of).index_select(0, rows)
        lazy: list[int] = []
        for number, catalogue in enumerate(self._catalogues):
            at = (owner == number).nonzero().flatten()
            if len(at) and (decoded := catalogue.decoded) is not None:
                images[at] = decoded.index_select(0, places[at]).view(-1, 3, self.pixels, self.pixels)
            else:
                lazy.extend(at.tolist())
        wanted: list[int] = rows.tolist()
        if self.blocks is not None:  # each row group once, though there may be room for one only
            lazy.sort(key=wanted.__getitem__)
        squares: Iterable[np.ndarray]
        if self.threads > 1 and len(lazy) > 1:
            squares = self._pool.map(lambda at: self._read(wanted[at]), lazy)
        else:
            squares = (self._read(wanted[at]) for at in lazy)
        for place, pixels in zip(lazy, squares, strict=True):
            images[place] = torch.from_numpy(pixels)
        return images

    @cached_property
    def _rows(self) -> Tensor:
        return torch.from_numpy(self._row_of)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def _read(self, row: int) -> np.ndarray:
        """One image as uint8 (3, pixels, pixels), or its stand-in."""
        try:
            return self._decode(row)
        except (BadImage, OSError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if row not in self.replaced:
            self.replaced[row] = reason
            _log.warning("%s went bad after the scan (%s); another image stands in for it", self.where(row), reason)
        alike = (self.label == self.label[row]) & (self.labelled == self.labelled[row])
        if self.targets is not None:
            alike &= (self.targets == self.targets[row]).all(axis=1)
        same = np.flatnonzero(alike)
        after = np.roll(same, -1 - int(np.searchsorted(same, row)))
        for other in after[:_STAND_INS].tolist():
            try:
                return self._decode(other)
            except (BadImage, OSError):
                continue
        tried = min(len(same), _STAND_INS + 1)
        raise UserError(
            f"{self.where(row)}: {reason}, and so for {tried} images in a row; is the disk still there? Run again to "
            "rescan"
        )

    def _decode(self, row: int) -> np.ndarray:
        catalogue, place = self._catalogues[self._catalogue_of[row]], int(self._row_of[row])
        if (decoded := catalogue.decoded) is not None:
            return decoded[place].view(3, self.pixels, self.pixels).numpy()
        return square(open_rgb(catalogue.encoded(place), shrink_to=self.pixels), self.pixels)

    def where(self, row: int) -> str:
        """The path, or the place in a Parquet file, that image `row` came from."""
        return self._catalogues[self._catalogue_of[row]].path(int(self._row_of[row]))

    # ---- identity and sets

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids, labels (in order), class names, `pixels` and the decode rule: equal wherever the images lie. Of
        streamed images also of what their shuffle depends on."""
        digest = hashlib.sha256(f"{self.pixels} {DECODE_VERSION} {self.classes!r}".encode())
        digest.update(self.id_bytes.tobytes())
        digest.update(self.label.tobytes())
        digest.update(self.labelled.tobytes())
        if self.targets is not None:
            digest.update(b"targets" + np.packbits(self.targets, axis=1).tobytes())
        if self.blocks is not None:
            digest.update(b"blocks" + self.blocks.tobytes() + self.window.to_bytes(8, "little"))
        return digest.hexdigest()

    def select(self, rows: np.ndarray | Tensor | Sequence[int]) -> Images:
        """The images of `rows` (M,), integers or a mask of N booleans, in that order."""
        index = np.asarray(rows)
        if index.dtype != bool:
            index = index.astype(np.int64)
        return self._with(
            catalogue_of=self._catalogue_of[index],
            row_of=self._row_of[index],
            label=self.label[index],
            labelled=self.labelled[index],
            targets=None if self.targets is None else self.targets[index],
        )

    def without_labels(self) -> Images:
        """The same images, none of them labelled."""
        return self._with(label=np.zeros(len(self), np.int64), labelled=np.zeros(len(self), bool), targets=None)

    def with_labels(self, label: np.ndarray) -> Images:
        """The same images with other labels (N,) of the same classes; those without a label stay so."""
        return self._with(label=label)

    def relabel(self, classes: Sequence[str]) -> Images:
        """The same labels, by name, under another class map; a label whose class is not in it becomes no label."""
        place = {name: number for number, name in enumerate(classes)}
        if self.targets is not None:
            targets = np.zeros((len(self), len(classes)), bool)
            kept = [number for number, name in enumerate(self.classes) if name in place]
            targets[:, [place[self.classes[number]] for number in kept]] = self.targets[:, kept]
            return self._with(targets=targets, classes=classes)
        new = np.array([place.get(name, -1) for name in self.classes] or [-1], np.int64)[self.label]
        return self._with(label=new, labelled=self.labelled & (new >= 0), classes=classes)

    @staticmethod
    def concat(*images: Images) -> Images:
        """The images of several sets, one after the other.

        Raises:
            ValueError: class map or `pixels` differ, or some have several labels an image and others one.
        """
        first = images[0]
        for other in images[1:]:
            if (other.classes, other.pixels) != (first.classes, first.pixels):
                raise ValueError(
                    f"concat: {len(first.classes)} classes at {first.pixels} pixels and {len(other.classes)} classes "
                    f"at {other.pixels} pixels: need one class map and one size"
                )
        several = [part.several for part in images if part.labelled.any() or part.several]
        if any(several) and not all(several):
            raise ValueError("concat: some images have several labels and others one: need one kind")
        catalogues = list({c.folder: c for part in images for c in part._catalogues}.values())
        number = {c.folder: n for n, c in enumerate(catalogues)}
        owner = [
            np.array([number[c.folder] for c in part._catalogues], np.int16)[part._catalogue_of] for part in images
        ]
        return first._with(
            catalogues=catalogues,
            catalogue_of=np.concatenate(owner),
            row_of=np.concatenate([part._row_of for part in images]),
            label=np.concatenate([part.label for part in images]),
            labelled=np.concatenate([part.labelled for part in images]),
            targets=np.concatenate([
                np.zeros((len(part), len(first.classes)), bool) if part.targets is None else part.targets
                for part in images
            ]) if any(several) else None,
        )  # fmt: skip

    def per_class(self) -> dict[str, int]:
        """Labelled images of each class, in the order of `classes`; one with several labels is counted in each."""
        if self.targets is not None:
            return dict(zip(self.classes, self.targets[self.labelled].sum(axis=0).tolist(), strict=True))
        counts = np.bincount(self.label[self.labelled], minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    def _with(self, **changed: object) -> Images:
        same = {
            "catalogues": self._catalogues,
            "catalogue_of": self._catalogue_of,
            "row_of": self._row_of,
            **{name: getattr(self, name) for name in ("label", "labelled", "classes", "pixels", "threads", "targets")},
        }
        return Images(**{**same, **changed})
