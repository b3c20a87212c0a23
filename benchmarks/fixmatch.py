"""FixMatch with WRN-28-2 at 32 px, 64 labelled and 448 unlabelled images a step: its views, and its whole steps.

    python -m benchmarks.fixmatch [--only views|steps] [--rounds N] [--steps N] [--threads N] [--json FILE] [--quick]

Beside it stand the transforms and the step of USB's package, semilearn, where that is installed.

Views: images per core-second, of one thread's CPU time. A pass makes what one step reads, a weak view of each labelled
image, a weak and a strong one of each unlabelled image, from decoded images to a float32 batch. Contestants:

- ours: the views of `FixMatch`, for a batch at once;
- USB: its dataset and its RandAugment, an image at a time, and the default collation. Its strong view always applies
  three operations and a cutout of random size, where FixMatch's applies each of two in half of the cases;
- one image at a time: the operations of our views, written with PIL as most code for FixMatch has them. The honest
  comparison, since all the work is the same.

Whole steps: steps per second, on the clock, of two threads; a step is everything from decoded images in memory to
updated weights and average. Contestants:

- ours: `train_steps` over two streams, channels-last, in the precision `auto_precision` gives;
- ours, with weak views in a pass of their own that keeps nothing for a gradient, as an option of the method;
- the peer, float32: loaders with one and two workers, its network, one pass over all views, losses, SGD and average, as
  its configuration for CIFAR-10 has them. USB where it is installed; otherwise our network and the views in PIL;
- the peer, tuned: the same, given our precision and memory layout, which a user can switch on as well.

How turns are taken and timed is told in `benchmarks.turns` and in `benchmarks.step_rate`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from benchmarks.pictures import PIXELS, load_images, open_images
from benchmarks.turns import (
    Contestant,
    Run,
    core_rates,
    cpu_name,
    print_core_rates,
    print_speedup,
    print_steps,
    take_turns,
)
from methods.ema import averaged_copy
from methods.encoders import IMAGENET_MEAN, IMAGENET_STD, SmallCNN, SmallCNNConfig, WideResNet, WideResNetConfig
from methods.fixmatch import FixMatch, FixMatchConfig
from methods.heads import classifier
from methods.views.draws import Draws
from orchestrator.data.images import Images
from orchestrator.data.loader import Order
from orchestrator.training.loop import Stream, keep_freed_memory, train_steps
from orchestrator.training.optim import Optim
from orchestrator.training.precision import auto_precision, autocast

CLASSES = 10
LABELLED = 250  # images with a label: this and what follows as in USB's fixmatch_cifar10_250_0.yaml
EMA = 0.999
CONFIDENCE = 0.95
OPTIM = Optim(name="sgd", lr=0.03, momentum=0.9, weight_decay=5e-4, schedule="constant", warmup=0.0)
PEERS = {"usb": "USB", "pil": "one image at a time"}
REQUIRED_VIEWS = {("ours", name): 7.0 for name in PEERS.values()}
REQUIRED_STEPS = {"float32": 4.0, "tuned": 1.3, "tuned, without gradient": 2.0}  # times as fast as the peer


@dataclass(frozen=True)
class Size:
    """The network and the batch: `labelled` images, and `ratio` unlabelled ones for each of them."""

    depth: int
    width: int
    labelled: int
    ratio: int

    @property
    def unlabelled(self) -> int:
        return self.labelled * self.ratio


FULL, QUICK = Size(depth=28, width=2, labelled=64, ratio=7), Size(depth=10, width=1, labelled=8, ratio=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("views", "steps"), help="only one of the two parts")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median is reported (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a training process (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--quick", action="store_true", help="a small network and batch, two rounds: a smoke test")
    options = parser.parse_args()
    size, rounds = (QUICK, 2) if options.quick else (FULL, options.rounds)
    usb = find_usb()
    load = os.getloadavg()[0]
    print(f"FixMatch, WRN-{size.depth}-{size.width}, {size.labelled} labelled and {size.unlabelled} unlabelled images "
          f"of {PIXELS} px a step")  # fmt: skip
    print(f"{cpu_name()}; {rounds} rounds; load average {load:.1f} at the start; torch {torch.__version__}")
    print(f"semilearn {usb.version}" if usb else "semilearn is not installed: see benchmarks/README.md", flush=True)
    record: dict = {
        "cpu": cpu_name(), "torch": torch.__version__, "semilearn": usb.version if usb else None,
        "size": asdict(size), "load_at_start": load,
    }  # fmt: skip
    if options.only != "steps":
        record["views"] = compare_views(size, usb, rounds=rounds)
    if options.only != "views":
        record["steps"] = compare_steps(size, usb, rounds=rounds, steps=options.steps, threads=options.threads)
    record["load_at_end"] = os.getloadavg()[0]
    print(f"\nload average {record['load_at_end']:.1f} at the end")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


# ---- views


def compare_views(size: Size, usb: Usb | None, *, rounds: int) -> dict:
    """Times the views of one step, prints the tables, and returns their numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    keep_freed_memory()  # as training does; for all contestants, which share this process
    source, images = load_images(size.labelled + size.unlabelled)
    print(f"\nviews of {len(images)} images ({source}), one thread")
    rates = core_rates(view_runs(images, size, usb), images=len(images), rounds=rounds)
    median, ratios = print_core_rates(rates, REQUIRED_VIEWS)
    torch.set_num_threads(threads)
    return {"images": source, "images_per_core_second": median, "rounds": rates, "ratios": ratios}


