"""Which precision and memory layout a training takes: a rule over device and encoder, never a timing."""

from __future__ import annotations

from typing import Literal

import torch

from methods.encoders import Encoder, is_depthwise

Precision = Literal["float32", "bf16"]


def device() -> torch.device:
    """The first GPU when there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def auto_precision(encoder: Encoder) -> Precision:
    """bf16 where the device computes it natively, but float32 for depthwise convolutions on a CPU.

    The rule is part of a stage's key, because the precision changes the answer; `plan` prints it.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native and not is_depthwise(encoder) else "float32"


def autocast(precision: str, kind: str) -> torch.autocast:
    """The autocast region of a precision on a device kind, "cpu" or "cuda"."""
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")
