"""Health of self-training: are the labels that a model gives itself right, and enough, and of its own domain?

Looked at a few times during training, on labelled images that nothing learns from and on a sample of the unlabelled
ones, with the model in eval mode. A look changes nothing of the model: no weight, no statistic, no generator.

All limits below are conventions of this program. They ask for trouble that lasts, because a model at the start of its
training accepts nothing, or names one class for everything, and is not ill.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from methods.base import Losses, Method
from methods.collectives import all_reduce
from methods.metrics import expected_calibration_error, wilson_interval
from orchestrator.data.images import Images
from orchestrator.training.norm import clean_rows
from orchestrator.training.precision import autocast

Guard = Literal["warn", "adapt", "stop"]

LOOKS = 10  # how often a training is looked at
LOOKED_AT = 1024  # images of the hold-out, and of the unlabelled ones, it is looked at on
NEIGHBOURS = 2048  # hold-out images among which nearest neighbours are looked for
ENOUGH = 20  # accepted hold-out images below which nothing is said of their precision
CHUNK = 256  # images a forward pass
PREFIX = "health/"  # of the names in curves and in MLflow, which groups by it
BY_CLASS = 100  # classes up to which every one has curves of its own
LEAST_CONFIDENCE = 0.5  # that an adapted threshold may ask for: below, a pseudo-label is more likely wrong than right


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is healthy. Fractions; a guard speaks when one is crossed for `patience` of all steps."""

    patience: float = 0.3  # of all steps
    min_accepted: float = 0.01  # of the unlabelled images
    max_class_share: float = 0.8  # of the accepted; with two classes or fewer only 1 is too much
    max_precision_drop: float = 0.1  # of hold-out pseudo-labels under their best, while the accuracy did not rise
    min_skill: float = 0.2  # of hold-out pseudo-labels, (precision - chance) / (1 - chance): 0 is guessing
    max_unlike: float = 0.25  # of the unlabelled images that are unlike the hold-out, see `unlike`
    adapt_share: float = 0.2  # of the unlabelled images, that the threshold of `guard: adapt` accepts

    def __post_init__(self) -> None:
        for name in ("patience", "min_accepted", "max_class_share", "max_precision_drop", "min_skill", "max_unlike"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1]")
        if not 0 < self.adapt_share <= 1:
            raise ValueError(f"adapt_share = {self.adapt_share}: must be in (0, 1]")


# Measures -------------------------------------------------------------------------------------------------------------


def energy(logits: Tensor) -> Tensor:
    """-logsumexp of logits (N, K), as (N,): the higher, the less a model knows of the image.

    Liu et al. 2020, arXiv:2010.03759, eq. 4 at temperature 1. Logits (0, 0) have -ln 2.
    """
    return -logits.float().logsumexp(dim=1)


def high_energy_share(unlabelled: Tensor, holdout: Tensor) -> float:
    """Share of (N,) energies above the hold-out's 95 % quantile, of (M,): 0.05 where both are alike.

    The threshold of the same paper, section 4.1, which covers 95 % of what belongs to the domain.
    """
    return float((unlabelled > holdout.quantile(0.95)).float().mean())


def unlike(unlabelled: Tensor, holdout: Tensor, *, either: bool = False) -> float:
    """At least this share of the unlabelled images is of a kind that the hold-out does not have.

    max over t of P(energy > t) among (N,) unlabelled less that among (M,) hold-out images: the one-sided distance of
    Kolmogorov and Smirnov. Where a share s is foreign it is at most s, since no event's probability differs by more.
    Unlike a share above a quantile it also sees images whose energies lie close together in the middle of the
    hold-out's, as those of noise may.

    Args:
        either: lower energies count too, the two-sided distance. Right for a model that did not train on the unlabelled
            images, since training on images lowers theirs; and a network may be surer of noise than of any image.
    Returns:
        In [0, 1]. Energies (1, 3) against (0, 2) give 0.5; equal ones 0.
    """
    at = torch.cat([unlabelled, holdout]).sort().values
    below = [torch.searchsorted(part.sort().values, at, right=True) / len(part) for part in (holdout, unlabelled)]
    difference = below[0] - below[1]
    return max(0.0, float((difference.abs() if either else difference).max()))


