"""The card of a champion's model, from the manifests and reports of the artifacts that it was made of.

It needs the evaluation, so it exists once a champion does. Published versions are not touched: `champion` lays the
cards beside the record of the promotion, and what is pushed or exported carries them as its README.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from embed_pipeline.artifacts import Artifact, PipelineStore
from embed_pipeline.champions import Champion, models_of
from embed_pipeline.errors import ArtifactError, ConfigurationError
from embed_pipeline.evaluation.comparison import Comparison
from embed_pipeline.evaluation.results import EVALUATORS_FILE, SourceFigure
from embed_pipeline.evaluation.systems import read_serving
from embed_pipeline.losses import DEFAULT_LOSSES
from embed_pipeline.markdown import code, escaped, fenced, table
from embed_pipeline.model_files import JOB_FILE, MODEL_FOLDER, SERVING_FILE
from embed_pipeline.models.collection import load_collection
from embed_pipeline.publishing.snippets import blend_snippet, embedder_notes, embedder_snippets, reranker_snippets
from embed_pipeline.publishing.tables import metric_name
from embed_pipeline.settings import EncodingSettings, ModelSource, PipelineSettings, SourceSettings
from embed_pipeline.tables import EXAMPLES_FILE, PASSAGES_FILE, QUERIES_FILE, SPLITS, extra_folder

Kind = Literal["embedder", "reranker"]
_TASKS = {"embedder": "sentence-similarity", "reranker": "text-ranking"}
_SHOWN = 200  # characters of a text in an example
_LOSS_KEYS = (
    *("loss", "loss_arguments", "loss_wrapper", "loss_wrapper_arguments"),
    *("temperature", "knowledge_distillation"),
)
# What is said elsewhere in the card, or says nothing about the model.
_UNTOLD_ARGUMENTS = {"base_model", "encoding", "logging_steps", "nproc_per_node", *_LOSS_KEYS}


@dataclass(frozen=True)
class Carded:
    """A champion with everything that its cards tell of; `settings` are those of its pipeline."""

    settings: PipelineSettings
    store: PipelineStore
    champion: Champion

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("embedder",) if self.model("reranker") is None else ("embedder", "reranker")

    def model(self, kind: Kind) -> Artifact | None:
        embedder, *others = models_of(self.store, self.champion)
        return embedder if kind == "embedder" else next(iter(others), None)

    @property
    def evaluation(self) -> Artifact:
        return self.store.get("evaluation", self.champion.evaluation)

    @property
    def cleaned(self) -> Artifact:
        return self.store.get("cleaned_pairs", self.champion.cleaned_pairs)


def model_card(carded: Carded, kind: Kind, *, repository: str | None = None, exports: str | None = None) -> str:
    """The README.md of a champion's embedder or reranker, with front matter as the Hub takes it.

    `repository` is what the snippets load, a folder without it; `exports` the table of other forms (Markdown).
    Raises ArtifactError when a version that it tells of is gone, ConfigurationError when the Hub would refuse the front
    matter.
    """
    model = carded.model(kind)
    if model is None:
        raise ArtifactError(f"{carded.store.pipeline} has no reranker: there is no card of one")
    job = _job(carded.store, model)
    rows = [Comparison.model_validate(row) for row in carded.evaluation.report["summary"] if row["system"] == kind]
    parts = [
        f"# {carded.settings.name}: {kind}",
        _what_it_is(carded, kind, model, job),
        _section("Figures", _figures(carded, kind, rows)),
        _section("Use", _use(carded, kind, model, job, repository)),
        _section("Intended use", carded.settings.card.intended_use or _intended(carded, kind)),
        _section("Limits", _limits(carded, kind, model, job)),
        _section("Examples", _examples_told(carded)),
        _section("Other forms", exports or ""),
        _section("Data", _data(carded)),
        _section("Training", _training(carded, kind, model, job)),
        _section("Versions", _versions(carded, model)),
    ]
    body = "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"
    front = _front_matter(carded, kind, job, rows)
    try:
        return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}"))
    except ValueError as error:
        raise ConfigurationError(f"the Hub would refuse the {kind}'s card: {error}. Mend the YAML's `card`") from error


def write_cards(carded: Carded, folder: Path) -> dict[Kind, Path]:
    """`embedder.md` and, where there is one, `reranker.md` in `folder`; each appears whole."""
    written: dict[Kind, Path] = {}
    for kind in carded.kinds:
        path = folder / f"{kind}.md"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(model_card(carded, kind), encoding="utf-8")
        partial.replace(path)
        written[kind] = path
    return written


# --------------------------------------------------------------------------------------------- front matter


def _front_matter(carded: Carded, kind: Kind, job: dict[str, Any], rows: Sequence[Comparison]) -> ModelCardData:
    settings, card = carded.settings, carded.settings.card
    base = _hub_base(carded, kind, job)
    widget = [
        {"source_sentence": _short(query), "sentences": [_short(text) for text in texts]}
        for query, texts in _examples(carded)
    ]
    results = [
        EvalResult(
            task_type=_TASKS[kind],
            task_name="Retrieval" if settings.source.is_retrieval else "Semantic similarity",
            dataset_type=settings.name,
            dataset_name=f"{settings.name}, test split",
            dataset_split="test",
            dataset_revision=carded.cleaned.content,
            metric_type=row.metric,
            metric_name=metric_name(row.metric),
            metric_value=round(row.value, 6),
        )
        for row in rows
    ]
    results += [
        EvalResult(
            task_type=_TASKS[kind],
            dataset_type=figure.source,
            dataset_name=f"{figure.source}, test split",
            dataset_split="test",
            dataset_revision=carded.cleaned.content,
            metric_type=figure.metric,
            metric_name=figure.name,
            metric_value=round(figure.trained, 6),
        )
        for figure in _source_figures(carded, kind)
        if math.isfinite(figure.trained)
    ]
    tags = ["sentence-transformers", "embed_pipeline", *(["feature-extraction"] if kind == "embedder" else [])]
    tags.append("cross-encoder" if kind == "reranker" else "dense")
    # Only what is known is told: the Hub takes an empty field for a value.
    known: dict[str, Any] = {
        "license": card.license,
        "language": list(card.language) or None,
        "datasets": list(card.datasets) or None,
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "widget": (widget or None) if kind == "embedder" else None,
        "model_name": f"{settings.name}-{kind}" if results else None,
        "eval_results": results or None,
    }
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=_TASKS[kind],
        tags=tags,
        **{key: value for key, value in known.items() if value is not None},
    )


def _hub_base(carded: Carded, kind: Kind, job: dict[str, Any]) -> str | None:
    """The Hub repository of the base model, where it has one."""
    base = job["settings"]["base_model"]
    if base == "embedder":
        hub = carded.settings.hub
        if hub is not None and hub.embedder is not None:
            return hub.embedder
        base = carded.settings.embedder.base_model.model_dump()
    hub_id: str | None = base["hub"]
    return hub_id


# -------------------------------------------------------------------------------------------------- sections


def _what_it_is(carded: Carded, kind: Kind, model: Artifact, job: dict[str, Any]) -> str:
    settings = carded.settings
    what = {
        "embedder": "A bi-encoder: it turns questions and passages into vectors whose cosine says how well they fit.",
        "reranker": "A cross-encoder: it reads a question and a passage together and scores how well they fit.",
    }[kind]
    if not settings.source.is_retrieval:
        what = "A bi-encoder: it turns sentences into vectors whose cosine says how alike they are."
    merged = " Its weights are interpolated with those of its base." if _is_merged(model) else ""
    told = f"{settings.description.strip()}\n\n" if settings.description.strip() else ""
    return f"{told}{what} Fine-tuned by embed_pipeline from {_origin(job['settings']['base_model'])}.{merged}"


def _figures(carded: Carded, kind: Kind, rows: Sequence[Comparison]) -> str:
    evaluation = carded.evaluation
    told = evaluation.manifest.recipe.settings.get("evaluation", {})
    confidence = told.get("confidence", carded.settings.evaluation.confidence)
    figures = [
        (
            metric_name(row.metric),
            row.baseline_value,
            row.value,
            f"{row.gain:+.4f}",
            f"{row.interval_low:+.4f} to {row.interval_high:+.4f}",
            row.num_queries,
        )
        for row in rows
    ]
    trained = "embedder with this reranker" if kind == "reranker" else "fine-tuned"
    items = "questions" if carded.settings.source.is_retrieval else "pairs"
    header = ["metric", "base embedder", trained, "gain", f"{confidence:.0%} interval", items]
    return (
        f"On the test split, that nothing was trained on:\n\n{table(header, figures)}\n\n"
        f"The gate by which it became champion: {escaped(evaluation.report['gate']['sentence'])}.\n\n"
        + _sources_measured(_source_figures(carded, kind))
    )


def _sources_measured(figures: Sequence[SourceFigure]) -> str:
    if not figures:
        return ""
    rows = [
        (
            figure.name,
            figure.base,
            figure.trained,
            f"{figure.change:+.4f}",
            ""
            if figure.interval_low is None or figure.interval_high is None
            else f"{figure.interval_low:+.4f} to {figure.interval_high:+.4f}",
        )
        for figure in figures
    ]
    header = ["source and metric", "base", "fine-tuned", "difference", "interval"]
    return f"sentence-transformers' evaluators, on the test split of each source:\n\n{table(header, rows)}"


def _use(carded: Carded, kind: Kind, model: Artifact, job: dict[str, Any], repository: str | None) -> str:
    where, trusted = repository or "path/to/this/folder", bool(job["trust_remote_code"])
    if kind == "embedder":
        encoding = _encoding(model.path / MODEL_FOLDER, job["trust_remote_code"])
        lengths = table(
            ["", "questions", "passages"],
            [
                (
                    "prompt, put before the text",
                    code(encoding.query_prompt or "") or "none",
                    code(encoding.passage_prompt or "") or "none",
                ),
                ("longest text in tokens", encoding.query_max_length, encoding.passage_max_length),
            ],
        )
        pooling = f"Pooling: {encoding.pooling}; embeddings are normalised. All of it is saved in the folder."
        about = f"{lengths}\n\n{pooling}"
        snippets, notes = embedder_snippets(where, encoding, trust_remote_code=trusted), embedder_notes(encoding)
    else:
        length = _pair_length(model.path / MODEL_FOLDER, job["trust_remote_code"])
        weight, _ = read_serving(model.path)
        about = (
            f"A question and a passage may have {length} tokens together. Scores are logits: compare them within a "
            "question.\n\n"
            f"`{SERVING_FILE}` says how the final ranking is made: its `embedder_weight` ({weight:g}) is the share "
            "that the embedder's score keeps. Both models' scores of one question's candidates are standardised and "
            f"added by it; 0 means that the reranker decides alone.\n\n{fenced(blend_snippet(weight), 'python')}"
        )
        snippets, notes = reranker_snippets(where, length, trust_remote_code=trusted), []
    codes = [f"### {library}\n\n{fenced(snippet, 'python')}" for library, snippet in snippets.items()]
    return "\n\n".join([about, *codes, *notes])


def _intended(carded: Carded, kind: Kind) -> str:
    if not carded.settings.source.is_retrieval:
        return f"Comparing sentences of the kind that `{carded.settings.name}` was trained on."
    first = {"embedder": "Finding passages that answer a question", "reranker": "Reordering what an embedder found"}
    return f"{first[kind]}, in the domain of `{carded.settings.name}`: its questions over its documents."


def _limits(carded: Carded, kind: Kind, model: Artifact, job: dict[str, Any]) -> str:
    """What can be said from the facts alone."""
    if kind == "embedder":
        encoding = _encoding(model.path / MODEL_FOLDER, job["trust_remote_code"])
        cut = f"{encoding.query_max_length} tokens of a question and {encoding.passage_max_length} of a passage"
    else:
        length = _pair_length(model.path / MODEL_FOLDER, job["trust_remote_code"])
        cut = f"{length} tokens of question and passage together"
    held = ", ".join(f"{split} {count:,}" for split, count in _counts(carded.cleaned.path).items() if count)
    lines = [
        f"It reads {cut}; the rest is cut off.",
        f"It was measured on its own domain only ({held} rows by split). Other domains, languages and styles of "
        "questions were not, unless guard sets say so below.",
        "What is wrong or one-sided in the base model or in the data is likely to be found in it.",
    ]
    told = carded.evaluation.report["gate"].get("guards", [])
    guards = [f"Guard set {escaped(guard['sentence'])}." for guard in told]
    return "\n".join(f"- {line}" for line in [*lines, *guards])


def _examples_told(carded: Carded) -> str:
    rows = [(_short(query), _short(texts[0])) for query, texts in _examples(carded)]
    header = ["question", "passage"] if carded.settings.source.is_retrieval else ["sentence", "its pair"]
    return f"Of the test split:\n\n{table(header, rows)}" if rows else ""


def _data(carded: Carded) -> str:
    """Rows that cleaning kept, by source and split."""
    settings, cleaned = carded.settings, carded.cleaned
    sources: list[tuple[str, SourceSettings, Path]] = [(settings.name, settings.source, cleaned.path)]
    sources += [(extra.name, extra, extra_folder(cleaned.path, extra.name)) for extra in settings.extra_sources]
    rows = [
        (name, source.kind, *_counts(folder).values(), _passages(folder), source.license or "not told")
        for name, source, folder in sources
        if folder.is_dir()
    ]
    header = ["source", "kind", *SPLITS, "passages", "licence"]
    rejected = cleaned.report.get("rejected_rows")
    told = f" {rejected:,} delivered rows of `{settings.name}` were left out, each with its reason." if rejected else ""
    return (
        f"Questions (of example kinds: rows) that cleaning kept, by split:\n\n{table(header, rows)}\n\n"
        "No question, document or near-duplicate stands in two splits."
        f"{told} The data is version `{cleaned.version}` with content hash `{cleaned.content}`."
    )


def _training(carded: Carded, kind: Kind, model: Artifact, job: dict[str, Any]) -> str:
    told = job["settings"]
    parts = [
        ("Loss", _loss(job)),
        ("Training arguments", {k: v for k, v in told.items() if k not in _UNTOLD_ARGUMENTS and v not in (None, {})}),
        ("Hard negatives", _mining(carded.store, model)),
        ("Other sources", {e["name"]: _losses_of(e, kind) for e in job.get("extra_sources", ())}),
        ("How it went", _scalars(_trained(carded.store, model).report)),
    ]
    return "\n\n".join(
        f"### {title}\n\n{fenced(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), 'yaml')}"
        for title, content in parts
        if content
    )


def _versions(carded: Carded, model: Artifact) -> str:
    artifacts = [carded.cleaned, *_lineage(carded.store, model), carded.evaluation]
    rows = [(a.manifest.asset, code(a.version), code(a.content), a.manifest.created_at) for a in artifacts]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(model.manifest.libraries.items()))
    return f"{table(['', 'version', 'content', 'made'], rows)}\n\nMade with {libraries}."


# ----------------------------------------------------------------------------------------------------- facts


def _job(store: PipelineStore, model: Artifact) -> dict[str, Any]:
    job: dict[str, Any] = json.loads((_trained(store, model).path / JOB_FILE).read_text("utf-8"))
    return job


def _trained(store: PipelineStore, model: Artifact) -> Artifact:
    """What the training left: of a merged embedder, the one it was merged from."""
    return store.get("embedder", model.input("embedder")) if _is_merged(model) else model


def _is_merged(model: Artifact) -> bool:
    return model.manifest.asset == "merged_embedder"


def _lineage(store: PipelineStore, model: Artifact) -> Iterator[Artifact]:
    for asset, versions in sorted(store.lineage(model).items()):
        for version in sorted(versions):
            if asset != "cleaned_pairs":
                yield store.get(asset, version)


def _mining(store: PipelineStore, model: Artifact) -> dict[str, Any]:
    """The settings by which the negatives were mined that it was trained on; a reranker mines its own."""
    if model.manifest.asset == "reranker":
        return dict(model.manifest.recipe.settings.get("mining", {}))
    version = _trained(store, model).manifest.inputs.get("hard_negatives")
    if version is None or not store.has("hard_negatives", version):
        return {}
    return dict(store.get("hard_negatives", version).manifest.recipe.settings.get("mining", {}))


def _loss(job: dict[str, Any]) -> dict[str, Any]:
    """With the loss that an unset one stands for; FlagEmbedding has one of its own."""
    told = job["settings"]
    unset = told.get("loss") is None and told["engine"] == "sentence-transformers"
    default = {"loss": DEFAULT_LOSSES[job["source_kind"]]} if unset else {}
    return {**default, **{key: told[key] for key in _LOSS_KEYS if told.get(key) not in (None, {}, False)}}


def _source_figures(carded: Carded, kind: Kind) -> list[SourceFigure]:
    """The main figures of the library's evaluators, by the names that MLflow and the report have them under."""
    found = json.loads((carded.evaluation.path / EVALUATORS_FILE).read_text("utf-8"))
    figures = [SourceFigure.model_validate(row) for row in found]
    return [figure for figure in figures if figure.model == kind and figure.main]


