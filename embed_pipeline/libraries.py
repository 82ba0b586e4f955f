"""The libraries that decide what a model computes, besides its settings: which version of them made what.

Another version of them may change the last bits, or, rarely, more. By default it makes no new version of anything: an
upgrade that retrained everything overnight would be worse than a model that was trained with the library of before. It
is told wherever such a model is used; `retrain_after_library_upgrade` asks for new ones.
"""

from __future__ import annotations

import importlib.metadata

from embed_pipeline.artifacts import Artifact

LIBRARIES_OF_MODELS = ("torch", "transformers", "sentence-transformers", "FlagEmbedding")
# Assets whose content a model computes.
COMPUTED = ("hard_negatives", "embedder", "merged_embedder", "reranker", "evaluation")


def installed() -> dict[str, str]:
    """Version by library."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES_OF_MODELS}


def upgrades_since(artifact: Artifact) -> str | None:
    """Which of the libraries are others than those that made `artifact`, in words; None where none is, or it has none
    to do with them."""
    if artifact.manifest.asset not in COMPUTED:
        return None
    made_with = artifact.manifest.libraries
    changed = [
        f"{name} {made_with.get(name, 'of an unknown version')} ({now} is installed)"
        for name, now in installed().items()
        if made_with.get(name) != now
    ]
    return f"made with {', '.join(changed)}" if changed else None
