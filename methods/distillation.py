"""Knowledge distillation: Hinton et al. 2015, arXiv:1503.02531; its variants after Yuan et al. 2019, arXiv:1909.11723.

Which variant it is depends on the teacher that a recipe gives: a stronger network (KD), a weaker one (Re-KD), one that
was hardly trained (De-KD), a trained copy of the student (Tf-KD self), or none (Tf-KD reg, `VirtualTeacher`).
`ForeignModel` holds a network from elsewhere, whose classes may be read as the data's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.consistency import consistency
from methods.encoders import Encoder
from methods.heads import classifier
from methods.losses.cross_entropy import cross_entropy
from methods.losses.distillation import distillation
from methods.precision import full_precision
from methods.views.policy import Augment


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MethodConfig):
    # share of the teacher. The released code averages its divergence over the classes too: its 0.9 to 0.95 on ten
    # classes are 0.47 to 0.66 of the whole, and its 0.6 where the weaker network teaches is 0.13
    alpha: float = 0.5
    temperature: float = 4.0  # of both; for short runs, 20 in the published ones of 200 epochs
    augment: Augment = Augment()  # pad 4, crop, flip: He et al. 2015, section 4.2; the teacher sees the same view
    label_smoothing: float = 0.0  # of the labels' part
    dropout: float = 0.0  # on the student's pooled features, fraction dropped

    def __post_init__(self) -> None:
        _check(self)


def _check(config: DistillationConfig | VirtualTeacherConfig) -> None:
    if not 0 <= config.alpha <= 1:
        raise ValueError(f"alpha = {config.alpha}: must be in [0, 1], the weight of the teacher")
    if not config.temperature > 0:
        raise ValueError(f"temperature = {config.temperature}: must be > 0, it divides logits")
    config.check_fractions("label_smoothing", "dropout")


class Distillation(Method):
    """A classifier on labels and on its teacher's softened outputs: (1 - α) H(y, p) + α T² KL(p_T of teacher ‖ p_T).

    With α = 0 it is supervised training.
    """

    Config = DistillationConfig
    needs_teacher = True

    def __init__(self, encoder: Encoder, config: DistillationConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("labelled", self.config.augment.build(pixels), stream="labelled"),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        images, label = batch["labelled"], batch["label"]
        assert self.teacher is not None, "the teacher was not lent: see Method.attach"
        logits = self.logits(images)
        with torch.no_grad():
            teacher: Tensor = self.teacher.logits(images)  # type: ignore[operator]  # a classifier, as plans check
        hard = cross_entropy(logits, label, smoothing=self.config.label_smoothing)
        soft = distillation(logits, teacher, temperature=self.config.temperature)
        answer, told = logits.argmax(dim=1), teacher.argmax(dim=1)
        return {
            "loss": (1 - self.config.alpha) * hard + self.config.alpha * soft,
            "labelled_loss": hard.detach(), "soft_loss": soft.detach(),
            "train_accuracy": (answer == label).float().mean(), "teacher_accuracy": (told == label).float().mean(),
            "teacher_agreement": (answer == told).float().mean(),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


@dataclass(frozen=True, kw_only=True)
class VirtualTeacherConfig(MethodConfig):
    alpha: float = 0.1  # weight of the virtual teacher; published for ResNet-18 and GoogLeNet
    temperature: float = 20.0  # same source, ResNet-18; 10 to 40 elsewhere
    correct: float = 0.99  # the virtual teacher's probability of the right class, released code; paper: at least 0.9
    softened: bool = False  # the student too, as in the paper and then times T²; false is the released code
    augment: Augment = Augment()  # pad 4, crop, flip: He et al. 2015, section 4.2
    label_smoothing: float = 0.0  # of the labels' part
    dropout: float = 0.0  # on the pooled features, fraction dropped

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.correct < 1:
            raise ValueError(f"correct = {self.correct}: must be in (0, 1), a probability")


class VirtualTeacher(Method):
    """Tf-KD reg: the teacher is a distribution made by hand, (1 - α) H(y, p) + α KL(softmax(p_virtual / T) ‖ p)."""

    Config = VirtualTeacherConfig

    def __init__(self, encoder: Encoder, config: VirtualTeacherConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, classes, config.dropout)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("labelled", self.config.augment.build(pixels), stream="labelled"),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        label = batch["label"]
        logits = self.logits(batch["labelled"])
        hard = cross_entropy(logits, label, smoothing=self.config.label_smoothing)
        told = virtual_teacher(label, logits.shape[1], correct=self.config.correct).to(hard.dtype)
        soft = virtual_loss(logits, told, temperature=self.config.temperature, softened=self.config.softened)
        return {
            "loss": (1 - self.config.alpha) * hard + self.config.alpha * soft,
            "labelled_loss": hard.detach(), "soft_loss": soft.detach(),
            "train_accuracy": (logits.argmax(dim=1) == label).float().mean(),
        }  # fmt: skip

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.encoder(images))


def virtual_teacher(label: Tensor, classes: int, *, correct: float) -> Tensor:
    """(B, K): `correct` for the label, the rest shared equally; of label 0, K = 3 at 0.9: (0.9, 0.05, 0.05)."""
    told = torch.full((len(label), classes), (1 - correct) / max(1, classes - 1), device=label.device)
    return told.scatter(1, label[:, None], correct)


@full_precision
def virtual_loss(student: Tensor, told: Tensor, *, temperature: float, softened: bool) -> Tensor:
    """KL(softmax(told / T) ‖ p) of student logits (B, K), in nats, the mean over rows.

    The virtual teacher's probabilities are softened as if they were logits. Of logits (1, 2, 3) and (0.9, 0.05, 0.05)
    at T = 20: 0.323462. With `softened` p has T as well, 0.001749, times T² as for every teacher: 0.699638.
    """
    if softened:
        return distillation(student, told, temperature=temperature)
    return consistency((told / temperature).softmax(dim=1), student, distance="kl")


@dataclass(frozen=True, kw_only=True)
class ForeignModelConfig(MethodConfig):
    outputs: int = 0  # classes that its own head tells apart; 0: as many as the data has
    groups: tuple[tuple[int, ...], ...] = ()  # by class, the outputs that mean it; (): output k is class k
    augment: Augment = Augment()  # of further training: He et al. 2015, section 4.2

    def __post_init__(self) -> None:
        if self.outputs < 0:
            raise ValueError(f"outputs = {self.outputs}: must be >= 0")
        named = [output for group in self.groups for output in group]
        if not all(self.groups):
            raise ValueError("groups: every class needs at least one output that means it")
        if len(named) != len(set(named)):
            raise ValueError(f"groups: output {max(named, key=named.count)} may mean one class only")
        if named and not 0 <= min(named) <= max(named) < self.outputs:
            raise ValueError(f"groups: outputs are 0 to {self.outputs - 1}, found {min(named)} to {max(named)}")


class ForeignModel(Method):
    """A network from elsewhere: its features and, with a head, its own classes read as the data's.

    p(class) is the sum of its outputs' probabilities, divided by the sum over all outputs that mean any class: what it
    says given that the image is of one of these. Without classes it has features alone.
    """

    Config = ForeignModelConfig

    def __init__(self, encoder: Encoder, config: ForeignModelConfig, *, classes: int, images: int) -> None:
        super().__init__()
        if config.groups and len(config.groups) != classes:
            raise ValueError(f"groups: are of {len(config.groups)} classes, the data has {classes}")
        outputs = config.outputs or classes
        if not config.groups and classes and outputs != classes:
            raise ValueError(f"outputs = {outputs}: the data has {classes} classes; say by groups which means which")
        self.config, self.encoder = config, encoder
        self.head = classifier(encoder.dim, outputs, 0.0) if outputs else None

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("labelled", self.config.augment.build(pixels), stream="labelled"),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        logits = self.logits(batch["labelled"])
        accuracy = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return {"loss": cross_entropy(logits, batch["label"]), "train_accuracy": accuracy}

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1]. Raises ValueError where it was made without classes."""
        if self.head is None:
            raise ValueError("this model tells no classes apart: it has features alone")
        own = self.head(self.encoder(images))
        return grouped(own, self.config.groups) if self.config.groups else own


@full_precision
def grouped(logits: Tensor, groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """Logits (B, K) of K groups of classes: the log of the sum of their exponentials, so that probabilities add up.

    Of probabilities (0.4, 0.2, 0.1, 0.3) and groups (0, 1), (2,): (6/7, 1/7); output 3 means none of them.
    """
    return torch.stack([logits[:, list(group)].logsumexp(dim=1) for group in groups], dim=1)
