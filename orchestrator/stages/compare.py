"""Which method is best? Scores of many models under one protocol, beside the two anchors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.artifacts import Scores, Table
from orchestrator.comparison import ANCHORS, short_names
from orchestrator.context import Context
from orchestrator.errors import nearest
from orchestrator.stage import Stage, Wiring


@dataclass(frozen=True, kw_only=True)
class Compare(Stage):
    """One table of all arms. `random` and `supervised` are the anchors: the untrained encoder, and labels alone.

    A claim [A, B] says that A is better than B by the ranking protocol. It holds, over at least two seeds, when the
    means differ by more than 2 √(se_A² + se_B²). That every arm is better than `random` is claimed anyway.
    """

    protocol: str = "linear"  # ranks the arms, and is what claims are about
    claims: tuple[tuple[str, str], ...] = ()  # names of arms: arms.rotation.probe is rotation

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        targets = wiring.targets["scores"]
        found += [("inputs.scores", f"{t} is listed {n} times; once is enough") for t, n in Counter(targets).items()
                  if n > 1]  # fmt: skip
        arms = list(short_names(targets).values())
        for better, worse in self.claims:
            for arm in (better, worse):
                if arm not in arms:
                    found.append(("claims", f"{arm} is no arm{nearest(arm, arms) or '; arms are ' + ', '.join(arms)}"))
        for role in ANCHORS:
            for target in wiring.targets.get(role, ()):
                if target not in wiring.targets["scores"]:
                    found.append((f"inputs.{role}", f"{target} is not among inputs.scores"))
        for target, stage in zip(wiring.targets["scores"], wiring.stages["scores"], strict=True):
            protocols = getattr(stage, "protocols", ())
            if self.protocol not in protocols:
                found.append(("protocol", f"{self.protocol}: {target} does not score by it, but by "
                              f"{', '.join(protocols)}"))  # fmt: skip
        return found

    @staticmethod
    def same(keys: Mapping[str, str]) -> list[tuple[str, str]]:
        """What is wrong where arms ask the same question: told as several, they would be one with more seeds.

        Args:
            keys: of the stages in `scores`, by name.
        """
        arms = short_names(keys)
        alike = [[arms[name] for name in keys if keys[name] == key] for key in dict.fromkeys(keys.values())]
        return [("inputs.scores", f"{', '.join(some)} and {last} are the same training: change one or leave it out")
                for *some, last in alike if some]  # fmt: skip

    def run(
        self, context: Context, *, scores: tuple[Scores, ...], random: Scores | None = None,
        supervised: Scores | None = None,
    ) -> Table:  # fmt: skip
        facts: dict[str, Any] = {
            "arms": [{"key": one.key, "scores": one.scores()} for one in scores], "protocol": self.protocol,
            "claims": [list(claim) for claim in self.claims], "random": random.key if random else None,
            "supervised": supervised.key if supervised else None,
        }  # fmt: skip
        return Table.write(context.output, facts)