def _scalars(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if isinstance(value, int | float | str)}


def _losses_of(extra: dict[str, Any], kind: Kind) -> dict[str, Any]:
    keys = ("reranker_loss", "reranker_loss_arguments") if kind == "reranker" else _LOSS_KEYS
    return {"kind": extra["kind"], **{key: extra[key] for key in keys if extra.get(key) not in (None, {})}}


@cache
def _encoding(folder: Path, trusted: bool) -> EncodingSettings:
    """Prompts, pooling and lengths as the loaded model has them, whatever its folder leaves to defaults."""
    from embed_pipeline.models.embedder import encoding_of, load_sentence_transformer

    return encoding_of(load_sentence_transformer(folder, device="cpu", trust_remote_code=trusted))


@cache
def _pair_length(folder: Path, trusted: bool) -> int:
    from embed_pipeline.models.reranker import Reranker

    return Reranker(folder, device="cpu", trust_remote_code=trusted).model.max_length


def _counts(folder: Path) -> dict[str, int]:
    """Rows by split of one source's cleaned tables."""
    file = folder / (QUERIES_FILE if (folder / QUERIES_FILE).is_file() else EXAMPLES_FILE)
    splits = pq.read_table(file, columns=["split"], partitioning=None)["split"]
    return {split: int(pc.sum(pc.equal(splits, split)).as_py() or 0) for split in SPLITS}


