"""Every `Method` of `methods`, found and not registered, and the small batches that tests of all of them share."""

import importlib
import inspect
import pkgutil

import torch
from torch import nn

import methods
from methods.base import Method
from methods.ema import averaged_copy
from methods.encoders import SmallCNN, SmallCNNConfig
from methods.supervised import Supervised, SupervisedConfig
from methods.views.draws import Draws

CLASSES, PIXELS, BATCH = 3, 16, 4


def every_method():
    for info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"methods.{info.name}")
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Method)
                and not inspect.isabstract(cls)
                and cls.__module__ == module.__name__
            ):
                yield cls


METHODS = list(every_method())


def build(cls, norm="batch", images=BATCH, **changes):
    torch.manual_seed(0)
    encoder = SmallCNN(SmallCNNConfig(width=0.25, norm=norm))
    required = {"teacher_dim": 64} if cls.__name__ == "EmbeddingDistillation" else {}  # as of the teacher below
    return lend(cls(encoder, cls.Config(**required | changes), classes=CLASSES, images=images))


def lend(method):
    """The method with the average and the teacher that training would lend it."""
    torch.manual_seed(1)
    encoder = SmallCNN(SmallCNNConfig(width=0.25))
    teacher = Supervised(encoder, SupervisedConfig(), classes=CLASSES, images=0).to(next(method.parameters()).dtype)
    method.attach()  # a copy must not hold an earlier one
    method.attach(average=averaged_copy(method), teacher=averaged_copy(teacher))
    return method


def pictures(seed=0, rows=BATCH, height=PIXELS, width=PIXELS):
    """uint8 noise for each stream."""
    rng = torch.Generator().manual_seed(seed)
    return {
        s: torch.randint(256, (rows, 3, height, width), generator=rng, dtype=torch.uint8)
        for s in ("labelled", "unlabelled")
    }


def batch_of(method, seed=0, rows=BATCH, pixels=PIXELS, images=None):
    """A batch as the loader gives it, of `images` by stream, or of noise."""
    images = images or pictures(seed, rows, pixels, pixels)
    rows = len(images["unlabelled"])
    index = torch.arange(rows)
    batch = {f"{name}.index": index for name in images}
    batch |= {f"{name}.key": Draws.of(seed, 0, index, -1).key for name in images}
    for number, view in enumerate(method.views(pixels)):
        batch[view.name] = view.transform(images[view.stream], Draws.of(seed, 0, index, number))
    batch["label"] = torch.arange(rows) % CLASSES
    rng = torch.Generator().manual_seed(seed + 1)
    batch["target"] = torch.randn(rows, CLASSES, generator=rng).softmax(dim=1)
    return batch


def steps(cls):
    """After how many steps every weight has had a gradient."""
    return 4 if cls.skips_weights else 1


def double(cls, norm="batch", images=BATCH):
    """`build` in double precision, without dropout, which is drawn from the process's generator; norms are of one kind
    in heads too."""
    method = build(cls, norm, images)
    for module in method.modules():
        for name, child in module.named_children():
            if norm == "group" and isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
            if isinstance(child, nn.Dropout):
                child.p = 0.0
    return lend(method.double())


def double_batch(method, seed=0, images=None):
    """`batch_of` for it."""
    batch = batch_of(method, seed, images=images)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
