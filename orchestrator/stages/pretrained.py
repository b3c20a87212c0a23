"""A model from elsewhere: a timm network, or a file of weights, as a checkpoint that every stage can read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from methods.distillation import ForeignModel, ForeignModelConfig
from methods.encoders import Encoder, Timm, TimmConfig
from orchestrator.artifacts import Checkpoint
from orchestrator.component import Component
from orchestrator.context import Context
from orchestrator.errors import UserError, nearest
from orchestrator.stage import Stage, Wiring
from orchestrator.training.precision import auto_precision

WRAPPED = ("state_dict", "model_state_dict", "model", "module", "net")  # where training scripts put the weights
CONSTANTS = ("mean", "std")  # an encoder's own, which no other code saves
COUNTER = "num_batches_tracked"  # old files lack it; nothing that is computed depends on it
SHOWN = 3  # names an error lists
TOLERANCE = 1e-3  # of logits computed in two orders


@dataclass(frozen=True, kw_only=True)
class Pretrained(Stage):
    """Read a model that was trained elsewhere.

    `encoder` says how it is built. `weights` is a file, .safetensors or a pickled state dict; without one a Timm
    encoder with `pretrained: true` brings its published weights, and any other encoder is left as it is drawn.
    torchvision's published weights are timm's too, by names that end in .tv_in1k. A file of torchvision's ResNets fits
    `methods.encoders.ResNet` and Timm.

    With `classes`, its own in the order of its outputs, its head is read too. With `class_map`, it is read as a
    classifier of the data's classes: for each of them the outputs that mean it, by name, by number or, as in "151-268",
    by a range of numbers. Without both it has features alone.
    """

    encoder: Component
    pixels: int  # of the images it will look at, the recipe's
    weights: str | None = None  # a file's path, which enters the key by its content alone
    classes: tuple[str, ...] = ()
    class_map: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()  # beginnings of the names in the file that are not wanted, such as projector
    mean: tuple[float, float, float] | None = None  # what its images are normalised by; None: what timm knows of it,
    std: tuple[float, float, float] | None = None  # and else ImageNet's
    precision: Literal["auto", "float32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise ValueError(f"pixels = {self.pixels}: must be >= 1")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name, count in Counter(self.classes).items() if count > 1)
            raise ValueError(f"classes: {twice} is named twice")
        if self.std is not None and not min(self.std) > 0:
            raise ValueError(f"std = {list(self.std)}: must be > 0, it divides")

    # what is asked, before anything runs

    @property
    def method(self) -> Component:
        """What the checkpoint holds; its outputs and groups depend on the weights and the data."""
        return Component("methods.distillation.ForeignModel", ForeignModelConfig())

    @property
    def is_classifier(self) -> bool:
        """Whether its head is read."""
        return bool(self.classes or self.class_map)

    def vocabulary(self, wiring: Wiring) -> tuple[str, ...]:
        return wiring.classes if self.class_map else self.classes

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self.pixels != wiring.pixels:
            found.append(("pixels", f"{self.pixels}: the recipe's images have {wiring.pixels}; use that"))
        try:
            self._check_encoder()
        except UserError as error:
            return [*found, ("encoder", str(error))]
        if self.weights and self._published:
            found.append(("weights", "and pretrained: true are two sources of weights; leave one out"))
        elif self.is_classifier and not self.weights and not self._published:
            found.append(("weights", "missing: a head as it is drawn tells no classes apart; leave out classes and "
                          "class_map, or give a file"))  # fmt: skip
        if found:
            return found
        try:
            outputs = self._outputs()
            self._groups(wiring.classes, outputs)
        except UserError as error:
            field_name, _, message = str(error).partition(": ")
            known = {f.name for f in dataclasses.fields(self)}
            found.append((field_name, message) if field_name in known else ("weights", str(error)))
        return found

    def resolved(self, wiring: Wiring) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.weights:
            found["weights"] = f"sha256:{_digest(self.weights)}"
        if self.precision == "auto":
            with torch.device("meta"):
                found["precision"] = auto_precision(self._bare())
        return found

    def work(self, wiring: Wiring) -> dict[str, Any]:
        with torch.device("meta"):
            return {"parameters": sum(p.numel() for p in self._bare().parameters())}

    # the answer

    def run(self, context: Context) -> Checkpoint:
        torch.manual_seed(context.seed)
        encoder, config = self._bare(), self.encoder.config
        facts: dict[str, Any] = {"source": "as drawn"}
        head: tuple[Tensor, Tensor] | None = None
        if self._published:
            facts["source"] = f"timm {config.name}"
            head = self._fill(encoder, _published(config.name), config.name)
        elif self.weights:
            facts |= {"source": "file", "sha256": _digest(self.weights)}
            head = self._fill(encoder, _read(self.weights), Path(self.weights).name)
        else:
            context.notice("its weights are as they are drawn: no file and nothing published was asked for")
        classes, settings = self.classes, ForeignModelConfig()
        if head is not None:
            groups = self._groups(context.classes, len(head[0]))
            classes = context.classes if groups else self.classes
            settings = ForeignModelConfig(outputs=len(head[0]), groups=groups)
        model = ForeignModel(encoder, settings, classes=len(classes), images=0)
        if head is not None:
            assert model.head is not None
            model.head[1].load_state_dict({"weight": head[0], "bias": head[1]})
        facts |= {"classes": len(classes), "outputs": settings.outputs,
                  "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
        precision = auto_precision(encoder) if self.precision == "auto" else self.precision
        return Checkpoint.write(
            context.output, state=model.state_dict(), encoder=self._plain, method=Component(self.method.use, settings),
            classes=classes, images=0, pixels=self.pixels, precision=precision, curves=[],
            facts={**facts, "precision": precision},
        )  # fmt: skip

    @property
    def _published(self) -> bool:
        return isinstance(self.encoder.config, TimmConfig) and self.encoder.config.pretrained

    @property
    def _plain(self) -> Component:
        """The encoder without a wish for published weights: the checkpoint has them."""
        if not self._published:
            return self.encoder
        return dataclasses.replace(self.encoder, config=dataclasses.replace(self.encoder.config, pretrained=False))

    def _bare(self) -> Encoder:
        return self._plain.cls(self._plain.config)

    def _check_encoder(self) -> None:
        """Whether it can be built, reads images of this size and, with a head, is all there is before the head."""
        try:
            encoder = self._bare().eval()
            with torch.no_grad():
                image = torch.rand(1, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(0))
                found = encoder(image, normalised=True)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise UserError(f"does not read images of {self.pixels} px: {str(error).splitlines()[0]}") from error
        if not (isinstance(encoder, Timm) and self.is_classifier):
            return
        name = self.encoder.config.name
        whole = timm.create_model(name, pretrained=False, num_classes=3).eval()
        head = whole.get_classifier()
        alike = isinstance(head, nn.Linear) and head.in_features == encoder.dim
        if alike:
            encoder.net.load_state_dict(whole.state_dict(), strict=False)
            with torch.no_grad():
                found = encoder(image, normalised=True)
                alike = torch.allclose(head(found), whole(image), rtol=TOLERANCE, atol=TOLERANCE)
        if not alike:
            raise UserError(f"{name}: its head is more than a linear layer on the mean over places, so its classes "
                            "cannot be read; leave out classes and class_map to use its features, or take another "
                            "network, such as a resnet or efficientnet")  # fmt: skip

    def _outputs(self) -> int:
        """How many classes its own head tells apart, 0 without one; reads the file, and fetches nothing."""
        if self.weights:
            head = self._fill(self._bare(), _read(self.weights), Path(self.weights).name)
            outputs = 0 if head is None else len(head[0])
        elif self._published and self.is_classifier:
            outputs = timm.get_pretrained_cfg(self.encoder.config.name).num_classes
        else:
            return 0
        if self.classes and len(self.classes) != outputs:
            raise UserError(f"classes: {len(self.classes)} are named, the model has {outputs} outputs")
        return outputs

    def _groups(self, wanted: tuple[str, ...], outputs: int) -> tuple[tuple[int, ...], ...]:
        """For each class of the data the outputs that mean it; empty without a map."""
        if not self.class_map:
            return ()
        for name in self.class_map:
            if name not in wanted:
                raise UserError(f"class_map: {name} is no class of the data{nearest(name, wanted)}")
        if lacking := [name for name in wanted if not self.class_map.get(name)]:
            raise UserError(f"class_map: says nothing of {', '.join(lacking)}; every class of the data needs an output")
        groups = tuple(
            tuple(output for given in self.class_map[name] for output in self._numbers(given, outputs))
            for name in wanted
        )
        often = Counter(output for group in groups for output in group)
        if twice := next((output for output, count in often.items() if count > 1), None):
            called = f"{twice} ({self.classes[twice]})" if self.classes else str(twice)
            raise UserError(f"class_map: output {called} is named twice; it may mean one class only")
        return groups

    def _numbers(self, given: int | str, outputs: int) -> range:
        if isinstance(given, str) and given in self.classes:
            number = self.classes.index(given)
            return range(number, number + 1)
        first, _, last = str(given).partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            hint = nearest(str(given), self.classes)
            raise UserError(f"class_map: {given} is none of the model's classes{hint}" if self.classes else
                            f"class_map: {given}: name outputs by number, or give their names by classes")  # fmt: skip
        found = range(int(first), int(last or first) + 1)
        if not found or found[-1] >= outputs:
            raise UserError(f"class_map: {given}: the model's outputs are 0 to {outputs - 1}")
        return found

    def _fill(self, encoder: Encoder, given: dict[str, Tensor], where: str) -> tuple[Tensor, Tensor] | None:
        """Put the given weights into the encoder; weight (K, dim) and bias (K,) of the head, where it is wanted."""
        given = {name: value for name, value in given.items() if not name.startswith(self.ignore)}
        own = encoder.state_dict()
        place = _places(own, given)
        kind = type(encoder).__name__
        if not place:
            raise UserError(f"{where}: holds none of {kind}'s weights, such as {_few(list(own), '')}, but "
                            f"{_few(list(given), 'nothing')}; name the encoder that it was trained with")  # fmt: skip
        rest = [name for name in given if name not in place.values() and not name.endswith(COUNTER)]
        linear, rest = _head(rest, given, encoder.dim)
        missing = [name for name in own if name not in place and name not in CONSTANTS and not name.endswith(COUNTER)]
        shapes = [
            f"{there} is {_shape(given[there])}, needed {_shape(own[here])}"
            for here, there in place.items() if given[there].shape != own[here].shape
        ]  # fmt: skip
        wrong = [
            *([f"lacks {len(missing)} of {kind}'s weights ({_few(missing, '')})"] if missing else []),
            *([f"holds {len(rest)} unknown ones ({_few(rest, '')}), which `ignore` can leave out"] if rest else []),
            *([f"{len(shapes)} of another shape ({_few(shapes, '')})"] if shapes else []),
        ]  # fmt: skip
        if self.is_classifier and linear is None:
            wrong.append(f"holds no head, a linear layer on {encoder.dim} numbers; leave out classes and class_map")
        if wrong:
            raise UserError(f"{where}: {'; '.join(wrong)}")
        encoder.load_state_dict({**own, **{here: given[there].to(own[here].dtype) for here, there in place.items()}})
        self._normalise(encoder, set(place))
        if not self.is_classifier or linear is None:
            return None
        weight = given[f"{linear}.weight"].float()
        return weight, given.get(f"{linear}.bias", torch.zeros(len(weight))).float()

    def _normalise(self, encoder: Encoder, placed: set[str]) -> None:
        known = encoder.net.pretrained_cfg if isinstance(encoder, Timm) else {}
        for name in CONSTANTS:
            value = getattr(self, name) or (None if name in placed else known.get(name))
            if value is not None:
                getattr(encoder, name).copy_(torch.tensor(value)[:, None, None])


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published(name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client has its own for every kind of broken network
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: its published weights are not to be had here ({line}); where there is a network, "
                        "save the model's state_dict() to a file, and give that as weights") from error  # fmt: skip


def _read(path: str) -> dict[str, Tensor]:
    """A file's tensors by name, without whatever a training script wrapped them in. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"weights: {path}: no such file")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for a file that is not what it says
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file.name}: is no file of weights that can be opened without running code from it ({line}); "
                        "save the model's state_dict(), best as .safetensors") from error  # fmt: skip
    while isinstance(found, Mapping) and (inner := next((w for w in WRAPPED if _is_weights(found.get(w))), None)):
        found = found[inner]
    if not _is_weights(found):
        held = f"the entries {_few(list(map(str, found)), '')}" if isinstance(found, Mapping) else type(found).__name__
        raise UserError(f"{file.name}: holds {held}, not weights by name; save the model's state_dict()")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        any(isinstance(v, Tensor) for v in value.values()) or any(_is_weights(value.get(w)) for w in WRAPPED)
    )


def _places(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Own name to the name in the file: the same after what a wrapper put before all of them, or without `net.`."""
    best: dict[str, str] = {}
    for cut in ("net.", ""):
        names = {name.removeprefix(cut): name for name in own}
        parts = [(given_name.split("."), given_name) for given_name in given]
        before = Counter(
            ".".join(part[:place]) for part, _ in parts for place in range(len(part))
            if ".".join(part[place:]) in names
        )  # fmt: skip
        for prefix, _ in before.most_common(1):
            start = f"{prefix}." if prefix else ""
            found = {here: start + there for there, here in names.items() if start + there in given}
            best = found if len(found) > len(best) else best
    return best


def _head(rest: list[str], given: Mapping[str, Tensor], dim: int) -> tuple[str | None, list[str]]:
    """(the name of a linear layer on the feature, what is left without it); None where there is none or several."""
    found = [
        name.removesuffix(".weight") for name in rest
        if name.endswith(".weight") and given[name].ndim == 2 and given[name].shape[1] == dim
    ]  # fmt: skip
    if len(found) != 1:
        return None, rest
    return found[0], [name for name in rest if name not in (f"{found[0]}.weight", f"{found[0]}.bias")]


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"


def _few(names: list[str], none: str) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else none