def _passages(folder: Path) -> int | str:
    path = folder / PASSAGES_FILE
    return pq.read_metadata(path).num_rows if path.is_file() else ""


def _examples(carded: Carded) -> list[tuple[str, list[str]]]:
    """The first test questions, each with a passage that answers it and one that answers another question."""
    wanted, folder = carded.settings.card.widget_examples, carded.cleaned.path
    if not wanted:
        return []
    if carded.settings.source.is_retrieval:
        collection = load_collection(folder, ("test",))
        queries, passages = collection.positives()
        first: dict[int, int] = {}
        for query, passage in zip(queries.tolist(), passages.tolist(), strict=True):
            first.setdefault(query, passage)
        pairs = [(collection.queries[query], collection.texts[passage]) for query, passage in first.items()]
    else:
        table = pq.read_table(folder / EXAMPLES_FILE, columns=["sentence1", "sentence2", "split"], partitioning=None)
        test = table.filter(pc.equal(table["split"], "test"))
        pairs = list(zip(test["sentence1"].to_pylist(), test["sentence2"].to_pylist(), strict=True))
    shown = pairs[:wanted]
    others = [*pairs[1 : len(shown) + 1], pairs[0]] if len(pairs) > 1 else pairs
    return [
        (query, list(dict.fromkeys([text, other]))) for (query, text), (_, other) in zip(shown, others, strict=False)
    ]


def _origin(base: dict[str, Any] | str) -> str:
    if isinstance(base, str):
        return "the fine-tuned embedder of the same pipeline"
    source = ModelSource.model_validate(base)
    if source.hub is not None:
        return f"[{source.hub}](https://huggingface.co/{source.hub}) at revision `{source.revision}`"
    if source.package is not None:
        return str(code(f"{source.package}:{source.folder}"))
    return f"the local model {code(Path(str(source.path)).name)}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text.strip()}" if text.strip() else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