def strange(unlabelled: Tensor, holdout: Tensor) -> float:
    """`unlike` of logits (N, K) against (M, K), by how far each row is from the nearest of the hold-out's other rows.

    Sees images on which a network is as sure as on any, but in its own way: noise often is. After the detection by
    nearest neighbours of Sun et al. 2022, arXiv:2204.06507, on logits in place of features. Only for a model that did
    not train on the unlabelled images, which lie further out afterwards. Of a large hold-out 2,048 rows are compared.
    """
    known = holdout[:: math.ceil(len(holdout) / NEIGHBOURS)].float()
    if len(known) < 2:
        return 0.0
    own = torch.cdist(known, known).kthvalue(2, dim=1).values  # the first is the row itself
    others = [torch.cdist(part.float(), known).amin(dim=1) for part in unlabelled.split(NEIGHBOURS)]
    return unlike(torch.cat(others), own)


def surely_unlike(distance: float, unlabelled: int, holdout: int) -> float:
    """`unlike` less what two samples of one distribution exceed once in 20 times: 0.3 of 1,000 and 100 gives 0.17.

    sqrt(-ln 0.05 / 2) sqrt(1 / N + 1 / M), Smirnov's limit.
    """
    return max(0.0, distance - math.sqrt(-math.log(0.05) / 2 * (1 / unlabelled + 1 / holdout)))


def pseudo_labels(probability: Tensor, label: Tensor, *, min_confidence: float) -> dict[str, Any]:
    """What would become of labelled images, were they pseudo-labelled.

    Args:
        probability: (N, K). label: (N,) the truth. min_confidence: what a pseudo-label needs; 0 accepts all.
    Returns:
        "images", "accepted" and "right" among those, counts; "acceptance" and "precision", their shares, the latter
        None where nothing is accepted; "accuracy" of all; "calibration_error" of all, from
        `methods.metrics.expected_calibration_error`; "chance", the share of the commonest class; and "by_class", lists
        of K counts: "images" and "accepted" of the class, "predicted" as it and accepted, "right" among these.
    """
    confidence, predicted = probability.max(dim=1)
    sure, right = confidence >= min_confidence, predicted == label
    classes = probability.shape[1]

    def counts(of: Tensor, among: Tensor) -> list[int]:
        return torch.bincount(of[among], minlength=classes).tolist()

    everything = torch.ones_like(sure)
    accepted, hits = int(sure.sum()), int((sure & right).sum())
    images = counts(label, everything)
    return {
        "images": len(label), "accepted": accepted, "right": hits, "acceptance": accepted / max(1, len(label)),
        "precision": hits / accepted if accepted else None, "accuracy": float(right.double().mean()),
        "calibration_error": expected_calibration_error(confidence, right), "chance": max(images) / max(1, len(label)),
        "by_class": {"images": images, "accepted": counts(label, sure), "predicted": counts(predicted, sure),
                     "right": counts(predicted, sure & right)},
    }  # fmt: skip


