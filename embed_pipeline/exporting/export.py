"""The champion in other forms, each measured against the original before it is kept."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from embed_pipeline.errors import ModelError
from embed_pipeline.evaluation.figure import Figure, interval
from embed_pipeline.evaluation.parity import Parity
from embed_pipeline.exporting.forms import (
    LARGEST_SCORE_DIFFERENCE,
    ORIGINAL,
    REPORT_FILE,
    RERANKER_FORM,
    TABLE_FILE,
    WHAT,
    ExportReport,
    FormResult,
    RerankerResult,
    library_versions,
    markdown,
    why_not,
)
from embed_pipeline.exporting.graph import quantise_onnx, write_onnx, write_openvino, write_reranker_onnx
from embed_pipeline.exporting.measure import Encoded, TestSplit, texts_per_second
from embed_pipeline.exporting.runtime import ExportedEmbedder, ExportedReranker
from embed_pipeline.exporting.snippets import BINARY, INT8, cut_snippet, graph_snippet, reranker_snippet
from embed_pipeline.exporting.vectors import BinaryVectors, CutVectors, Int8Vectors, VectorForm, least_cosine
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.ranks import ALONE, Ranks
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.publishing.tables import metric_name
from embed_pipeline.settings import EvaluationSettings, ExportSettings, Precision

logger = logging.getLogger(__name__)

README = "README.md"


@dataclass(frozen=True)
class ExportedModels:
    """Model folders, and whether their own Python code may run."""

    embedder: Path
    reranker: Path | None = None
    trust_embedder_code: bool = False
    trust_reranker_code: bool = False


def export(
    models: ExportedModels,
    test: TestSplit,
    settings: ExportSettings,
    evaluation: EvaluationSettings,
    seed: int,
    out: Path,
    *,
    parity: Parity | None = None,
    precision: Precision = "auto",
    ranks: Ranks = ALONE,
    versions: Mapping[str, str] | None = None,
) -> ExportReport:
    """Make and measure every form that `settings` wants; those that are good enough stay in `out/<form>/`.

    Also writes `exports.json` (an ExportReport) and `exports.md`, the same as a table. A form that cannot be made, is
    broken or loses more than `settings.max_loss` is part of both with its reason, and leaves no files. `parity` (see
    `evaluation.parity`) is what a reranker in ONNX is compared by; without it none is made.

    Raises ModelError when the original does not load or gives NaN, or has fewer dimensions than are asked for.
    """
    original = Embedder(models.embedder, precision=precision, trust_remote_code=models.trust_embedder_code, ranks=ranks)
    encoded = test.encode(original)
    dimension = encoded.right.shape[1]
    if settings.dimensions and max(settings.dimensions) >= dimension:
        raise ModelError(
            f"exports.dimensions: {max(settings.dimensions)} is not below the {dimension} of the embedder in "
            f"{models.embedder}. Take it out"
        )
    exports = _Exports(models, test, settings, evaluation, seed, out, original, encoded)
    before = set(out.iterdir())
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as scratch:
        forms = [exports.of_original(), *exports.graphs(Path(scratch)), *exports.vectors()]
        reranker = exports.of_reranker(parity, Path(scratch))
    kept = {form.name for form in forms if form.published} | {RERANKER_FORM if reranker and reranker.published else ""}
    for folder in set(out.iterdir()) - before:  # what was half written when its form failed
        if folder.name not in kept:
            shutil.rmtree(folder)
    report = ExportReport(
        versions=dict(versions or {}),
        metric=test.metric,
        items=test.items,
        passages=test.passages,
        confidence=evaluation.confidence,
        max_loss=settings.max_loss,
        precision=original.precision,
        forms=forms,
        reranker=reranker,
        libraries=library_versions(settings),
    )
    (out / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (out / TABLE_FILE).write_text(markdown(report), encoding="utf-8")
    return report


@dataclass
class _Exports:
    """One export; the original is encoded and measured once."""

    models: ExportedModels
    test: TestSplit
    settings: ExportSettings
    evaluation: EvaluationSettings
    seed: int
    out: Path
    original: Embedder
    encoded: Encoded
    measured: Figure = field(init=False)
    timed: Embedder = field(init=False)

    def __post_init__(self) -> None:
        self.measured = self.test.measure(self.encoded)
        # Speeds are compared on the CPU, where the exported forms run, and past the cache.
        self.timed = Embedder(
            self.models.embedder, device="cpu", trust_remote_code=self.models.trust_embedder_code, batch_size=32
        )

    def of_original(self) -> FormResult:
        return FormResult(
            name=ORIGINAL,
            kind="model",
            what=f"{WHAT[ORIGINAL]} (on the CPU in {self.timed.precision})",
            published=True,
            value=self.measured.value,
            bytes_on_disk=folder_size(self.models.embedder),
            bytes_per_vector=self.encoded.right.shape[1] * 4,
            # Before any other runtime is loaded: their idle threads would take part of the processor from this one's.
            texts_per_second=texts_per_second(
                lambda texts: self.timed.encode_passages(texts, progress=False), self.test.timed
            ),
        )

    def graphs(self, scratch: Path) -> Iterator[FormResult]:
        """ONNX first, whether it is wanted or not: the other graphs are made of it."""
        if not self.settings.formats:
            return
        onnx = _Attempt()
        with onnx.telling("onnx"):
            onnx.folder = write_onnx(self.timed.model, _new(scratch / "onnx"))
        makers: dict[str, Callable[[Path, Path], Path]] = {
            "onnx": lambda source, _: source,
            "onnx-int8": quantise_onnx,
            "openvino": lambda source, folder: write_openvino(source, folder, int8=False),
            "openvino-int8": lambda source, folder: write_openvino(source, folder, int8=True),
        }
        for name in self.settings.formats:
            attempt = _Attempt(reason=onnx.reason)
            if onnx.folder is not None:
                with attempt.telling(name):
                    folder = onnx.folder if name == "onnx" else _new(scratch / name)
                    attempt.folder = makers[name](onnx.folder, folder)
                    attempt.result = self._of_graph(name, attempt.folder)
            yield attempt.result or FormResult(
                name=name, kind="model", what=WHAT[name], published=False, reason=attempt.reason
            )

    def _of_graph(self, name: str, folder: Path) -> FormResult:
        embedder = ExportedEmbedder(folder)
        found = self.test.encode(embedder)
        cosine = self.encoded.least_cosine(found)
        measured = self.test.measure(found)
        speed = texts_per_second(embedder.encode_passages, self.test.timed)
        size = folder_size(folder)
        (folder / README).write_text(f"# {WHAT[name]}\n\n{graph_snippet(name, embedder.form)}", encoding="utf-8")
        return self._judged(
            FormResult(
                name=name,
                kind="model",
                what=WHAT[name],
                published=True,
                bytes_on_disk=size,
                bytes_per_vector=found.right.shape[1] * 4,
                texts_per_second=speed,
            ),
            measured,
            cosine,
            lambda kept: shutil.copytree(folder, kept, dirs_exist_ok=True),
        )

    def vectors(self) -> Iterator[FormResult]:
        dimension = self.encoded.right.shape[1]
        makers: dict[str, tuple[Callable[[], VectorForm], str, str]] = {
            "int8": (
                lambda: Int8Vectors.calibrated(self.test.calibration(self.original, self.encoded)),
                WHAT["int8"],
                INT8,
            ),
            "binary": (lambda: BinaryVectors(dimension), WHAT["binary"], BINARY),
        }
        wanted = {str(name): makers[name] for name in self.settings.embeddings}
        for size in self.settings.dimensions:
            wanted[f"dimensions-{size}"] = (
                lambda size=size: CutVectors(size),  # type: ignore[misc]
                f"the first {size} of {dimension} numbers, normalised again",
                cut_snippet(size),
            )
        for name, (make, what, snippet) in wanted.items():
            attempt = _Attempt()
            with attempt.telling(name):
                attempt.result = self._of_vectors(name, make(), what, snippet)
            yield attempt.result or FormResult(
                name=name, kind="embeddings", what=what, published=False, reason=attempt.reason
            )

    def _of_vectors(self, name: str, form: VectorForm, what: str, snippet: str) -> FormResult:
        def keep(folder: Path) -> None:
            form.save(folder)
            (folder / README).write_text(f"# {what}\n\n{snippet}", encoding="utf-8")

        return self._judged(
            FormResult(
                name=name,
                kind="embeddings",
                what=what,
                published=True,
                bytes_per_vector=form.bytes_per_vector(self.encoded.right.shape[1]),
            ),
            self.test.measure(self.encoded, form),
            least_cosine(form, self.encoded.right),
            keep,
        )

    def _judged(self, form: FormResult, measured: Figure, cosine: float, keep: Callable[[Path], object]) -> FormResult:
        """With its figures; its files are kept where they allow it."""
        difference = measured.value - self.measured.value
        reason = why_not(form.name, difference, cosine, self.settings.max_loss, metric_name(self.test.metric))
        samples, confidence = self.evaluation.bootstrap_samples, self.evaluation.confidence
        low, high = interval(self.measured, measured, samples=samples, confidence=confidence, seed=self.seed) or (
            None,
            None,
        )
        if reason is None:
            keep(_new(self.out / form.name))
        else:
            logger.warning("%s is not published: it %s", form.name, reason)
        return form.model_copy(
            update={
                "published": reason is None,
                "reason": reason,
                "value": measured.value,
                "difference": difference,
                "interval_low": low,
                "interval_high": high,
                "min_cosine": cosine,
            }
        )

    def of_reranker(self, parity: Parity | None, scratch: Path) -> RerankerResult | None:
        """In ONNX, where that is wanted: by its scores, which alone decide its order."""
        folder = self.models.reranker
        if folder is None or parity is None or "onnx" not in self.settings.formats:
            return None
        attempt = _Attempt()
        result = None
        with attempt.telling(RERANKER_FORM):
            trusted = self.models.trust_reranker_code
            model = Reranker(folder, precision="float32", device="cpu", trust_remote_code=trusted).model
            made = write_reranker_onnx(model, _new(scratch / RERANKER_FORM))
            exported = ExportedReranker(made)
            expected = np.asarray(parity.scores)
            scale = max(1.0, float(np.abs(expected).max()))
            largest = float(np.abs(exported.score(parity.pairs) - expected).max()) / scale
            if not largest <= LARGEST_SCORE_DIFFERENCE:
                raise ModelError(f"is another model: a score differs by {largest:.2g}")
            size = folder_size(made)
            text = f"# The reranker: ONNX graph, float32 weights\n\n{reranker_snippet(exported.form)}"
            (made / README).write_text(text, encoding="utf-8")
            shutil.copytree(made, self.out / RERANKER_FORM)
            result = RerankerResult(published=True, largest_difference=largest, bytes_on_disk=size)
        return result or RerankerResult(published=False, reason=attempt.reason)


@dataclass
class _Attempt:
    """A runtime may fail on a model in any way: what it said is the reason why the form is missing."""

    folder: Path | None = None
    result: FormResult | None = None
    reason: str | None = None

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self.reason = first if isinstance(error, ModelError) else f"failed with {type(error).__name__}: {first}"
            logger.warning("%s is not published: it %s", name, self.reason)


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
