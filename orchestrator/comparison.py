"""Arms under one protocol, over seeds: means, spreads, and which of two is better by a rule fixed beforehand."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ANCHORS = ("random", "supervised")
STUDENT_T = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    11: 2.228,
    12: 2.201,
}  # 97.5 %, n values; of more than 12 that of 12, which is a little wide


@dataclass(frozen=True)
class Score:
    """One arm's score by one protocol: a value for each seed, and how many images each rests on.

    Attributes:
        low, high: 95 % interval, over images where there is one seed, over seeds where there are several.
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


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean over n >= 2 seeds, Student 1908: t_interval((0.01, 0.02, 0.03)) is (-0.0048, 0.0448)."""
    half = STUDENT_T.get(len(values), STUDENT_T[12]) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def share_interval(values: Sequence[float]) -> tuple[float, float]:
    """`t_interval` of shares, such as accuracies, which stays in [0, 1]."""
    low, high = t_interval(values)
    return max(0.0, low), min(1.0, high)


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
    """Stage name to the name of its arm: arms.rotation.probe is rotation, unless another group has a rotation too.

    Of two stages of one arm each keeps its whole name: no two scores may go by one name, or they would look like seeds.
    """
    stages = list(dict.fromkeys(stages))
    whole = {stage: stage.rpartition(".")[0] or stage for stage in stages}
    last = {stage: name.rpartition(".")[2] for stage, name in whole.items()}
    often, alike = Counter(last.values()), Counter(whole.values())
    return {
        stage: last[stage] if often[last[stage]] == 1 else whole[stage] if alike[whole[stage]] == 1 else stage
        for stage in stages
    }


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
        values = tuple(score["value"] for score in each)
        low, high = share_interval(values) if len(each) > 1 else (each[0]["low"], each[0]["high"])
        scores.append(Score(arm, protocol, metric, tap, values, each[0]["n"], low, high))
    anchors = {role: arm_of[names_of_first[first[role]]] for role in ANCHORS if first.get(role)}
    claims = tuple((better, worse) for better, worse in first["claims"])
    return Comparison(tuple(scores), anchors, claims, first["protocol"], len(seeds))
