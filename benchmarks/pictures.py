"""What benchmarks read: CIFAR-10's test split where ORCHESTRATOR_DATA names its folder, otherwise smooth noise."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from orchestrator.data.catalogue import open_catalogue
from orchestrator.data.images import Images
from orchestrator.data.sources import open_source

PIXELS = 32


def load_images(count: int) -> tuple[str, Tensor]:
    """Where the images are from, and `count` of them: uint8 (count, 3, PIXELS, PIXELS)."""
    folder = os.environ.get("ORCHESTRATOR_DATA")
    shards = sorted(Path(folder, "cifar10").glob("test-*.parquet")) if folder else []
    if not shards:
        return "smooth noise", (255 * _smooth_noise(count)).round().to(torch.uint8)
    import pyarrow.parquet as parquet

    encoded = parquet.read_table(shards[0]).slice(0, count)["image"].to_pylist()
    decoded = [TF.pil_to_tensor(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in encoded]
    return "CIFAR-10 test", torch.stack(decoded)


def open_images(folder: Path) -> tuple[str, Images]:
    """Where the images are from, and the images, decoded into `folder` as every training reads them."""
    data = os.environ.get("ORCHESTRATOR_DATA")
    if data and any(Path(data, "cifar10").glob("test-*.parquet")):
        source, where = "CIFAR-10 test", str(Path(data, "cifar10", "test"))
    else:
        source, where = "smooth noise", str(folder / "pictures")
        os.mkdir(where)
        torch.manual_seed(0)
        for number, image in enumerate(_smooth_noise(2048)):
            TF.to_pil_image(image).save(f"{where}/{number:04d}.png")
    listing = open_source(where, folder / "downloads")
    return source, Images.of(open_catalogue(listing, folder / "cache", pixels=PIXELS))


def _smooth_noise(count: int) -> Tensor:
    """float32 (count, 3, PIXELS, PIXELS) in [0, 1]."""
    coarse = torch.rand(count, 3, PIXELS // 4, PIXELS // 4)
    return F.interpolate(coarse, (PIXELS, PIXELS), mode="bicubic").clamp(0, 1)


class Pictures(Dataset):
    """Decoded PIL images in memory, each given out as what `transform` makes of it."""

    def __init__(self, images: Images, transform) -> None:
        self._pictures = [TF.to_pil_image(image) for image in images.batch(torch.arange(len(images)))]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, row: int):
        return self._transform(self._pictures[row])