def view_runs(images: Tensor, size: Size, usb: Usb | None) -> dict[str, Run]:
    """What makes the views of one step's images, uint8 (B, 3, H, W), labelled ones first, by contestant's name."""
    cut = slice(size.labelled), slice(size.labelled, None)
    method = FixMatch(SmallCNN(SmallCNNConfig(width=0.25)), FixMatchConfig(), classes=CLASSES, images=len(images))
    views = method.views(PIXELS)
    streams = dict(zip(("labelled", "unlabelled"), (images[part] for part in cut), strict=True))

    def ours() -> list[Tensor]:
        return [
            view.transform(streams[view.stream], Draws.of(0, 0, torch.arange(len(streams[view.stream])), number))
            for number, view in enumerate(views)
        ]

    def collated(peer: Peer) -> Callable[[], object]:
        labels = torch.arange(len(images)) % CLASSES
        sets = [
            (peer.dataset(images[part], labels[part], unlabelled=bool(number)), len(images[part]))
            for number, part in enumerate(cut)
        ]
        return lambda: [default_collate([dataset[row] for row in range(rows)]) for dataset, rows in sets]

    runs: dict[str, Run] = {"ours": (ours, 8)}
    if usb:
        runs[PEERS["usb"]] = (collated(usb), 1)
    return runs | {PEERS["pil"]: (collated(OneAtATime()), 1)}


# ---- whole steps


def compare_steps(size: Size, usb: Usb | None, *, rounds: int, steps: int, threads: int) -> dict:
    """Times whole steps of all contestants, prints the table, and returns its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        source, images = open_images(Path(folder))
        kind = "usb" if usb else "pil"
        precision = auto_precision(new_encoder(size))
        print(f"\nwhole steps over {len(images):,} images ({source}), {threads} threads", flush=True)
        ours, lean = f"ours ({precision}, channels-last)", "ours, weak views without gradient"
        plain, tuned = f"{PEERS[kind]} (float32)", f"{PEERS[kind]} ({precision}, channels-last)"
        timings = take_turns(
            {
                ours: Contestant(Ours, threads, size, images, precision, False),
                lean: Contestant(Ours, threads, size, images, precision, True),
                plain: Contestant(Plain, threads, kind, size, images, "float32", False),
                tuned: Contestant(Plain, threads, kind, size, images, precision, True),
            },
            rounds=rounds, untimed=1, steps=steps,
        )  # fmt: skip
        print_steps(f"{steps} timed steps a turn", timings)
        over = {"float32": (ours, plain), "tuned": (ours, tuned), "tuned, without gradient": (lean, tuned)}
        ratios = [print_speedup(timings, *pair, required=REQUIRED_STEPS[name]) for name, pair in over.items()]
    return {
        "images": source, "threads": threads, "steps": steps, "wall_seconds": timings.wall,
        "core_seconds": timings.core, "loss": timings.loss, "ratios": ratios,
    }  # fmt: skip


class Ours:
    """The training loop of this package."""

    def __init__(self, size: Size, images: Images, precision: str, weak_no_grad: bool) -> None:
        config = FixMatchConfig(weak_no_grad=weak_no_grad, min_confidence=CONFIDENCE)
        torch.manual_seed(0)
        method = FixMatch(new_encoder(size), config, classes=CLASSES, images=len(images))
        method = method.to(memory_format=torch.channels_last).train()
        label = labels_of(images)[:LABELLED]
        streams = (
            Stream("labelled", images, Order(len(label), size.labelled, seed=1), label, rows=torch.arange(len(label))),
            Stream("unlabelled", images, Order(len(images), size.unlabelled, seed=2)),
        )
        self._steps = train_steps(
            method, method, streams, OPTIM.build(method), OPTIM, pixels=PIXELS, start=0, total=1_000_000, seed=0,
            precision=precision, average=averaged_copy(method), ema=EMA,
        )  # fmt: skip

    def turn(self) -> Iterator[Tensor]:
        """The losses of one turn's steps, each after its update."""
        return (step.losses["loss"] for step in self._steps)


