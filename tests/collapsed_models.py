"""Models as a training at too high a learning rate leaves them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def collapse(folder: Path) -> None:
    """Make a BERT in `folder`, or a cross-encoder of one, give the same whatever it reads."""
    weights = load_file(folder / "model.safetensors")
    if "classifier.weight" in weights:
        weights["classifier.weight"] = np.zeros_like(weights["classifier.weight"])
    else:
        found = [name for name in weights if re.search(r"layer\.\d+\.output\.LayerNorm\.weight$", name)]
        last = max(found, key=lambda name: int(name.split("layer.")[1].split(".")[0]))
        weights[last] = np.full_like(weights[last], 1e-6)  # a gradient is left, a difference that counts is not
        weights[last.replace("weight", "bias")][:] = 1.0  # so that there is something to normalise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
