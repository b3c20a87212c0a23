"""Arms under one protocol, over seeds: means, spreads, and which of two is better by a rule fixed beforehand."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ANCHORS = ("random", "supervised")


@dataclass(frozen=True)
class Score:
    """One arm's score by one protocol: a value for each seed, and how many images each rests on.

    Attributes:
        low, high: 95 % interval over images where there is one seed; equal to the value where there are several.
    """

    arm: str
    protocol: str
    metric: str
    tap: str | None
    values: tuple[float, ...]
    n: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds, where there are several."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """All scores of all arms, the anchors by the role they play, and the claims that were to be tested."""

    scores: tuple[Score, ...]
    anchors: Mapping[str, str]  # "random" or "supervised" to the arm that plays it
    claims: tuple[tuple[str, str], ...]
    protocol: str  # which ranks the arms
    seeds: int

    @property
    def arms(self) -> list[str]:
        """Their names: the best first, by the ranking protocol."""
        ranked = sorted(self.ranking(), key=lambda score: -score.mean)
        return list(dict.fromkeys([*(score.arm for score in ranked), *(score.arm for score in self.scores)]))

    def ranking(self) -> list[Score]:
        """Each arm's score by the ranking protocol."""
        return [score for score in self.scores if score.protocol == self.protocol]

    def of(self, arm: str) -> Score | None:
        """An arm's score by the ranking protocol."""
        return next((score for score in self.ranking() if score.arm == arm), None)

    def tests(self) -> list[tuple[str, str, float, float | None, bool | None]]:
        """(better, worse, difference, what it must exceed, whether it does) of each claim; None with a single seed.

        Every arm is first held against random initialisation, where that is among them.
        """
        random = self.anchors.get("random")
        pairs = [(arm, random) for arm in self.arms if random and arm not in self.anchors.values()] + list(self.claims)
        found = []
        for better, worse in dict.fromkeys(pairs):
            first, second = self.of(better), self.of(worse)
            if first is not None and second is not None:
                found.append((better, worse, *exceeds(first.values, second.values)))
        return found

    def json(self) -> dict[str, Any]:
        """Plain values for scripts."""
        return {
            "seeds": self.seeds, "protocol": self.protocol, "anchors": dict(self.anchors),
            "arms": [
                {"arm": s.arm, "protocol": s.protocol, "metric": s.metric, "tap": s.tap, "mean": s.mean,
                 "deviation": s.deviation, "values": list(s.values), "n": s.n} for s in self.scores
            ],
            "claims": [
                {"better": a, "worse": b, "difference": d, "needed": need, "holds": holds}
                for a, b, d, need, holds in self.tests()
            ],
        }  # fmt: skip


def exceeds(better: Sequence[float], worse: Sequence[float]) -> tuple[float, float | None, bool | None]:
    """(difference of means, 2 √(se² + se²), whether the first is larger), se = s / √n; the last two None if n < 2.

    exceeds((3, 4, 5), (0, 1, 2)) is (3, 1.632993, True).
    """
    difference = statistics.fmean(better) - statistics.fmean(worse)
    if len(better) < 2 or len(worse) < 2:
        return difference, None, None
    needed = 2 * math.sqrt(statistics.variance(better) / len(better) + statistics.variance(worse) / len(worse))
    return difference, needed, finding(difference, needed) == "better"


def finding(difference: float, needed: float) -> Literal["better", "worse", "not shown"]:
    """What a difference of means says that has to exceed `needed`, in either direction."""
    return "better" if difference > needed else "worse" if -difference > needed else "not shown"


def short_names(stages: Iterable[str]) -> dict[str, str]:
    """Stage name to the name of its arm: arms.rotation.probe is rotation, unless another group has a rotation too."""
    stages = list(dict.fromkeys(stages))
    whole = {stage: stage.rpartition(".")[0] or stage for stage in stages}
    last = {stage: name.rpartition(".")[2] for stage, name in whole.items()}
    often = Counter(last.values())
    return {stage: last[stage] if often[last[stage]] == 1 else whole[stage] for stage in stages}


def combine(seeds: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]]) -> Comparison:
    """One comparison over seeds.

    Args:
        seeds: of each, the facts of its Compare stage, and key to stage name of its plan.
    """
    first, names_of_first = seeds[0]
    found: dict[tuple[str, str, str, str | None], list[Mapping[str, Any]]] = {}
    for facts, stage_of in seeds:
        arm_of = short_names(stage_of[arm["key"]] for arm in facts["arms"])
        for arm in facts["arms"]:
            for score in arm["scores"]:
                place = (arm_of[stage_of[arm["key"]]], score["protocol"], score["metric"], score.get("tap"))
                found.setdefault(place, []).append(score)
    arm_of = short_names(names_of_first[arm["key"]] for arm in first["arms"])
    scores = []
    for (arm, protocol, metric, tap), each in found.items():
        values, alone = tuple(score["value"] for score in each), len(each) == 1
        mean = statistics.fmean(values)
        low, high = (each[0]["low"], each[0]["high"]) if alone else (mean, mean)
        scores.append(Score(arm, protocol, metric, tap, values, each[0]["n"], low, high))
    anchors = {role: arm_of[names_of_first[first[role]]] for role in ANCHORS if first.get(role)}
    claims = tuple((better, worse) for better, worse in first["claims"])
    return Comparison(tuple(scores), anchors, claims, first["protocol"], len(seeds))