def by_class(found: Mapping[str, Any], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """ "acceptance" of the images of a class and "precision" of what is accepted as it, by its name, for the classes
    that have such images; nothing where there are more than BY_CLASS. `found`: see `pseudo_labels`."""
    shares: dict[str, dict[str, float]] = {"acceptance": {}, "precision": {}}
    count = found["by_class"]
    for k, name in enumerate(classes if len(classes) <= BY_CLASS else ()):
        for share, part, whole in (("acceptance", "accepted", "images"), ("precision", "right", "predicted")):
            if count[whole][k]:
                shares[share][name] = count[part][k] / count[whole][k]
    return shares


def largest_class(probability: Tensor, *, min_confidence: float) -> tuple[int, float]:
    """The class that most of the accepted pseudo-labels name, and its share of them; (0, 0.0) where none is."""
    confidence, predicted = probability.max(dim=1)
    count = torch.bincount(predicted[confidence >= min_confidence], minlength=probability.shape[1])
    return int(count.argmax()), float(count.max() / count.sum().clamp_min(1))


def class_limit(max_class_share: float, classes: int) -> float:
    """The share that one class may hold: of two classes one often holds nearly all."""
    return max_class_share if classes > 2 else 0.999


# What is wrong, in words ----------------------------------------------------------------------------------------------


def no_skill(found: Mapping[str, Any], min_skill: float) -> str | None:
    """What to say where a model's labels of the hold-out are hardly better than guesses: the labels it accepts, or all
    of them where it accepts few. `found`: see `pseudo_labels`."""
    few = found["accepted"] < ENOUGH
    share, count = (found["accuracy"], found["images"]) if few else (found["precision"], found["accepted"])
    chance = found["chance"]
    if count < ENOUGH or share - chance >= min_skill * (1 - chance):
        return None
    return (f"{share:.1%} of {count} labels that the model gave the hold-out were right, and always naming one class "
            f"gives {chance:.1%}: look at the labels it learned from, or give it more of them")  # fmt: skip


def foreign_pool(distance: float, unlabelled: int, holdout: int, max_unlike: float) -> str | None:
    """What to say where the unlabelled images are of another kind than the hold-out. `distance`: see `unlike`."""
    if surely_unlike(distance, unlabelled, holdout) <= max_unlike:
        return None
    return (f"at least {distance:.0%} of the unlabelled images are unlike the hold-out, by their logits: look "
            "at them, and leave those of another domain out")  # fmt: skip


def fell(precision: float | None, accepted: int, best: float, margin: float) -> bool:
    """Whether a precision is under an earlier one by more than the margin, and not by the chance of few images."""
    if precision is None or accepted < ENOUGH:
        return False
    _, high = wilson_interval(round(precision * accepted), accepted)
    return precision < best - margin and high < best


# During training ------------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and without gradients; afterwards every part has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(method: Method, images: Images, rows: Tensor, precision: str) -> Tensor:
    """Logits (B, K) float32 on the CPU of the clean images of `rows` (B,)."""
    where, logits = next(method.parameters()).device, _of(method).logits
    found = []
    with undisturbed(method), autocast(precision, where.type):
        for chunk in rows.split(CHUNK):
            pixels = images.batch(chunk).to(where).to(torch.float32) / 255
            found.append(logits(pixels.contiguous(memory_format=torch.channels_last)).float().cpu())
    return torch.cat(found)


def _of(method: Method) -> Any:
    """The same, for what only some methods have."""
    return method


@dataclass
class Watch:
    """Looks at one training, and speaks. Its state belongs into the training's checkpoint.

    Args:
        classes: names. total: steps of the training. holdout, unlabelled: None where there are none.
        part, parts: this worker among all. The first one looks and tells the others, so that all decide the same.
    """

    method: Method
    average: Method | None
    classes: Sequence[str]
    limits: Limits
    guard: Guard
    total: int
    seed: int
    precision: str
    holdout: Images | None
    unlabelled: Images | None
    part: int = 0
    parts: int = 1
    looked: int = 0  # steps done at the last look
    lasted: dict[str, int] = field(default_factory=dict)  # steps that a trouble has lasted
    said: list[tuple[int, str, str]] = field(default_factory=list)  # (steps done, trouble, line)
    best: tuple[float, float, int] | None = None  # precision, accuracy at it, steps done
    adapted: float | None = None  # the threshold in place of the configured one
    stopped: bool = False
    last: dict[str, Any] = field(default_factory=dict)  # the last look, for the facts

    STATE: ClassVar[tuple[str, ...]] = ("looked", "lasted", "said", "best", "adapted", "stopped", "last")

    def __post_init__(self) -> None:
        self.configured: float | None = getattr(_of(self.method).config, "min_confidence", None)
        self._sums: Tensor | None = None
        self._rows = {
            name: clean_rows(images, LOOKED_AT, self.seed)
            for name, images in (("unlabelled", self.unlabelled),) if images is not None
        }  # fmt: skip
        if self.holdout is not None:
            known = torch.from_numpy(self.holdout.labelled.copy()).nonzero()[:, 0]
            self._rows["holdout"] = known[clean_rows(self.holdout.select(known), LOOKED_AT, self.seed)]

    # state

    def state(self) -> dict[str, Any]:
        """Plain values, of which the next process goes on bit-equal."""
        sums = None if self._sums is None else self._sums.tolist()
        facts = self.facts() if self.last else {}
        return {"sums": sums, "facts": facts, **{name: getattr(self, name) for name in self.STATE}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.said = [(step, name, line) for step, name, line in self.said]
        if state["sums"] is not None:
            where = next(self.method.parameters()).device
            sums = torch.tensor(state["sums"], dtype=torch.float64, device=where)
            self._sums = sums if self.part == 0 else torch.zeros_like(sums)
        self._apply()

    def settle(self) -> None:
        """Before a checkpoint, on all workers: the first one's state is all there is to know.

        What is summed are shares in float32, and in float64 their sums are exact: no order changes them.
        """
        if self._sums is not None:
            total = all_reduce(self._sums)
            self._sums = total if self.part == 0 else torch.zeros_like(total)

    # each step

    def note(self, losses: Losses) -> None:
        """Remember what the method says it accepted; no device synchronisation."""
        if "accepted" not in losses or "largest_class" not in losses:
            return
        accepted = losses["accepted"]
        one = torch.stack([accepted, accepted * losses["largest_class"]]).double()
        self._sums = one if self._sums is None else self._sums + one

    # each look

    def due(self, done: int) -> bool:
        """Whether to look after `done` steps."""
        return done % max(1, self.total // LOOKS) == 0 or done == self.total

    def look(self, done: int) -> tuple[dict[str, float], list[str]]:
        """Look after `done` steps: values by name for curves and tracking, and what a person should be told now."""
        found = self._look() if self.part == 0 else {}
        if self.parts > 1:
            box = [found]
            dist.broadcast_object_list(box, src=0)
            found = box[0]
        since = max(1, done - self.looked)
        if self._sums is not None:
            accepted, held = (all_reduce(self._sums) / (since * self.parts)).tolist()
            found["accepted_in_training"] = accepted
            found["largest_class_in_training"] = held / accepted if accepted else 0.0
            self._sums = None
        self.looked, self.last, values = done, found, self._values(found)
        return values, self._judge(done, since, found)

    @property
    def threshold(self) -> float:
        """What a pseudo-label needs now; 0 for a method without a threshold."""
        return self.adapted if self.adapted is not None else self.configured or 0.0

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {"min_confidence": self.threshold}
        energies = {}
        if self.holdout is not None:
            rows = self._rows["holdout"]
            label = torch.from_numpy(self.holdout.label.copy())[rows]
            logits = logits_of(self.method, self.holdout, rows, self.precision)
            energies["holdout"] = energy(logits)
            found["holdout"] = pseudo_labels(logits.softmax(dim=1), label, min_confidence=self.threshold)
            if self.average is not None:
                logits = logits_of(self.average, self.holdout, rows, self.precision)
                found["average"] = pseudo_labels(logits.softmax(dim=1), label, min_confidence=self.threshold)
        if self.unlabelled is not None:
            logits = logits_of(self.method, self.unlabelled, self._rows["unlabelled"], self.precision)
            energies["unlabelled"] = energy(logits)
            probability = logits.softmax(dim=1)
            confidence = probability.amax(dim=1)
            sure = confidence >= self.threshold
            name, share = largest_class(probability, min_confidence=self.threshold)
            found["unlabelled"] = {
                "acceptance": float(sure.double().mean()), "accepted": int(sure.sum()), "largest_class": share,
                "class": name, "quantile": float(confidence.quantile(1 - self.limits.adapt_share)),
            }  # fmt: skip
        found["energy"] = {name: float(value.mean()) for name, value in energies.items()}
        if len(energies) == 2:
            found["energy"]["high"] = high_energy_share(energies["unlabelled"], energies["holdout"])
            found["energy"]["unlike"] = unlike(energies["unlabelled"], energies["holdout"])
        return found

    def _values(self, found: Mapping[str, Any]) -> dict[str, float]:
        """What is logged, by names that a person understands."""
        values: dict[str, float | None] = {}
        if self.configured is not None:
            values["min_confidence"] = found["min_confidence"]
        if held := found.get("holdout"):
            values["holdout_accuracy"] = held["accuracy"]
            values["calibration_error"] = held["calibration_error"]
            if average := found.get("average"):
                values["holdout_accuracy_of_average"] = average["accuracy"]
                values["average_minus_live"] = average["accuracy"] - held["accuracy"]
                values["calibration_error_of_average"] = average["calibration_error"]
            if self.configured is not None:
                values["pseudo_label_acceptance"] = held["acceptance"]
                values["pseudo_label_precision"] = held["precision"]
            for share, each in by_class(held, self.classes).items():
                if share == "precision" or self.configured is not None:
                    values |= {f"{share}.{name}": value for name, value in each.items()}
        if pool := found.get("unlabelled"):
            if self.configured is not None:
                values["unlabelled_acceptance"] = pool["acceptance"]
                values["accepted_in_training"] = found.get("accepted_in_training")
            values["unlabelled_largest_class"] = pool["largest_class"]
        names = {"holdout": "energy_holdout", "unlabelled": "energy_unlabelled", "high": "high_energy_share",
                 "unlike": "unlike_holdout"}  # fmt: skip
        values |= {names[name]: value for name, value in found["energy"].items()}
        return {PREFIX + name: value for name, value in values.items() if value is not None}

    # guards

    def _judge(self, done: int, since: int, found: Mapping[str, Any]) -> list[str]:
        troubles = {
            "domain": self._foreign_pool(found), "skill": self._no_skill(found), "class": self._one_class(found),
            "precision": self._precision_fell(done, found), "accepted": self._nothing_accepted(found),
        }  # fmt: skip
        if troubles["domain"] or troubles["skill"]:
            troubles["accepted"] = None  # rightly so: a lower threshold would make it worse
        lines = []
        known = {name for _, name, _ in self.said}
        for name, trouble in troubles.items():
            self.lasted[name] = self.lasted.get(name, 0) + since if trouble else 0
            if trouble and name not in known and self.lasted[name] >= self.limits.patience * self.total:
                line = f"guard, step {done}: for {self.lasted[name]} steps {trouble}"
                if name == "accepted" and self.guard == "adapt":
                    self.adapted = self.configured
                self.said.append((done, name, line))
                lines.append(line)
                self.stopped = self.stopped or self.guard == "stop"
        self._adapt(found)
        return lines

    def _adapt(self, found: Mapping[str, Any]) -> None:
        """Once it had to be lowered, the threshold follows the confidence, up to what was configured."""
        if self.adapted is None or self.configured is None:
            return
        self.adapted = min(self.configured, max(found["unlabelled"]["quantile"], LEAST_CONFIDENCE))
        self._apply()

    def _apply(self) -> None:
        if self.adapted is not None:
            method = _of(self.method)
            method.config = replace(method.config, min_confidence=self.adapted)

    def _nothing_accepted(self, found: Mapping[str, Any]) -> str | None:
        pool = found.get("unlabelled")
        if pool is None or self.configured is None:
            return None
        share = found.get("accepted_in_training", pool["acceptance"])
        if share >= self.limits.min_accepted:
            return None
        down = f"it goes down to what {self.limits.adapt_share:.0%} of them reach, and follows their confidence"
        advice = "lower method.min_confidence, train for longer, or set guard: adapt"
        return (f"fewer than {self.limits.min_accepted:.1%} of the unlabelled images reached min_confidence "
                f"{self.threshold:.4g} ({share:.2%} since the last look), so next to nothing is learned from them: "
                f"{down if self.guard == 'adapt' else advice}")  # fmt: skip

    def _one_class(self, found: Mapping[str, Any]) -> str | None:
        pool, limit = found.get("unlabelled"), class_limit(self.limits.max_class_share, len(self.classes))
        if pool is None or pool["accepted"] < ENOUGH or pool["largest_class"] <= limit:
            return None
        if found.get("largest_class_in_training", 1.0) <= limit:  # running statistics that lag, not the labels
            return None
        what = "accepted pseudo-labels" if self.configured is not None else "predictions on the unlabelled images"
        return (f"class {self.classes[pool['class']]} held {pool['largest_class']:.0%} of the {what}, more than "
                f"{limit:.0%}: unless they are of that class, give the others as many labels, {self._surer}or take a "
                "method that aligns classes, such as ReMixMatch")  # fmt: skip

    @property
    def _surer(self) -> str:
        return "" if self.configured is None else "raise method.min_confidence, "

    def _precision_fell(self, done: int, found: Mapping[str, Any]) -> str | None:
        held = found.get("holdout")
        if held is None or self.unlabelled is None or held["accepted"] < ENOUGH:
            return None
        precision, accuracy = held["precision"], held["accuracy"]
        if self.best is None or precision > self.best[0]:
            self.best = (precision, accuracy, done)
        best, then, step = self.best
        # a model that accepts more is right less often: that is health as long as its accuracy rises
        if accuracy > then or not fell(precision, held["accepted"], best, self.limits.max_precision_drop):
            return None
        return (f"hold-out pseudo-labels were less often right ({precision:.1%}) than at step {step} ({best:.1%}), and "
                f"the accuracy did not rise, so the model learns its own mistakes: {self._surer}lower optim.lr or the "
                "weight of the unlabelled loss, or train for fewer steps")  # fmt: skip

    def _no_skill(self, found: Mapping[str, Any]) -> str | None:
        held = found.get("holdout")
        return None if held is None or self.unlabelled is None else no_skill(held, self.limits.min_skill)

    def _foreign_pool(self, found: Mapping[str, Any]) -> str | None:
        if "unlike" not in found["energy"]:
            return None
        rows = len(self._rows["unlabelled"]), len(self._rows["holdout"])
        return foreign_pool(found["energy"]["unlike"], *rows, self.limits.max_unlike)

    def facts(self) -> dict[str, Any]:
        """The last look, and what guards said: small plain values."""
        names = {"holdout": "live", "average": "average"}
        models = {names[name]: self.last[name] for name in names if name in self.last}
        values = {name.removeprefix(PREFIX): value for name, value in self._values(self.last).items()
                  if "." not in name}  # fmt: skip
        return {**values, **models, "said": [[step, line] for step, _, line in self.said]}
