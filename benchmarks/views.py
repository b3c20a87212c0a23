"""Augmented images per second and core: the batched views beside pipelines for one image at a time.

    python -m benchmarks.views [--only jigsaw] [--json FILE]

One thread, CPU time. The contestants take turns within each round, and ratios are the median of each round's, since a
shared machine drifts. All start from decoded images and end in a float32 batch in [0, 1]. The images are CIFAR-10's
where the environment variable ORCHESTRATOR_DATA names a folder with `cifar10/test-*.parquet`, otherwise smooth noise;
those of 96 pixels are the same, enlarged. lightly and albumentations are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from PIL import Image
from torch import Tensor

from benchmarks.pictures import PIXELS, load_images
from benchmarks.turns import Run, core_rates, cpu_name, print_core_rates
from methods.colorization import Colorization, ColorizationConfig, lightness_and_colours
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.losses.colorization import soft_encode
from methods.pirl import PIRL, PIRLConfig
from methods.rotation import Rotation, RotationConfig
from methods.views.batch import to_float
from methods.views.draws import Draws
from methods.views.randaugment import rand_augment
from methods.views.simclr import simclr_augment
from orchestrator.training.loop import keep_freed_memory

LARGE = 96
REQUIRED = {  # contestant, its baseline: how many times faster it has to be
    ("SimCLR, exact colour", "SimCLR, torchvision"): 5.0,
    ("SimCLR, exact colour", "SimCLR, lightly"): 5.0,
    ("SimCLR, linear colour", "SimCLR, torchvision"): 15.0,
    ("SimCLR, linear colour", "SimCLR, lightly"): 15.0,
    ("RandAugment", "RandAugment, torchvision"): 7.0,
    ("jigsaw 96, exact colour", "jigsaw 96, torchvision"): 8.0,
    ("jigsaw 96, linear colour", "jigsaw 96, torchvision"): 20.0,
    ("rotation", "rotation, torchvision"): 5.0,
    ("PIRL", "PIRL, torchvision"): 5.0,
    ("colorization", "colorization, per image"): 5.0,
    ("SimCLR blur 96, exact colour", "SimCLR blur 96, albumentations"): 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="images a batch (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which the median is reported (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--only", default="", metavar="NAME", help="only contestants whose name contains NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as training does; for all contestants, which share this process
    source, images = load_images(options.images)
    runs, missing = contestants(images)
    runs = {name: run for name, run in runs.items() if options.only in name}
    if not runs:
        parser.error(f"--only {options.only}: no contestant's name contains it")
    rates = core_rates(runs, images=len(images), rounds=options.rounds)
    print(f"{len(images)} images of {PIXELS} px, or {LARGE} where it says so ({source})")
    print(f"one thread of {cpu_name()}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; CPU time, {options.rounds} rounds")
    for line in missing:
        print(line)
    median, ratios = print_core_rates(rates, REQUIRED)
    if options.json:
        record = {"images": source, "images_per_core_second": median, "rounds": rates, "ratios": ratios}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def contestants(images: Tensor) -> tuple[dict[str, Run], list[str]]:
    """What is compared, name to (one pass over all images, passes a round), and what is missing. SimCLR: two views."""
    draws = [Draws.of(0, 0, torch.arange(len(images)), view) for view in (0, 1)]
    exact, linear = simclr_augment(PIXELS), simclr_augment(PIXELS, colour="linear")
    pictures = [T.functional.to_pil_image(image) for image in images]
    simclr = T.Compose([
        T.RandomResizedCrop(PIXELS),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.ToTensor(),
    ])  # fmt: skip
    randaugment = T.Compose([T.RandAugment(2, 9, fill=[128] * 3), T.ToTensor()])
    runs = {
        "SimCLR, exact colour": (lambda: [exact(images, view) for view in draws], 8),
        "SimCLR, linear colour": (lambda: [linear(images, view) for view in draws], 8),
        "SimCLR, torchvision": (lambda: [torch.stack([simclr(picture) for picture in pictures]) for _ in draws], 1),
        "RandAugment": (lambda: to_float(rand_augment(images, draws[0], magnitude=9)), 8),
        "RandAugment, torchvision": (lambda: torch.stack([randaugment(picture) for picture in pictures]), 2),
    }
    runs |= puzzles(images, pictures) | large_views(images)
    missing = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightly
            from lightly.transforms import SimCLRTransform
    except ImportError as error:
        missing.append(f"lightly is not installed, skipped ({error})")
    else:
        views = SimCLRTransform(input_size=PIXELS, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
        runs["SimCLR, lightly"] = (
            lambda: [torch.stack(view) for view in zip(*(views(picture) for picture in pictures), strict=True)], 1
        )  # fmt: skip
        missing.append(f"lightly {lightly.__version__}")
    try:
        import albumentations
        import cv2
    except ImportError as error:
        return runs, [*missing, f"albumentations is not installed, skipped ({error})"]
    cv2.setNumThreads(0)
    theirs = albumentations.Compose([
        albumentations.RandomResizedCrop(size=(LARGE, LARGE), scale=(0.08, 1)),
        albumentations.HorizontalFlip(p=0.5),
        albumentations.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
        albumentations.ToGray(p=0.2),
        albumentations.GaussianBlur(blur_limit=(9, 9), sigma_limit=(0.1, 2.0), p=0.5),
    ])  # fmt: skip
    arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in enlarged(images)]

    def one_view() -> Tensor:
        views = torch.stack([torch.from_numpy(theirs(image=array)["image"]) for array in arrays])
        return to_float(views.permute(0, 3, 1, 2).contiguous())

    runs["SimCLR blur 96, albumentations"] = (lambda: [one_view() for _ in draws], 1)
    return runs, [*missing, f"albumentations {albumentations.__version__}"]


def enlarged(images: Tensor) -> Tensor:
    """uint8 (B, 3, LARGE, LARGE)."""
    return F.interpolate(images.float(), (LARGE, LARGE), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def puzzles(images: Tensor, pictures: list[Image.Image]) -> dict[str, Run]:
    """Rotation (four copies of a padded and flipped crop), PIRL with its defaults, colorization's colours and bins."""
    draws = Draws.of(0, 0, torch.arange(len(images)))
    encoder = SmallCNN(SmallCNNConfig(width=0.25))
    crop = T.Compose([T.RandomCrop(PIXELS, padding=4, padding_mode="reflect"), T.RandomHorizontalFlip()])
    to_tensor = T.ToTensor()
    rotation = Rotation(encoder, RotationConfig(), classes=10, images=len(images))
    whole = rotation.views(PIXELS)[0].transform

    def four(picture: Image.Image) -> Tensor:
        cropped = crop(picture)
        return torch.stack([to_tensor(cropped.rotate(90 * quarters)) for quarters in range(4)])

    pirl = PIRL(encoder, PIRLConfig(), classes=10, images=len(images))
    image, puzzle = pirl.views(PIXELS)
    c = pirl.config
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    plain = T.Compose(
        [T.RandomResizedCrop(PIXELS), T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), to_tensor]
    )
    puzzled = T.Compose([T.RandomResizedCrop(PIXELS, scale=(c.puzzle_min_area, 1)), T.RandomHorizontalFlip()])

    def pirl_one(picture: Image.Image) -> tuple[Tensor, Tensor]:
        return plain(picture), tiles_one(puzzled(picture), grid=c.grid, cell=c.cell, tile=c.tile)

    colorization = Colorization(encoder, ColorizationConfig(), classes=10, images=len(images))
    k, sigma, bins = colorization.config.neighbours, colorization.config.sigma, colorization.task.bins
    coloured = colorization.views(PIXELS)[0].transform

    def colours() -> tuple[Tensor, ...]:
        grey, target = lightness_and_colours(coloured(images, draws))
        return grey, *soft_encode(target, bins, neighbours=k, sigma=sigma)

    def colours_one(picture: Image.Image) -> tuple[Tensor, ...]:
        grey, target = lightness_and_colours(to_tensor(crop(picture))[None])
        distance, index = torch.cdist(target.flatten(2)[0].T, bins).topk(k, largest=False)
        return grey, index, (distance.square() / (-2 * sigma**2)).softmax(dim=1)

    def stacked(one: Callable[[Image.Image], tuple[Tensor, ...]]) -> list[Tensor]:
        return [torch.stack(parts) for parts in zip(*(one(picture) for picture in pictures), strict=True)]

    return {
        "rotation": (lambda: rotation.task.puzzle(whole(images, draws), draws), 8),
        "rotation, torchvision": (lambda: torch.cat([four(picture) for picture in pictures]), 1),
        "PIRL": (lambda: (image.transform(images, draws), pirl.tiles(puzzle.transform(images, draws), draws)), 4),
        "PIRL, torchvision": (lambda: stacked(pirl_one), 1),
        "colorization": (colours, 4),
        "colorization, per image": (lambda: stacked(colours_one), 1),
    }


