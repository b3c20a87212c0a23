"""Augmented images per second and core: the batched views beside the per-image pipelines of torchvision and lightly.

    python -m benchmarks.views [--json FILE]

One thread, CPU time. The contestants take turns within each round, and ratios are the median of each round's, since a
shared machine drifts. All start from decoded images and end in a float32 batch in [0, 1]. The images are CIFAR-10's
where the environment variable ORCHESTRATOR_DATA names a folder with `cifar10/test-*.parquet`, otherwise smooth noise.
lightly is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from PIL import Image
from torch import Tensor

from methods.views.batch import to_float
from methods.views.draws import Draws
from methods.views.randaugment import rand_augment
from methods.views.simclr import simclr_augment

PIXELS = 32
REQUIRED = {  # contestant, its baseline: how many times faster it has to be
    ("SimCLR, exact colour", "SimCLR, torchvision"): 5.0,
    ("SimCLR, exact colour", "SimCLR, lightly"): 5.0,
    ("SimCLR, linear colour", "SimCLR, torchvision"): 15.0,
    ("SimCLR, linear colour", "SimCLR, lightly"): 15.0,
    ("RandAugment", "RandAugment, torchvision"): 7.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="images a batch (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which the median is reported (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source, images = load_images(options.images)
    runs, missing = contestants(images)
    rates = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, (run, repeats) in runs.items():
            seconds = cpu_seconds(run, repeats)
            if number:  # the first round warms caches up
                rates[name].append(repeats * len(images) / seconds)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(images)} images of {PIXELS} px ({source}), one thread of {platform.processor() or platform.machine()}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; CPU time, {options.rounds} rounds")
    for line in missing:
        print(line)
    print(f"\n{'images per core-second':34}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name, values in rates.items():
        print(f"{name:34}{median[name]:10,.0f}{min(values):10,.0f}{max(values):10,.0f}")
    print(f"\n{'ratio':60}{'measured':>10}{'required':>10}")
    ratios = []
    for (name, baseline), required in REQUIRED.items():
        if baseline in median:
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[baseline], strict=True))
            ratios.append({"contestant": name, "baseline": baseline, "ratio": ratio, "required": required})
            verdict = "met" if ratio >= required else "NOT MET"
            print(f"{name + ' / ' + baseline:60}{ratio:10.1f}{required:10.0f}  {verdict}")
    if options.json:
        record = {"images": source, "images_per_core_second": median, "rounds": rates, "ratios": ratios}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def load_images(count: int) -> tuple[str, Tensor]:
    """Where the images are from, and `count` of them: uint8 (count, 3, PIXELS, PIXELS)."""
    folder = os.environ.get("ORCHESTRATOR_DATA")
    shards = sorted(Path(folder, "cifar10").glob("test-*.parquet")) if folder else []
    if not shards:
        coarse = torch.rand(count, 3, PIXELS // 4, PIXELS // 4)
        smooth = F.interpolate(coarse, (PIXELS, PIXELS), mode="bicubic").clamp(0, 1)
        return "smooth noise", (255 * smooth).round().to(torch.uint8)
    import pyarrow.parquet as parquet

    encoded = parquet.read_table(shards[0]).slice(0, count)["image"].to_pylist()
    decoded = [T.functional.pil_to_tensor(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in encoded]
    return "CIFAR-10 test", torch.stack(decoded)


def contestants(images: Tensor) -> tuple[dict[str, tuple[Callable[[], object], int]], list[str]]:
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightly
            from lightly.transforms import SimCLRTransform
    except ImportError as error:
        return runs, [f"lightly is not installed, skipped ({error})"]
    views = SimCLRTransform(input_size=PIXELS, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    runs["SimCLR, lightly"] = (
        lambda: [torch.stack(view) for view in zip(*(views(picture) for picture in pictures), strict=True)], 1
    )  # fmt: skip
    return runs, [f"lightly {lightly.__version__}"]


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
