"""Distillation of embeddings, without any labels: SimReg, Navaneet et al. 2022, arXiv:2201.05131.

A student's feature, through a projector that is dropped afterwards, matches a frozen teacher's feature of the same
view. So the teacher may be a network of other classes, or of none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Batch, Losses, Method, MethodConfig, View
from methods.encoders import Encoder
from methods.heads import mlp
from methods.precision import full_precision
from methods.views.policy import Augment

Distance = Literal["cosine", "mse"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingDistillationConfig(MethodConfig):
    teacher_dim: int  # length of the teacher's feature
    projector: Literal["linear", "mlp"] = "mlp"  # an MLP serves the student better though it is dropped, the paper
    distance: Distance = "cosine"  # the paper's squared distance of unit vectors halved; "mse" also minds lengths
    augment: Augment = Augment()  # weak, and the same view for both: best in the paper

    def __post_init__(self) -> None:
        if not self.teacher_dim > 0:
            raise ValueError(f"teacher_dim = {self.teacher_dim}: must be > 0, the length of the teacher's feature")


class EmbeddingDistillation(Method):
    """An encoder whose projected feature is its teacher's."""

    Config = EmbeddingDistillationConfig
    needs_teacher = True

    def __init__(self, encoder: Encoder, config: EmbeddingDistillationConfig, *, classes: int, images: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.teacher_dim = dim = config.teacher_dim
        self.projector = mlp(encoder.dim, dim, dim) if config.projector == "mlp" else nn.Linear(encoder.dim, dim)

    def views(self, pixels: int) -> tuple[View, ...]:
        return (View("weak", self.config.augment.build(pixels)),)

    def training_step(self, batch: Batch, progress: float) -> Losses:
        images = batch["weak"]
        assert self.teacher is not None, "the teacher was not lent: see Method.attach"
        with torch.no_grad():
            teacher = self.teacher.features(images)
        projected = self.projector(self.encoder(images))
        with torch.no_grad():
            similarity = F.cosine_similarity(projected.float(), teacher.float()).mean()
        loss = embedding_distance(projected, teacher, distance=self.config.distance)
        return {"loss": loss, "teacher_similarity": similarity}

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)


@full_precision
def embedding_distance(student: Tensor, teacher: Tensor, *, distance: Distance) -> Tensor:
    """How far features (B, D) are from the teacher's, the mean over rows; no gradient reaches the teacher.

    Args:
        distance: "cosine" is 1 - cos, half the squared distance of unit vectors, in [0, 2]: 1 where they are
            orthogonal. "mse" is the mean squared difference from the teacher's feature after its D numbers were given
            mean 0 and variance 1 (Wei et al. 2022, arXiv:2205.14141): a student of zeros has 1.
    Returns:
        0-d, without unit.
    """
    teacher = teacher.detach()
    if distance == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
    return F.mse_loss(student, F.layer_norm(teacher, teacher.shape[1:]))
