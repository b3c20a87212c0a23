"""A stage is a question: its fields are the configuration, the keywords of `run` its inputs, its return the answer."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from methods.base import is_classifier
from orchestrator.artifacts import Artifact, Checkpoint, Decision
from orchestrator.data.images import Images


class StopRound(Exception):
    """A guard refuses to go on with this round; the message says what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages. `run(self, context, *, name: Kind, ...) -> Artifact` is written by each, with own inputs."""

    scores_test: ClassVar[bool] = False  # may read the test split: nothing learns or chooses by its answer
    takes_several: ClassVar[frozenset[str]] = frozenset()  # inputs whose images may have several labels
    version: ClassVar[int] = 1  # raised by hand when the same configuration would now answer differently

    def vocabulary(self, wiring: Wiring) -> tuple[str, ...]:
        """The classes its answer speaks of: the data's own, unless it makes others."""
        return wiring.classes

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        """(field, message) of what is wrong with this stage among its neighbours, found before anything runs."""
        return []

    def resolved(self, wiring: Wiring) -> dict[str, Any]:
        """Choices left to rules, such as `precision: auto`, resolved: part of the key unless they are the default."""
        return {}

    def work(self, wiring: Wiring) -> dict[str, Any]:
        """How much it is, for `plan`: steps, images, parameters."""
        return {}


@dataclass(frozen=True)
class Wiring:
    """What a stage may know before anything runs: its inputs' stages or images, and the data's classes."""

    images: Mapping[str, tuple[Images, ...]]  # input name to the splits it reads
    stages: Mapping[str, tuple[Stage, ...]]  # input name to the stages whose answers it reads
    targets: Mapping[str, tuple[str, ...]]  # input name to the names of splits and stages it reads
    classes: tuple[str, ...]
    pixels: int
    vocabulary: Mapping[str, tuple[tuple[str, ...], ...]]  # input name to the classes that those stages speak of
    round: int | None = None


def foreign(wiring: Wiring, *names: str) -> list[tuple[str, str]]:
    """What is wrong with inputs that must be classifiers of the data's own classes."""
    advice = "fine-tune it on labelled images first (init: ...)"
    found = []
    for name in names:
        for stage in wiring.stages.get(name, ()):
            method = getattr(stage, "method", None)
            if method is not None and not is_classifier(method.cls):
                found.append((f"inputs.{name}", f"{method.cls.__name__} has features and no classifier: {advice}"))
        for spoken in wiring.vocabulary.get(name, ()):
            if spoken != wiring.classes:
                other = f"{len(spoken)} other classes apart ({spoken[0]} ...)" if spoken else "no classes apart"
                found.append((f"inputs.{name}", f"tells {other}, not the data's {len(wiring.classes)}: {advice}"))
    return found


def unlabelled(wiring: Wiring, *names: str) -> list[tuple[str, str]]:
    """What is wrong with images whose labels a stage reads: with none it would measure, or learn from, nothing."""
    return [
        (f"inputs.{name}", f"{', '.join(wiring.targets[name])} has no labels, and {name} are read for theirs")
        for name in names if name in wiring.images and not any(part.labelled.any() for part in wiring.images[name])
    ]  # fmt: skip


def several_labels(stage: Stage, wiring: Wiring) -> list[tuple[str, str]]:
    """What is wrong with images of several labels where a stage needs one class an image."""
    found: list[tuple[str, str]] = []
    for name, parts in wiring.images.items():
        several = [target for target, part in zip(wiring.targets[name], parts, strict=True) if part.several]
        one = [
            target for target, part in zip(wiring.targets[name], parts, strict=True)
            if part.labelled.any() and not part.several
        ]  # fmt: skip
        if several and name not in stage.takes_several:
            found.append((
                f"inputs.{name}", f"{several[0]} has several labels an image, and {type(stage).__name__} needs one "
                f"class: judge features by it with Probe's protocols: [svm], or read its images alone, as {{from: "
                f"{several[0]}, labels: false}}",
            ))  # fmt: skip
        elif several and one:
            found.append((
                f"inputs.{name}", f"{several[0]} has several labels an image and {one[0]} one: read both without "
                f"labels, as {{from: {one[0]}, labels: false}}",
            ))  # fmt: skip
    return found


@dataclass(frozen=True)
class Input:
    """One keyword of a stage's `run`: which kinds it takes, whether it may be left out, whether it takes several."""

    kinds: tuple[type, ...]
    optional: bool
    several: bool

    def takes(self, kind: type) -> bool:
        """Whether an answer of `kind` fits: a Decision stands for the Checkpoint it promoted."""
        return issubclass(kind, self.kinds) or (kind is Decision and Checkpoint in self.kinds)

    @property
    def name(self) -> str:
        """The kinds in words."""
        return " or ".join(kind.__name__ for kind in self.kinds)


def inputs_of(stage: type[Stage]) -> dict[str, Input]:
    """The inputs of a stage class, read from the signature of its `run`."""
    run: Any = stage.run  # type: ignore[attr-defined]
    hints = typing.get_type_hints(run)
    return {
        name: _input(hints[name], parameter.default is not parameter.empty)
        for name, parameter in inspect.signature(run).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def answer_of(stage: type[Stage]) -> type[Artifact]:
    """The kind of artifact a stage class answers with."""
    return typing.get_type_hints(stage.run)["return"]  # type: ignore[attr-defined]


def _input(hint: Any, optional: bool) -> Input:
    several = typing.get_origin(hint) is tuple
    parts = typing.get_args(hint) if several or isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(part for part in parts if part is not Ellipsis and part is not type(None))
    return Input(kinds, optional, several)
