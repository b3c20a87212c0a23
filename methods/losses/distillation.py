"""The softened divergence of knowledge distillation: Hinton et al. 2015, arXiv:1503.02531, section 2."""

from __future__ import annotations

from torch import Tensor

from methods.consistency import consistency
from methods.precision import full_precision


@full_precision
def distillation(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows; no gradient reaches the teacher.

    The gradient with respect to a row of `student` is T (p_student - p_teacher) / B: T² keeps it of order 1 at any T.

    Args:
        student, teacher: logits (B, K), not softened. A constant added to a row changes nothing.
        temperature: T > 0.
    Returns:
        0-d float32 in nats. Of (1, 2, 3) and (3, 2, 1): 1.150421 at T = 1, 1.319630 at 4, and 4/3 as T grows, which
        is the variance of the differences of logits halved. The published code averages over the classes too, 1 / K
        of this, and makes up for it by a multiplier.
    """
    softened = (teacher.detach() / temperature).softmax(dim=1)
    return temperature**2 * consistency(softened, student / temperature, distance="kl")
