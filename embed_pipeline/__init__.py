"""Fine-tune retrieval models on your own questions and documents, as one Dagster DAG.

The work floor (every package here but `orchestration`) is plain Python and never imports dagster; the component is
therefore loaded only when somebody asks for it.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = ["RetrievalPipeline"]


def __getattr__(name: str) -> Any:
    if name == "RetrievalPipeline":
        from embed_pipeline.orchestration.component import RetrievalPipeline

        return RetrievalPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
