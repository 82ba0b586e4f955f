"""What a training leaves in its output folder.

model/               loads in SentenceTransformer and FlagModel, or in CrossEncoder and FlagReranker; with its card
training_log.jsonl   one JSON object a logging event
summary.json         rows, steps, dev figures, time, arithmetic
serving.json         rerankers: the embedder's share in the final score
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sentence_transformers import CrossEncoder, SentenceTransformer

from embed_pipeline.markdown import code, escaped, fenced, table
from embed_pipeline.model_files import MODEL_FOLDER, SERVING_FILE, SUMMARY_FILE
from embed_pipeline.settings import EncodingSettings, ModelSource
from embed_pipeline.training.job import EmbedderJob, RerankerJob, TrainingJob


@dataclass(frozen=True)
class Summary:
    kind: str
    engine: str
    queries: int  # of the own source; of scored pairs, the pairs
    rows: dict[str, int]  # what an epoch goes through, by source
    steps: int
    epochs: float
    dev_queries: int
    dev_metric: str  # what the weights were chosen by
    dev_before: float | None
    dev_kept: float | None  # of the weights that were kept
    kept_step: int | None
    kept_because: str | None
    dev_verdict: Literal["better", "worse", "undecided"] | None  # the kept weights against the base model
    dev_gain: str | None  # the same in a sentence, with its interval
    train_seconds: float  # without loading, with the evaluations
    steps_per_second: float
    world_size: int
    device: str
    precision: str
    optimizer: str
    attention: str  # the implementation
    tf32: bool  # for what stays float32
    loader_processes: int  # of each process; 0: it loads its rows itself
    pinned_memory: bool
    bfloat16_speedup: float | None  # over float32, of products as measured on this machine; on a CPU
    threads: int
    seed: int
    learning_rate: float
    batch_size: int  # that was trained with: find_batch_size may have found a smaller one
    train_group_size: int
    sub_batch_size: int | None  # texts encoded at a time, by gradient caching; None: the whole batch
    truncated: dict[str, float]  # kind of text -> share that is cut to the maximum length, of a sample
    warnings: list[str]  # what of the rows costs something
    preflight: str | None = None  # what was forecast, in a sentence; not of a training that went on
    forecast_seconds: float | None = None
    forecast_memory: int | None = None  # bytes, of the process that needs most


def write_model(model: SentenceTransformer | CrossEncoder, job: TrainingJob, summary: Summary, card: str) -> Path:
    """Save the weights (float32 safetensors), everything needed to encode or score as trained, and the card."""
    folder = job.output / MODEL_FOLDER
    model.save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text(card)
    write_json(job.output / SUMMARY_FILE, asdict(summary))
    return folder


def write_serving(output: Path, weight: float, by_weight: dict[float, float]) -> None:
    """How rerankers are used with their embedder; see `models.blend`."""
    figures = {str(tried): value for tried, value in by_weight.items()}
    write_json(output / SERVING_FILE, {"embedder_weight": weight, "dev_ndcg_at_10_by_weight": figures})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def embedder_card(job: EmbedderJob, summary: Summary, encoding: EncodingSettings) -> str:
    """The model card of an embedder, with the three lines that load it in either library."""
    instruction = f"query_instruction_for_retrieval={encoding.query_prompt!r}, " if encoding.query_prompt else ""
    in_sentence_transformers = """\
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder")
scores = model.similarity(model.encode_query(queries), model.encode_document(passages))
"""
    in_flag_embedding = f"""\
from FlagEmbedding import FlagModel
model = FlagModel("path/to/this/folder", {instruction}pooling_method={encoding.pooling!r}, \
normalize_embeddings=True, query_max_length={encoding.query_max_length}, \
passage_max_length={encoding.passage_max_length}, use_fp16=False)
scores = model.encode_queries(queries) @ model.encode_corpus(passages).T
"""
    usage = f"{fenced(in_sentence_transformers, 'python')}\n\n{fenced(in_flag_embedding, 'python')}\n"
    if encoding.passage_prompt:
        usage += f"\nWith FlagModel, put {code(encoding.passage_prompt)} before every passage.\n"
    if encoding.pooling == "lasttoken":
        usage += "\nFlagModel knows no last-token pooling for encoders; use sentence-transformers.\n"
    return _card(job, summary, "sentence-similarity", "An embedder for retrieval", usage)


def reranker_card(job: RerankerJob, summary: Summary, max_length: int) -> str:
    """The model card of a reranker, with the three lines that load it in either library."""
    usage = f"""\
```python
from sentence_transformers import CrossEncoder
model = CrossEncoder("path/to/this/folder")
scores = model.predict([(query, passage) for passage in passages])
```

```python
from FlagEmbedding import FlagReranker
model = FlagReranker("path/to/this/folder", max_length={max_length}, use_fp16=False)
scores = model.compute_score([(query, passage) for passage in passages])
```

Scores are logits: compare them within a query. `serving.json`, beside this folder, holds the share that the
embedder's score should have in the final ranking.
"""
    return _card(job, summary, "text-ranking", "A reranker", usage)


def _origin(base: ModelSource | Literal["embedder"]) -> str:
    if not isinstance(base, ModelSource):
        return "the fine-tuned embedder of the same pipeline"
    return f"{escaped(base.hub)} at revision {base.revision}" if base.hub else str(code(str(base.package or base.path)))


def _card(job: EmbedderJob | RerankerJob, summary: Summary, task: str, what: str, usage: str) -> str:
    base = job.settings.base_model
    hub = base.hub if isinstance(base, ModelSource) else None
    front_matter = "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            f"pipeline_tag: {task}",
            *([f"base_model: {json.dumps(hub)}"] if hub else []),
            f"tags: [sentence-transformers, {summary.kind}]",
            "---",
        ]
    )
    rows = [(name, str(value)) for name, value in asdict(summary).items() if value is not None]
    return f"""{front_matter}

# {what}

Fine-tuned with embed_pipeline from {_origin(base)} on {summary.queries} queries.

## Use

{usage}
## Training

{table(["", ""], rows)}

{fenced(job.settings.model_dump_json(indent=2), "json")}
"""
