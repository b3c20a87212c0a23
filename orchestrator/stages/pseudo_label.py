"""A teacher labels the unlabelled images without noise; the confident ones are kept: one round of the ledger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from methods.selection import REASONS, Selection, even_limit, select
from methods.views.draws import Draws
from orchestrator.artifacts import Checkpoint, Labels
from orchestrator.context import Context
from orchestrator.corrections import Corrections, read
from orchestrator.data.images import Images
from orchestrator.stage import Stage, StopRound, Wiring, foreign
from orchestrator.training import health

CORRECTED, DROPPED = "corrected by hand", "dropped by hand"
TEACHER = -1  # in place of a class: nobody looked, the teacher's label holds
NO_CLASS = -2  # in place of a class: somebody looked, the image is to be left out
ROWS = 2048  # of the ledger that are made and written together


@dataclass(frozen=True, kw_only=True)
class PseudoLabel(Stage):
    """Noisy Student's step 2: Xie et al. 2020, arXiv:1911.04252, section 3.1.

    Guards: with fewer than `min_kept` images kept, or one class holding more than `max_class_share` of them, the rounds
    end (`guard: stop`), or fewer of the large classes are kept, so that none holds more; where too few or one class
    alone are confident, that is of the most confident `adapt_share` of every predicted class (`guard: adapt`).
    With a hold-out also: labels no better than guesses, less often right than in the round before, or given to images
    unlike the hold-out, are a warning (`adapt`) or end the rounds (`stop`).

    `corrections` names a reviewed file, see `orchestrator labels --corrections`. A round applies what it says of the
    rounds before: an image that got a class by hand has it with probability 1 and is always kept, one that was dropped
    never is. The key holds those rows, so that a review of one round leaves the answers up to that round as they are.
    """

    version = 3  # since 3 the guard evens the classes, which it did not

    min_confidence: float = 0.3  # the paper's threshold for soft labels; 0.8 and more suits hard ones
    balance: Literal["none", "limit", "replicate"] = "replicate"  # the paper's
    per_class: int | None = None  # n_c; None: the mean number of confident images a class
    min_kept: int = 1  # images
    max_class_share: float = 0.8  # of the kept images; with two classes or fewer only 1 is too much
    adapt_share: float = 0.2  # of each predicted class's images, taken by the guard
    guard: Literal["adapt", "stop"] = "adapt"
    max_precision_drop: float = 0.1  # of hold-out pseudo-labels under the round before; these three are a warning
    min_skill: float = 0.2  # of hold-out pseudo-labels, (precision - chance) / (1 - chance)
    max_unlike: float = 0.25  # of the unlabelled images that are unlike the hold-out
    corrections: str | None = None  # path of a CSV

    def __post_init__(self) -> None:
        shares = ("min_confidence", "max_class_share", "adapt_share", "max_precision_drop", "min_skill", "max_unlike")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")
        if self.per_class is not None and self.per_class <= 0:
            raise ValueError(f"per_class = {self.per_class}: must be > 0")
        if self.min_kept < 1:
            raise ValueError(f"min_kept = {self.min_kept}: must be > 0, a student cannot learn from nothing")

    def problems(self, wiring: Wiring) -> list[tuple[str, str]]:
        if any(len(images) == 0 for images in wiring.images.get("images", ())):
            return [("inputs.images", "has no images: there is nothing to label")]
        return foreign(wiring, "teacher") or self._wrong_corrections(wiring)

    def resolved(self, wiring: Wiring) -> dict[str, Any]:
        given = self._given(wiring.classes, wiring.round)
        return {"corrections": given.digest if given.rows else None}

    @functools.cached_property
    def _content(self) -> bytes:
        """The file, read once: what the key was made of is what is applied."""
        return Path(self.corrections).read_bytes() if self.corrections else b""

    def _given(self, classes: Sequence[str], number: int | None) -> Corrections:
        """What a round may use; outside of rounds everything."""
        if not self.corrections:
            return Corrections({}, tuple(classes))
        return read({self.corrections: self._content}, classes)[0].before(number)

    def _wrong_corrections(self, wiring: Wiring) -> list[tuple[str, str]]:
        if not self.corrections:
            return []
        try:
            _, problems = read({self.corrections: self._content}, wiring.classes)
        except OSError as error:
            return [("corrections", f"{self.corrections}: cannot be read ({error.strerror})")]
        given = self._given(wiring.classes, wiring.round).decisions()
        ids = {key for images in wiring.images.get("images", ()) for key in images.ids.tolist()}
        if given and not problems and not ids & given.keys():
            problems = [f"{self.corrections}: none of its {len(given)} images is among the unlabelled ones"]
        return [("corrections", problem) for problem in problems]

    def work(self, wiring: Wiring) -> dict[str, Any]:
        return {"images": sum(len(images) for images in wiring.images["images"])}

    def run(
        self, context: Context, *, teacher: Checkpoint, images: Images, previous: Labels | None = None,
        holdout: Images | None = None,
    ) -> Labels:  # fmt: skip
        probability = context.logits(teacher, images)  # of all images: the one large thing in memory
        on_holdout = self._on_holdout(context, teacher, probability, holdout)
        for part in probability.split(ROWS):
            part.copy_(part.softmax(dim=1))
        sure, predicted = probability.max(dim=1)
        facts: dict[str, Any] = {"images": len(images), "teacher": teacher.key}
        given = self._given(context.classes, context.round)
        by_hand = _by_hand(given, images)
        corrected = by_hand >= 0
        probability[corrected] = torch.eye(probability.shape[1])[by_hand[corrected]]
        label = torch.where(corrected, by_hand, predicted)
        rank = sure.masked_fill(corrected, 2)  # above what a teacher says: no limit drops it
        draws = context.draws(1, len(images))

        def confident(rows: Tensor) -> Selection:
            return select(
                rank[rows], label[rows], min_confidence=self.min_confidence, per_class=self.per_class,
                balance=self.balance, draws=draws[rows],
            )  # fmt: skip

        chosen = _with_hands(confident, by_hand)
        classes = probability.shape[1]
        trouble = self._trouble(chosen, label, sure, classes)
        facts["guard"] = trouble
        if trouble and self.guard == "stop":
            raise StopRound(f"{trouble}; lower min_confidence, train the teacher longer, or set guard: adapt")
        if trouble:
            kept = label[chosen.copies > 0]
            wide = len(kept) < self.min_kept or len(kept.unique()) < 2
            every = f"took the most confident {self.adapt_share:.0%} of every predicted class instead"
            context.notice(f"{trouble}: {every if wide else 'kept only the most confident of it'}")
            chosen = _with_hands(lambda rows: self._even(rank[rows], label[rows], draws[rows], classes, wide), by_hand)
        facts |= self._health(label, chosen, classes) | {"mean_confidence": float(sure.mean())}
        if on_holdout:
            facts |= on_holdout
            facts["warnings"] = self._warnings(facts, previous)
            if facts["warnings"] and self.guard == "stop":
                raise StopRound("; ".join(facts["warnings"]))
            for line in facts["warnings"]:
                context.notice(line)
        if given.rows:
            facts |= _reviewed(given, by_hand, predicted)
            if facts["corrections_absent"]:
                context.notice(f"{facts['corrections_absent']} of the corrected images are not among these images")
        changed = None if previous is None else _changed(previous, images, label)
        if changed is not None:
            facts["changed"] = pc.sum(changed).as_py() or 0
        rows = self._rows(context, teacher, images, probability, label, chosen, by_hand, changed, facts)
        return Labels.write(context.output, rows, facts, given.text if given.rows else None)

    def _trouble(self, chosen: Selection, label: Tensor, sure: Tensor, classes: int) -> str | None:
        kept = chosen.copies > 0
        if int(kept.sum()) < self.min_kept:
            return (f"only {int(kept.sum())} of {len(kept)} images reach min_confidence {self.min_confidence} (the "
                    f"most confident has {float(sure.max()):.2f}), min_kept is {self.min_kept}")  # fmt: skip
        share = torch.bincount(label[kept]).max() / kept.sum()
        limit = health.class_limit(self.max_class_share, classes)
        return (
            f"one class holds {float(share):.0%} of the kept images, more than {limit:.0%}" if share > limit else None
        )

    def _even(self, confidence: Tensor, label: Tensor, draws: Draws, classes: int, wide: bool) -> Selection:
        """Fewer images of the large classes, the most confident ones, so that none holds more than its limit: of the
        confident images, or, `wide`, of the most confident share of every predicted class, each once."""
        among = confidence >= self.min_confidence
        if wide:
            among = torch.zeros_like(among)
            for k in label.unique().tolist():
                rows = (label == k).nonzero()[:, 0]
                order = confidence[rows].argsort(descending=True, stable=True)
                among[rows[order[: max(1, round(len(rows) * self.adapt_share))]]] = True
        count = torch.bincount(label[among], minlength=classes)
        most = even_limit(count, health.class_limit(self.max_class_share, classes))
        if self.per_class is not None:
            most = min(most, self.per_class)
        chosen = select(
            confidence.masked_fill(~among, -1.0), label, min_confidence=0.0, per_class=most, draws=draws,
            balance="replicate" if self.balance == "replicate" and not wide else "limit",
        )  # fmt: skip
        return Selection(chosen.copies, torch.where(chosen.copies > 0, 0, 2)) if wide else chosen

    def _health(self, label: Tensor, chosen: Selection, classes: int) -> dict[str, Any]:
        kept = chosen.copies > 0
        return {
            "kept": int(kept.sum()), "kept_share": float(kept.float().mean()), "copies": int(chosen.copies.sum()),
            "predicted_by_class": torch.bincount(label, minlength=classes).tolist(),
            "kept_by_class": torch.bincount(label[kept], minlength=classes).tolist(),
        }  # fmt: skip

    def _on_holdout(
        self, context: Context, teacher: Checkpoint, outside: Tensor, holdout: Images | None
    ) -> dict[str, Any]:
        """How good the teacher's labels are where the truth is known, and whether the pool, with these logits, looks
        like those images; nothing where no truth is known."""
        if holdout is None or not holdout.labelled.any():
            return {}
        known = torch.from_numpy(holdout.labelled.copy())
        label = torch.from_numpy(holdout.label.copy())[known]
        logits = context.logits(teacher, holdout)[known]
        found = health.pseudo_labels(logits.softmax(dim=1), label, min_confidence=self.min_confidence)
        by_class = health.by_class(found, holdout.classes)
        energy = torch.cat([health.energy(part) for part in outside.split(ROWS)])
        inside = health.energy(logits)
        first = not context.round  # later teachers trained on these images
        strange = health.strange(outside, logits) if first else 0.0
        return {
            **{f"holdout_{name}": found[name] for name in ("images", "accepted", "precision", "acceptance", "accuracy",
                                                           "chance", "by_class")},
            "holdout_acceptance_of": by_class["acceptance"], "holdout_precision_of": by_class["precision"],
            "calibration_error": found["calibration_error"], "energy_holdout": float(inside.mean()),
            "energy_unlabelled": float(energy.mean()), "high_energy_share": health.high_energy_share(energy, inside),
            "unlike_holdout": max(strange, health.unlike(energy, inside, either=first)),
        }  # fmt: skip

    def _warnings(self, facts: Mapping[str, Any], previous: Labels | None) -> list[str]:
        """What the hold-out says against learning from these labels. Fewer of them would not mend it, so `adapt` does
        not either."""
        held = {name: facts[f"holdout_{name}"] for name in ("images", "accepted", "precision", "accuracy", "chance")}
        found = [
            health.no_skill(held, self.min_skill),
            health.foreign_pool(facts["unlike_holdout"], facts["images"], held["images"], self.max_unlike),
        ]
        before = {} if previous is None else previous.facts
        best, then = before.get("holdout_precision"), before.get("holdout_accuracy", 1.0)
        lower = best is not None and health.fell(held["precision"], held["accepted"], best, self.max_precision_drop)
        if lower and held["accuracy"] <= then:
            found.append(
                f"{held['precision']:.1%} of the hold-out's pseudo-labels are right, in the round before {best:.1%}: "
                "the teacher got worse; raise min_confidence, let a gate read the hold-out, or end the rounds earlier"
            )
        return [line for line in found if line]

    def _rows(
        self, context: Context, teacher: Checkpoint, images: Images, probability: Tensor, label: Tensor,
        chosen: Selection, by_hand: Tensor, changed: pa.Array | None, facts: Mapping[str, Any],
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        reasons = (*REASONS, CORRECTED, DROPPED)
        sources = ("teacher", facts.get("corrections", ""))
        ids, classes = images.ids, probability.shape[1]
        for begin in range(0, len(ids), ROWS):
            part = slice(begin, begin + ROWS)
            own, named = probability[part], label[part].tolist()
            count = len(own)
            top = own.topk(2, dim=1).values
            ends = np.arange(0, count * classes + 1, classes, dtype="int32")
            yield {
                "id": ids[part], "path": [images.where(row) for row in range(begin, begin + count)],
                "round": [context.round or 0] * count, "teacher": [teacher.key] * count, "class": named,
                "name": [images.classes[k] for k in named], "confidence": top[:, 0].numpy(),
                "margin": (top[:, 0] - top[:, 1]).numpy(),
                "entropy": torch.special.entr(own).sum(dim=1).numpy(),
                "probabilities": pa.ListArray.from_arrays(ends, own.flatten().numpy()),
                "copies": chosen.copies[part].numpy().astype("int32"),
                "reason": [reasons[r] for r in chosen.reason[part].tolist()],
                "changed": [None] * count if changed is None else changed[part],
                "source": [sources[k] for k in (by_hand[part] != TEACHER).long().tolist()],
            }  # fmt: skip


def _changed(previous: Labels, images: Images, label: Tensor) -> pa.Array:
    """(N,) bool: of another class than in the round before, null for images that were not in it."""
    table = previous.table(["id", "class"])
    place = pc.index_in(pa.array(images.ids), value_set=table["id"].combine_chunks())
    return pc.not_equal(table["class"].combine_chunks().take(place), pa.array(label.numpy().astype("int32")))


def _by_hand(given: Corrections, images: Images) -> Tensor:
    """(N,) int64: the class an image got by hand, TEACHER or NO_CLASS."""
    place = {name: k for k, name in enumerate(images.classes)}
    decided = {key: NO_CLASS if name is None else place[name] for key, name in given.decisions().items()}
    if not decided:
        return torch.full((len(images),), TEACHER)
    return torch.tensor([decided.get(key, TEACHER) for key in images.ids.tolist()], dtype=torch.long)


def _with_hands(choose: Callable[[Tensor], Selection], by_hand: Tensor) -> Selection:
    """What `choose` says of the rows that nobody dropped; those that got a class by hand are kept whatever it says."""
    rows = (by_hand != NO_CLASS).nonzero()[:, 0]
    copies = torch.zeros_like(by_hand)
    reason = torch.full_like(by_hand, len(REASONS) + 1)
    found = choose(rows)
    copies[rows], reason[rows] = found.copies, found.reason
    corrected = by_hand >= 0
    copies[corrected] = copies[corrected].clamp(min=1)
    reason[corrected] = len(REASONS)
    return Selection(copies, reason)


def _reviewed(given: Corrections, by_hand: Tensor, predicted: Tensor) -> dict[str, Any]:
    """`teacher_agrees`: of the images that got a class by hand, those that this round's teacher takes for the same."""
    corrected = by_hand >= 0
    agrees = predicted[corrected] == by_hand[corrected]
    return {
        "corrections": given.digest, "corrected": int(corrected.sum()), "dropped": int((by_hand == NO_CLASS).sum()),
        "teacher_agrees": int(agrees.sum()),
        "corrections_absent": len(given.decisions()) - int((by_hand != TEACHER).sum()),
    }  # fmt: skip
