"""What every benchmark leaves: its claims with the ratios that were measured, and on which machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "sentence-transformers", "FlagEmbedding")


@dataclass(frozen=True)
class Claim:
    """One row of the table in README.md. A ratio is of two figures from the same run."""

    what: str
    ratio: float
    goal: float
    at_most: bool = False  # else at least

    @property
    def holds(self) -> bool:
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


def write(path: Path, claims: Sequence[Claim], measured: Any, *, quick: bool) -> None:
    """Write the JSON file that `table.py` reads. `measured` holds the figures behind the ratios, in JSON's types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "quick": quick,
        "machine": machine(),
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in claims],
        "measured": measured,
    }
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def sentence(claim: Claim) -> str:
    bound = f"{'at most' if claim.at_most else 'at least'} {claim.goal:.3g}"
    return f"{claim.what}: {claim.ratio:.2f} (claim: {bound}, {'holds' if claim.holds else 'does not hold'})"


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, GPU, versions."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
