"""The other forms of an embedder: their names, the packages they need, and what was found of each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from embed_pipeline.errors import ConfigurationError
from embed_pipeline.markdown import code, escaped
from embed_pipeline.markdown import table as markdown_table
from embed_pipeline.publishing.tables import metric_name
from embed_pipeline.settings import ExportSettings

REPORT_FILE = "exports.json"
TABLE_FILE = "exports.md"
ORIGINAL = "original"
RERANKER_FORM = "reranker-onnx"
# A graph with full weights computes what the model computes; below this it is another model, whatever its nDCG.
LEAST_COSINE = {"onnx": 0.999, "openvino": 0.999}
LARGEST_SCORE_DIFFERENCE = 1e-3  # of a reranker in ONNX, as a share of the largest score where that is above 1
TOLERANCE = 1e-12  # a mean that was summed in another order is the same mean

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "onnx-int8": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "openvino-int8": ("onnx", "onnxscript", "openvino", "nncf"),
}
WHAT = {
    ORIGINAL: "the PyTorch model",
    "onnx": "ONNX graph, float32 weights",
    "onnx-int8": "ONNX graph, int8 weights and products (dynamic quantisation)",
    "openvino": "OpenVINO graph, float16 weights",
    "openvino-int8": "OpenVINO graph, int8 weights",
    "int8": "1 byte a number, scored against float32 questions",
    "binary": "1 bit a number: Hamming distance finds 4 times as many, float32 questions rescore them",
}


class FormResult(BaseModel):
    """One form, measured on the same texts as the original."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["model", "embeddings"]
    what: str
    published: bool
    reason: str | None = None  # why it was not
    value: float | None = None  # of the report's metric
    difference: float | None = None  # to the original on the same questions; below 0 is a loss
    interval_low: float | None = None
    interval_high: float | None = None
    min_cosine: float | None = None  # the farthest that any embedding lies from the original's
    bytes_on_disk: int | None = None  # of a model
    bytes_per_vector: int | None = None
    texts_per_second: float | None = None  # of the same passages, on this machine's CPU


class RerankerResult(BaseModel):
    """The reranker in ONNX: how far its scores lie from the original's, on the texts that the evaluation kept."""

    model_config = ConfigDict(frozen=True)

    published: bool
    reason: str | None = None
    largest_difference: float | None = None
    bytes_on_disk: int | None = None


class ExportReport(BaseModel):
    """What `exports.json` holds. The original is the first of the forms."""

    model_config = ConfigDict(frozen=True)

    versions: dict[str, str]  # asset -> version that was exported, and what it was measured on
    metric: str
    items: int  # questions, or pairs, that it was measured on
    passages: int | None
    confidence: float
    max_loss: float
    precision: str  # arithmetic of the original
    forms: list[FormResult]
    reranker: RerankerResult | None
    libraries: dict[str, str]

    @property
    def metrics(self) -> dict[str, float]:
        """For a tracking server: `onnx/ndcg_at_10`, `onnx/texts_per_second`, ..."""
        told = ("difference", "min_cosine", "bytes_on_disk", "bytes_per_vector", "texts_per_second")
        found = {f"{form.name}/{key}": getattr(form, key) for form in self.forms for key in told}
        found |= {f"{form.name}/{self.metric}": form.value for form in self.forms}
        return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}

    @property
    def published(self) -> list[FormResult]:
        return [form for form in self.forms if form.published and form.name != ORIGINAL]


def check_packages(settings: ExportSettings) -> None:
    """Raises ConfigurationError naming what has to be installed for the formats that are wanted."""
    missing = [name for name in _packages(settings) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"exports.formats: {', '.join(settings.formats)} need {', '.join(missing)}, which this environment does "
            "not have. Install them: pip install --constraint constraints.txt --editable '.[export]'"
        )


def library_versions(settings: ExportSettings) -> dict[str, str]:
    """Of the packages that make and run the wanted formats."""
    return {name: importlib.metadata.version(name) for name in _packages(settings)}


def _packages(settings: ExportSettings) -> list[str]:
    return list(dict.fromkeys(package for form in settings.formats for package in PACKAGES[form]))


def why_not(name: str, difference: float, min_cosine: float, max_loss: float, metric: str) -> str | None:
    """Why a form that was measured must not be published; None where it may be."""
    if not math.isfinite(difference + min_cosine):
        return "an embedding or a figure is not a number"
    if difference < -max_loss - TOLERANCE:
        return f"loses {-difference:.4f} {metric}, more than the {max_loss:g} that exports.max_loss allows"
    least = LEAST_COSINE.get(name)
    if least is not None and min_cosine < least:
        return f"is another model: cosine to the original down to {min_cosine:.4f}, at least {least} is expected"
    return None


def table(report: ExportReport) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table that tells every form's cost and gain."""
    header = [
        *("form", "what it is", metric_name(report.metric), "difference", f"{report.confidence:.0%} interval"),
        *("least cosine", "size", "bytes a vector", "texts/s", "speed-up", "published"),
    ]
    original = report.forms[0].texts_per_second
    return header, [_row(form, original) for form in report.forms]


def markdown(report: ExportReport) -> str:
    """The table with what it was measured on, and why a form is missing."""
    header, rows = table(report)
    over = f" over {report.passages:,} passages" if report.passages else ""
    what = "questions" if report.passages else "pairs"
    told = [
        markdown_table(header, rows),
        "",
        f"Measured on {report.items:,} {what} of the test split{over}; the original computes in {report.precision}. "
        "Differences are to the original on the same texts; speeds are of the same passages on this machine's CPU.",
        *(f"- {code(form.name)} is not published: it {escaped(form.reason)}." for form in report.forms if form.reason),
    ]
    if report.reranker is not None:
        told.append(_reranker_line(report.reranker))
    return "\n".join(told) + "\n"


def _reranker_line(found: RerankerResult) -> str:
    if not found.published:
        return f"- `{RERANKER_FORM}` is not published: it {escaped(found.reason)}."
    return f"- `{RERANKER_FORM}`: scores differ by {found.largest_difference:.1e} at most, {size(found.bytes_on_disk)}."


def _row(form: FormResult, original: float | None) -> list[str]:
    speed = form.texts_per_second if form.name != ORIGINAL else None
    interval = "" if form.interval_low is None else f"{form.interval_low:+.4f} to {form.interval_high:+.4f}"
    return [
        form.name,
        form.what,
        _number(form.value, ".4f"),
        "" if form.name == ORIGINAL else _number(form.difference, "+.4f"),
        interval,
        "" if form.name == ORIGINAL else _number(form.min_cosine, ".4f"),
        "" if form.bytes_on_disk is None else size(form.bytes_on_disk),
        "" if form.bytes_per_vector is None else f"{form.bytes_per_vector:,}",
        _number(form.texts_per_second, ",.0f"),
        f"{speed / original:.1f} times" if speed and original else "",
        "" if form.name == ORIGINAL else ("yes" if form.published else "no"),
    ]


def _number(value: float | None, told: str) -> str:
    return "" if value is None else format(value, told)


def size(count: float | None) -> str:
    """12.3 MB"""
    count = float(count or 0)
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit == "MB" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def form_names(settings: ExportSettings) -> Sequence[str]:
    """In the order in which they are made and shown."""
    return [*settings.formats, *settings.embeddings, *(f"dimensions-{size}" for size in settings.dimensions)]
