"""What a report needs to know of a run, read from its folder and from the store: nothing is computed again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.artifacts import Artifact, Decision, Verdict
from orchestrator.runs import read_head, read_outcomes
from orchestrator.store import Store

Kind = TypeVar("Kind", bound=Artifact)


@dataclass(frozen=True)
class StageFacts:
    """One stage of one seed: its place in the plan, how it went, and its answer where it is stored."""

    name: str  # without the seed
    kind: str
    key: str
    round: int | None
    group: str | None
    outcome: Mapping[str, Any]  # empty where the run never got there
    manifest: Mapping[str, Any]  # empty where nothing is stored
    artifact: Artifact | None

    @property
    def state(self) -> str:
        """ran, resumed, stored, skipped, failed, interrupted, running or waiting."""
        return str(self.outcome.get("state", "waiting"))

    @property
    def config(self) -> Mapping[str, Any]:
        """The stage's configuration, as its key hashes it."""
        return self.manifest.get("question", {}).get("config", {})


@dataclass(frozen=True)
class RunFacts:
    """A run: `seeds` maps each seed to its stages, in the order of the plan."""

    name: str
    head: Mapping[str, Any]
    recipe: str
    data: tuple[Mapping[str, Any], ...]
    seeds: Mapping[int, tuple[StageFacts, ...]]

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        """The stages of the first seed."""
        return next(iter(self.seeds.values()))

    def stored(self, kind: str, answer: type[Kind]) -> list[tuple[StageFacts, Kind]]:
        """The first seed's stages of a kind with their answers, in order."""
        return [(s, s.artifact) for s in self.stages if s.kind == kind and isinstance(s.artifact, answer)]

    def verdicts(self) -> dict[str, list[tuple[int, Verdict]]]:
        """By the name of the Judge stage: (seed, verdict) of every seed that has one."""
        found: dict[str, list[tuple[int, Verdict]]] = {}
        for seed, stages in self.seeds.items():
            for stage in stages:
                if stage.kind == "Judge" and isinstance(stage.artifact, Verdict):
                    found.setdefault(stage.name, []).append((seed, stage.artifact))
        return found

    def names(self, seed: int) -> dict[str, str]:
        """Key to the name of the stage that made it."""
        return {stage.key: stage.name for stage in reversed(self.seeds[seed])}


def read_run(store: Store, folder: Path) -> RunFacts:
    """Read a run's folder and the answers its stages have in the store.

    Raises:
        UserError: there is no such run, or a stored answer lost a file.
    """
    head = read_head(folder)
    outcomes = {line["name"]: line for line in read_outcomes(folder, [stage["name"] for stage in head["stages"]])}
    seeds: dict[int, list[StageFacts]] = {seed: [] for seed in head["seeds"]}
    for stage in head["stages"]:
        outcome = outcomes.get(stage["name"], {})
        stored = store.has(stage["key"]) and outcome.get("state") != "skipped"
        seeds[stage["seed"]].append(StageFacts(
            stage["name"].removeprefix(f"seed-{stage['seed']}/"), stage["kind"], stage["key"], stage["round"],
            stage["group"], outcome, store.manifest(stage["key"]) if stored else {},
            store.open_artifact(stage["key"]) if stored else None,
        ))  # fmt: skip
    data = folder / "data.json"
    return RunFacts(
        folder.name, head, (folder / "recipe.yaml").read_text(encoding="utf-8"),
        tuple(json.loads(data.read_text(encoding="utf-8"))) if data.exists() else (),
        {seed: tuple(stages) for seed, stages in seeds.items()},
    )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A judged model: the name of the stage that trained it, its parts in the verdict, its score."""

    name: str
    key: str
    column: str  # its name in predictions.parquet
    roles: frozenset[str]  # baseline, final
    score: Mapping[str, Any]  # accuracy, low, high, n, calibration_error

    @property
    def title(self) -> str:
        """The stage, and what it stands for."""
        roles = [role for role in ("baseline", "final") if role in self.roles]
        return f"{self.name} ({', '.join(roles)})" if roles else self.name


def arms_of(verdict: Verdict, stages: tuple[StageFacts, ...]) -> list[Arm]:
    """Every judged model once, in the order of the plan, the baseline first."""
    order = {stage.key: place for place, stage in reversed(list(enumerate(stages)))}
    scores: Mapping[str, Any] = verdict.facts["scores"]
    by_key: dict[str, list[str]] = {}
    for column, score in scores.items():
        by_key.setdefault(score["key"], []).append(column)
    arms = []
    for key, columns in by_key.items():
        name = stages[order[key]].name if key in order else f"model {key[:8]}"
        roles = frozenset(columns) & {"baseline", "final"}
        arms.append(Arm(name, key, columns[0], roles, scores[columns[0]]))
    return sorted(arms, key=lambda arm: ("baseline" not in arm.roles, order.get(arm.key, len(stages))))


def teachers_of(stages: tuple[StageFacts, ...]) -> dict[str, str]:
    """Key of each gated student to the key of the teacher it was held against."""
    found = {}
    for stage in stages:
        if isinstance(stage.artifact, Decision):
            found[stage.artifact.facts["student"]["key"]] = stage.artifact.facts["teacher"]["key"]
    return found


@dataclass(frozen=True)
class Predictions:
    """One arm's answers on the N labelled test images."""

    id: list[str]
    path: list[str]
    label: np.ndarray  # (N,) int64
    predicted: np.ndarray  # (N,) int64
    confidence: np.ndarray  # (N,) float64

    @property
    def right(self) -> np.ndarray:
        """(N,) bool."""
        return self.label == self.predicted


def predictions_of(table: pa.Table, column: str) -> Predictions:
    """The rows of an arm, without the images that have no label."""
    rows = table.filter(pc.and_(pc.equal(table["arm"], column), pc.is_valid(table["label"])))
    return Predictions(
        rows["id"].to_pylist(), rows["path"].to_pylist(), rows["label"].to_numpy().astype(np.int64),
        rows["predicted"].to_numpy().astype(np.int64), rows["confidence"].to_numpy().astype(np.float64),
    )  # fmt: skip


def describe(stage: StageFacts, names: Mapping[str, str]) -> str:
    """A training in a few words: method, encoder, and which stages it builds on."""
    config, inputs = stage.config, stage.manifest.get("inputs", {})
    if not config:
        return ""
    words = [f"{config['method']['use'].rpartition('.')[2]} on {config['encoder']['use'].rpartition('.')[2]}"]
    if "labels" in inputs:
        words.append(f"labels from {names.get(inputs['labels'], inputs['labels'][:8])}")
    if "init" in inputs:
        words.append(f"starts from {names.get(inputs['init'], inputs['init'][:8])}")
    return ", ".join(words)


def ends(stages: Iterable[StageFacts]) -> list[str]:
    """Why rounds ended early, in the words of the gate or the guard."""
    notes = [stage.outcome["note"].rstrip(".") for stage in stages if stage.state == "skipped"]
    return list(dict.fromkeys(note for note in notes if note))
