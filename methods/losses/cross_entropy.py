"""Cross-entropy with label smoothing, of labels or distributions: Szegedy et al. 2015, arXiv:1512.00567, eq. 3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from methods.precision import full_precision


@full_precision
def cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean of -Σ q_k ln p_k over the rows.

    Args:
        logits: (B, K).
        target: labels (B,) int64, or distributions (B, K) whose rows sum to 1.
        smoothing: ε in [0, 1); the target becomes (1 - ε) q + ε / K.
    Returns:
        0-d float32 in nats. Equal logits give log K for every target.
    """
    return F.cross_entropy(logits, target, label_smoothing=smoothing)
