"""What sits on a trunk: projectors and classifiers."""

from __future__ import annotations

from torch import nn


def mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, linear: (B, dim) to (B, out), SimCLR's projector g(·) (section 2.1)."""
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def classifier(dim: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout on the pooled features, then a linear layer: (B, dim) to (B, classes) logits."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, classes))