class Plain:
    """A peer's step, by the configuration that USB ships for FixMatch on CIFAR-10 with 250 labels."""

    def __init__(self, kind: str, size: Size, images: Images, precision: str, channels_last: bool) -> None:
        torch.manual_seed(0)
        random.seed(0)
        peer = new_peer(kind)
        self._precision = precision
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._network = peer.network(size).to(memory_format=self._layout).train()
        self._average = averaged_copy(self._network)
        pixels, label = images.batch(torch.arange(len(images))), labels_of(images)
        self._sets = (
            peer.dataset(pixels[:LABELLED], label[:LABELLED], unlabelled=False),
            peer.dataset(pixels, label, unlabelled=True),  # the labelled ones among them, as is its default
        )
        self._rows, self._batches = (len(label[:LABELLED]), len(label)), (size.labelled, size.unlabelled)
        weights = list(self._network.parameters())
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.SGD(groups, lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=OPTIM.nesterov)

    def turn(self) -> Iterator[Tensor]:
        """The losses of one turn's steps, each after its update; the workers are new, and end with the iterator."""
        loaders = [
            DataLoader(
                dataset, batch, sampler=RandomSampler(range(rows), replacement=True, num_samples=1_000_000),
                num_workers=workers, drop_last=True, multiprocessing_context="fork",  # not a contestant's spawn
            )
            for dataset, rows, batch, workers in zip(self._sets, self._rows, self._batches, (1, 2), strict=True)
        ]  # fmt: skip
        for labelled, unlabelled in zip(*loaders, strict=True):
            views = labelled["x_lb"], unlabelled["x_ulb_w"], unlabelled["x_ulb_s"]
            images = torch.cat(views).to(memory_format=self._layout)
            with autocast(self._precision, "cpu"):
                logits = self._network(images)
                parts = logits.split([len(view) for view in views])
                loss = fixmatch_loss(*parts, label=labelled["y_lb"], min_confidence=CONFIDENCE)
            loss.backward()
            self._optimizer.step()
            self._network.zero_grad()
            self._follow()
            yield loss.detach()

    @torch.no_grad()
    def _follow(self) -> None:
        for mine, theirs in zip(self._average.parameters(), self._network.parameters(), strict=True):
            mine.copy_(EMA * mine + (1 - EMA) * theirs)
        for kept, live in zip(self._average.buffers(), self._network.buffers(), strict=True):
            kept.copy_(live)


def fixmatch_loss(labelled: Tensor, weak: Tensor, strong: Tensor, *, label: Tensor, min_confidence: float) -> Tensor:
    """FixMatch's loss in plain code, of logits and with weight 1: Sohn et al. 2020, arXiv:2001.07685, eq. 3 and 4."""
    probability = weak.detach().softmax(dim=1)
    confidence, pseudo = probability.max(dim=1)
    mask = (confidence >= min_confidence).float()
    return F.cross_entropy(labelled, label) + (F.cross_entropy(strong, pseudo, reduction="none") * mask).mean()


def new_encoder(size: Size) -> WideResNet:
    """With FixMatch's slope and momentum, which USB's has too."""
    return WideResNet(WideResNetConfig(depth=size.depth, width=size.width, slope=0.1, norm_momentum=0.001))


def labels_of(images: Images) -> Tensor:
    """(N,) int64, made up where the images have none: that changes no rate."""
    return torch.from_numpy(images.label) if images.labelled.all() else torch.arange(len(images)) % CLASSES


# ---- peers


class Peer(ABC):
    """What a peer trains on and with."""

    @abstractmethod
    def network(self, size: Size) -> nn.Module:
        """Images (B, 3, H, W), as its dataset gives them, to logits (B, CLASSES)."""

    @abstractmethod
    def dataset(self, images: Tensor, label: Tensor, *, unlabelled: bool) -> Dataset:
        """Of uint8 images (N, 3, H, W) and labels: items with "x_lb" and "y_lb", or with "x_ulb_w" and "x_ulb_s"."""


class OneAtATime(Peer):
    """The operations of our views, one image at a time, with PIL and torchvision."""

    def network(self, size: Size) -> nn.Module:
        encoder = new_encoder(size)
        return nn.Sequential(encoder, classifier(encoder.dim, CLASSES, 0.0))  # the encoder normalises

    def dataset(self, images: Tensor, label: Tensor, *, unlabelled: bool) -> Dataset:
        return PilViews([TF.to_pil_image(image) for image in images], label.tolist(), unlabelled=unlabelled)


