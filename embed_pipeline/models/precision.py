"""Which arithmetic to use on this machine. Loads torch only where a GPU or a computation needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from embed_pipeline.settings import Precision

ResolvedPrecision = Literal["float32", "bfloat16", "float16"]
CPU_INFO = Path("/proc/cpuinfo")
# What torch asks for before it computes in bfloat16 on a CPU (`mkldnn._is_mkldnn_bf16_supported`), and AMX itself.
_BFLOAT16_FLAGS = {"avx512bw", "avx512vl", "avx512dq", "amx_tile", "amx_bf16"}


def resolve_precision(precision: Precision, device: str) -> ResolvedPrecision:
    """`auto` becomes bfloat16 where the hardware computes in it (4 times as fast as float32 on a CPU with AMX)."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device == "cpu" and _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    """As the kernel says: torch says the same, but takes seconds to load, and a recipe is asked for every time."""
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= _BFLOAT16_FLAGS


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