def large_views(images: Tensor) -> dict[str, Run]:
    """At 96 pixels: PIRL's nine jittered tiles of 28 pixels, and two views of SimCLR with blur."""
    large = enlarged(images)
    pictures = [T.functional.to_pil_image(image) for image in large]
    draws = [Draws.of(0, 0, torch.arange(len(images)), view) for view in (0, 1)]
    encoder = SmallCNN(SmallCNNConfig(width=0.25))
    simclr = T.Compose([
        T.RandomResizedCrop(LARGE),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=0.5),
        T.ToTensor(),
    ])  # fmt: skip
    runs: dict[str, Run] = {}
    for colour in ("exact", "linear"):
        config = PIRLConfig(grid=3, cell=LARGE // 3, tile=28, colour=colour)
        tiles = PIRL(encoder, config, classes=10, images=len(images)).tiles
        view = simclr_augment(LARGE, blur=True, colour=colour)
        runs[f"jigsaw 96, {colour} colour"] = (partial(lambda tiles: tiles(to_float(large), draws[0]), tiles), 2)
        runs[f"SimCLR blur 96, {colour} colour"] = (partial(lambda view: [view(large, of) for of in draws], view), 1)
    runs["jigsaw 96, torchvision"] = (
        lambda: torch.stack([tiles_one(picture, grid=3, cell=LARGE // 3, tile=28) for picture in pictures]), 1
    )  # fmt: skip
    runs["SimCLR blur 96, torchvision"] = (
        lambda: [torch.stack([simclr(picture) for picture in pictures]) for _ in draws], 1
    )  # fmt: skip
    return runs


def tiles_one(picture: Image.Image, *, grid: int, cell: int, tile: int) -> Tensor:
    """(grid², 3, tile, tile): an image's tiles in random order, each cropped at random from its cell and jittered."""
    transform = T.Compose([
        T.RandomCrop(tile),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
        T.ToTensor(),
    ])  # fmt: skip
    corners = [(column * cell, row * cell) for row in range(grid) for column in range(grid)]
    order = torch.randperm(len(corners)).tolist()
    return torch.stack([
        transform(picture.crop((left, top, left + cell, top + cell))) for left, top in (corners[i] for i in order)
    ])  # fmt: skip


if __name__ == "__main__":
    main()