class PilViews(Dataset):
    """Decoded PIL images in memory, given out as their views, under USB's names."""

    def __init__(self, pictures: list[Image.Image], label: list[int], *, unlabelled: bool) -> None:
        self._pictures, self._label, self._unlabelled = pictures, label, unlabelled
        self._move = T.Compose([T.RandomCrop(PIXELS, padding=4, padding_mode="reflect"), T.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, row: int) -> dict:
        picture = self._pictures[row]
        weak = TF.to_tensor(self._move(picture))
        if not self._unlabelled:
            return {"x_lb": weak, "y_lb": self._label[row]}
        return {"x_ulb_w": weak, "x_ulb_s": TF.to_tensor(strong_one(self._move(picture)))}


GREY = (128, 128, 128)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


PIL_OPS: Mapping[str, Callable[[Image.Image, int, int], Image.Image]] = {  # of an image, a level in 1 .. 9, and a sign
    "identity": lambda image, level, sign: image,
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(0.4 * level)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(25.6 * level)),
    "color": lambda image, level, sign: ImageEnhance.Color(image).enhance(0.1 + 0.18 * level),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(0.1 + 0.18 * level),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 0.18 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 0.18 * level),
    "rotate": lambda image, level, sign: image.rotate(sign * int(3 * level), fillcolor=GREY),
    "shear_x": lambda image, level, sign: _affine(image, 1, sign * 0.03 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.03 * level, 1, 0),
    "translate_x": lambda image, level, sign: _affine(image, 1, 0, sign * level, 0, 1, 0),
    "translate_y": lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * level),
}


def strong_one(image: Image.Image) -> Image.Image:
    """Two operations, each in half of the cases, and a grey square of half the side around a random pixel."""
    for name in random.choices(list(PIL_OPS), k=2):
        if random.random() < 0.5:
            image = PIL_OPS[name](image, random.randint(1, 9), random.choice((-1, 1)))
    image = image.copy()  # an operation may have given out the image itself
    side = image.width // 2
    left, top = random.randrange(image.width) - side // 2, random.randrange(image.height) - side // 2
    ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=GREY)
    return image


class Usb(Peer):
    """USB's package: its network, its dataset and its transforms, as `get_cifar` there puts them together."""

    def __init__(self, folder: str) -> None:
        with bare_packages(folder, "semilearn", "nets", "nets.wrn", "datasets", "datasets.cv_datasets"):
            from semilearn.datasets.augmentation import RandAugment
            from semilearn.datasets.cv_datasets.datasetbase import BasicDataset
            from semilearn.nets.wrn.wrn import WideResNet as Network
        self.version = importlib.metadata.version("semilearn")
        self._network, self._dataset = Network, BasicDataset
        move = [T.Resize(PIXELS), T.RandomCrop(PIXELS, padding=PIXELS // 8, padding_mode="reflect")]
        move += [T.RandomHorizontalFlip()]
        self._weak = T.Compose([*move, T.ToTensor()])
        self._strong = T.Compose([*move, RandAugment(3, 5), T.ToTensor()])

    def network(self, size: Size) -> nn.Module:
        network = self._network(first_stride=1, num_classes=CLASSES, depth=size.depth, widen_factor=size.width)
        return nn.Sequential(T.Normalize(IMAGENET_MEAN, IMAGENET_STD), network, Logits())  # there at the end of a view

    def dataset(self, images: Tensor, label: Tensor, *, unlabelled: bool) -> Dataset:
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        return self._dataset("fixmatch", arrays, label.tolist(), CLASSES, self._weak, unlabelled, self._strong, False)


class Logits(nn.Module):
    def forward(self, found: Mapping[str, Tensor]) -> Tensor:
        return found["logits"]


@contextmanager
def bare_packages(folder: str, package: str, *inner: str) -> Iterator[None]:
    """Inside, these packages are empty but for their modules; afterwards nothing was imported.

    USB's own `__init__` files read audio and text data sets, and with them a dozen packages that nothing here needs.
    """
    for name in (package, *(f"{package}.{name}" for name in inner)):
        module = ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def find_usb() -> Usb | None:
    """USB's package where it is installed; of it nothing is imported but what is needed."""
    found = importlib.util.find_spec("semilearn")
    return Usb(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def new_peer(kind: str) -> Peer:
    peer = find_usb() if kind == "usb" else OneAtATime()
    assert peer is not None
    return peer


if __name__ == "__main__":
    main()
