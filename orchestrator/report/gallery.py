"""Small pictures for the report: images found again by their ids, as PNG inside the page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.io import encode_png

from orchestrator.data.images import Images
from orchestrator.data.splits import open_data
from orchestrator.errors import UserError
from orchestrator.recipe import parse
from orchestrator.store import Store

SIDE = 72  # pixels of a picture in the page, about; larger images are reduced to it, smaller ones are enlarged


@dataclass(frozen=True)
class Wanted:
    """An image to show: its id, the lines under it, and where it came from."""

    id: str
    lines: Sequence[str]
    path: str


@dataclass(frozen=True)
class Album:
    """Images to show together."""

    caption: str
    pictures: Sequence[Wanted]


class Pictures:
    """A run's images by id. `problem` says, in a sentence, why there are none."""

    def __init__(self, places: dict[str, tuple[Images, int]], problem: str = "") -> None:
        self._places, self.problem = places, problem

    @staticmethod
    def open(store: Store, recipe: str, seed: int, wanted: Iterable[str]) -> Pictures:
        """Find the wanted ids where the recipe says that images are. Never raises for what is gone."""
        try:
            parsed = parse(recipe)
            data = open_data(parsed.data, store.root / "data", seed=seed)
        except (UserError, OSError) as error:
            reason = str(error).splitlines()[0]
            return Pictures({}, f"The pictures are left out: the source images cannot be opened again ({reason}).")
        ids = set(wanted)
        places = {
            key: (images, row)
            for images in data.splits.values() for row, key in enumerate(images.ids.tolist()) if key in ids
        }  # fmt: skip
        lost = len(ids) - len(places)
        return Pictures(places, f"{lost:,} of {len(ids):,} pictures are no longer in the source." if lost else "")

    def uris(self, ids: Sequence[str]) -> dict[str, str]:
        """A data URI for each image that can still be read."""
        found = {}
        for key in ids:
            if key not in self._places:
                continue
            images, row = self._places[key]
            try:
                picture = images.batch(torch.tensor([row]))
            except (UserError, OSError):
                continue
            if row not in images.replaced:  # a stand-in would be another image under this one's label
                found[key] = _uri(picture)
        return found


def _uri(picture: torch.Tensor) -> str:
    if picture.shape[-1] > SIDE:
        small = F.interpolate(picture.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
        picture = small.round().clamp(0, 255).byte()
    return "data:image/png;base64," + base64.b64encode(encode_png(picture[0]).numpy().tobytes()).decode()


def shown_pixels(pixels: int) -> int:
    """How large a picture is drawn: a whole multiple of its own pixels, so that they stay square."""
    return SIDE if pixels > SIDE else pixels * max(1, SIDE // pixels)
