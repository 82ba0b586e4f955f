"""Other forms of a tiny embedder: what they compute, what they cost, and what is not published."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_pipeline.errors import ConfigurationError, ModelError
from embed_pipeline.evaluation.parity import Parity
from embed_pipeline.exporting.export import ExportedModels, export
from embed_pipeline.exporting.forms import ExportReport, check_packages
from embed_pipeline.exporting.measure import load_test_split
from embed_pipeline.exporting.runtime import ExportedEmbedder, ExportedReranker
from embed_pipeline.exporting.vectors import BinaryVectors, CutVectors, Int8Vectors
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EvaluationSettings, ExportSettings
from embed_pipeline.tables import EXAMPLES, EXAMPLES_FILE, QUERIES, QUERIES_FILE, write
from tests.cleaned_folder import unit_rows, write_cleaned

NEEDED = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
needs_export = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs pip install -e '.[export]'"
)
THINGS = [f"{colour} {thing}" for colour in ("red", "green", "grey") for thing in ("river", "stone", "engine", "door")]
QUERIES_ASKED = [f"where is the {thing}" for thing in THINGS]
PASSAGES = [f"the {thing} lies behind the gate, next to the well" for thing in THINGS]
ALL_FORMS = ExportSettings(
    formats=("onnx", "onnx-int8", "openvino", "openvino-int8"),
    embeddings=("int8", "binary"),
    dimensions=(16, 2),
    max_loss=0.05,
)
FEW = EvaluationSettings(bootstrap_samples=200)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions over their answers; every third is of train."""
    folder = write_cleaned(
        tmp_path_factory.mktemp("cleaned"),
        [(f"q{i}", text) for i, text in enumerate(QUERIES_ASKED)],
        [(f"p{i}", text) for i, text in enumerate(PASSAGES)],
        [(f"q{i}", f"p{i}", 1.0) for i in range(len(THINGS))],
    )
    rows = pq.read_table(folder / QUERIES_FILE).to_pylist()
    split = [{**row, "split": "train" if i % 3 == 0 else "test"} for i, row in enumerate(rows)]
    write(pa.Table.from_pylist(split, schema=QUERIES), QUERIES, folder / QUERIES_FILE)
    return folder


@pytest.fixture(scope="module")
def exported(
    cleaned: Path, base_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    embedder, reranker = base_models
    out = tmp_path_factory.mktemp("exports")
    queries, passages = QUERIES_ASKED[:3], [PASSAGES[0], PASSAGES[5], PASSAGES[1] * 4]
    scores = Reranker(reranker, precision="float32", device="cpu").score(list(zip(queries, passages, strict=True)))
    parity = Parity(
        queries=queries, passages=passages, query_embeddings=[], passage_embeddings=[], scores=scores.tolist()
    )
    test = load_test_split(cleaned, ALL_FORMS, 1, scored=False)
    models = ExportedModels(embedder, reranker)
    return out, export(models, test, ALL_FORMS, FEW, 1, out, parity=parity, precision="float32")


@needs_export
def test_graphs_compute_the_embeddings(exported: tuple[Path, ExportReport], base_models: tuple[Path, Path]) -> None:
    out, report = exported
    ours = Embedder(base_models[0], precision="float32", device="cpu")
    texts = [*PASSAGES, "a longer passage, beyond the maximum length of the model " * 5]
    expected = (ours.encode_queries(texts), ours.encode_passages(texts))
    assert not np.allclose(*expected), "prompts and lengths differ, so mixing them up would show"
    for name, least in {"onnx": 0.9999, "openvino": 0.999, "openvino-int8": 0.98}.items():
        form = ExportedEmbedder(out / name, batch_size=5)
        for found, wanted in zip((form.encode_queries(texts), form.encode_passages(texts)), expected, strict=True):
            assert (found * wanted).sum(axis=1).min() > least, name
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-3)
    by_name = {form.name: form for form in report.forms}
    assert by_name["onnx"].difference == pytest.approx(0.0, abs=1e-9)
    assert by_name["onnx"].min_cosine > 0.9999
    assert by_name["openvino-int8"].bytes_on_disk < by_name["onnx"].bytes_on_disk
    assert all(by_name[name].texts_per_second > 0 for name in ALL_FORMS.formats)


@needs_export
def test_int8_is_really_int8_and_near_the_model(cleaned: Path, base_models: tuple[Path, Path], tmp_path: Path) -> None:
    import onnx

    wanted = ExportSettings(formats=("onnx", "onnx-int8"), max_loss=1.0)
    test = load_test_split(cleaned, wanted, 1, scored=False)
    report = export(ExportedModels(base_models[0]), test, wanted, FEW, 1, tmp_path, precision="float32")
    assert {form.name for form in report.published} == {"onnx", "onnx-int8"}, report
    sizes, weights, operators = {}, {}, {}
    for name in wanted.formats:
        form = ExportedEmbedder(tmp_path / name, batch_size=5)
        path = tmp_path / name / form.form.file
        graph = onnx.load(str(path)).graph
        sizes[name], operators[name] = path.stat().st_size, {node.op_type for node in graph.node}
        counts: dict[str, int] = {}
        for tensor in graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            counts[kind] = counts.get(kind, 0) + math.prod(tensor.dims)
        weights[name] = counts
    assert weights["onnx"].get("INT8", 0) + weights["onnx"].get("UINT8", 0) == 0
    quantized = weights["onnx-int8"].get("INT8", 0) + weights["onnx-int8"].get("UINT8", 0)
    assert quantized > 0.9 * sum(weights["onnx-int8"].values())
    assert sizes["onnx-int8"] < 0.4 * sizes["onnx"]
    assert operators["onnx-int8"] & {"MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear"}
    ours, int8 = Embedder(base_models[0], precision="float32", device="cpu"), ExportedEmbedder(tmp_path / "onnx-int8")
    for found, expected in (
        (int8.encode_queries(QUERIES_ASKED), ours.encode_queries(QUERIES_ASKED)),
        (int8.encode_passages(PASSAGES), ours.encode_passages(PASSAGES)),
    ):
        cosines = (found * expected).sum(axis=1)
        assert cosines.min() > 0.98
        assert np.abs(found - expected).max() > 1e-6  # near, and not the same numbers


@needs_export
def test_one_table_tells_every_form_and_only_the_published_leave_files(exported: tuple[Path, ExportReport]) -> None:
    out, report = exported
    assert [form.name for form in report.forms] == [
        *("original", "onnx", "onnx-int8", "openvino", "openvino-int8"),
        *("int8", "binary", "dimensions-16", "dimensions-2"),
    ]
    lost = {form.name for form in report.forms if not form.published}
    assert 0 < len(lost) < len(report.forms) - 1, "the limit lies between the forms"
    for form in report.forms:
        assert form.value is not None
        if form.name == "original":
            continue
        assert (out / form.name).is_dir() == form.published
        assert form.published == (form.reason is None)
        assert form.published == (form.difference >= -ALL_FORMS.max_loss)
        assert form.interval_low <= form.difference <= form.interval_high
    assert {form.name: form.bytes_per_vector for form in report.forms if form.kind == "embeddings"} == {
        "int8": 32,
        "binary": 4,
        "dimensions-16": 64,
        "dimensions-2": 8,
    }
    kept = {path.name for path in out.iterdir()}
    assert kept == {"exports.json", "exports.md", "reranker-onnx", *(form.name for form in report.published)}
    assert ExportReport.model_validate_json((out / "exports.json").read_text()) == report
    table = (out / "exports.md").read_text()
    assert all(f"`{name}` is not published: it loses" in table for name in lost)
    assert "Measured on 8 questions of the test split over 12 passages" in table


@needs_export
@pytest.mark.parametrize("name", ["onnx", "openvino", "int8", "reranker-onnx"])
def test_the_lines_of_each_readme_work(
    exported: tuple[Path, ExportReport],
    base_models: tuple[Path, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = exported[0] / name
    ours = Embedder(base_models[0], precision="float32", device="cpu")
    queries, passages = ours.encode_queries(QUERIES_ASKED), ours.encode_passages(PASSAGES)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code is not None
    found: dict[str, Any] = {"queries": QUERIES_ASKED, "passages": PASSAGES, "query": QUERIES_ASKED[0]}
    if name == "int8":
        found |= {"query_embeddings": queries, "passage_embeddings": passages}
    monkeypatch.chdir(folder)
    exec(code[1], found)
    if name == "reranker-onnx":
        pairs = [(QUERIES_ASKED[0], text) for text in PASSAGES]
        expected = Reranker(base_models[1], precision="float32", device="cpu").score(pairs)
        np.testing.assert_allclose(found["scores"], expected, atol=1e-4)
        np.testing.assert_allclose(ExportedReranker(folder).score(pairs), expected, atol=1e-4)
    else:
        np.testing.assert_allclose(found["scores"], queries @ passages.T, atol=0.03 if name == "int8" else 0.01)


def test_int8_is_calibrated_on_train_passages(cleaned: Path, base_models: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = ExportSettings(embeddings=("int8",), max_loss=1.0)
    test = load_test_split(cleaned, wanted, 1, scored=False)
    export(ExportedModels(base_models[0]), test, wanted, FEW, 1, tmp_path, precision="float32")
    trained = Embedder(base_models[0], precision="float32").encode_passages([PASSAGES[i] for i in range(0, 12, 3)])
    kept = Int8Vectors.load(tmp_path / "int8")
    np.testing.assert_allclose(kept.ranges, [trained.min(axis=0), trained.max(axis=0)], atol=1e-6)
    assert kept.store(trained).dtype == np.int8
    steps = (kept.ranges[1] - kept.ranges[0]) / 255
    assert (np.abs(kept.restore(kept.store(trained)) - trained) <= steps * 0.51 + 1e-6).all()


def test_binary_and_cut_search_find_what_the_float_search_finds() -> None:
    draw = np.random.default_rng(0)
    passages = unit_rows(draw.normal(size=(300, 64)))
    queries = unit_rows(passages[:20] + draw.normal(scale=0.05, size=(20, 64)))
    binary, cut = BinaryVectors(64), CutVectors(48)
    assert binary.store(passages).shape == (300, 8)
    for form in (binary, cut):
        indices, scores = form.search(queries, form.store(passages), 5)
        assert indices.shape == scores.shape == (20, 5)
        np.testing.assert_array_equal(indices[:, 0], np.arange(20))
        assert (np.diff(scores, axis=1) <= 1e-6).all()
    np.testing.assert_allclose(np.linalg.norm(cut.store(passages), axis=1), 1.0, atol=1e-6)


def test_scored_pairs_are_measured_by_spearman(base_models: tuple[Path, Path], tmp_path: Path) -> None:
    cleaned = tmp_path / "cleaned"
    cleaned.mkdir()
    rows = [
        {"example_id": f"e{i}", "sentence1": f"a {THINGS[i]}", "sentence2": f"the {THINGS[i // 2]}", "score": i / 12}
        | {"label": None, "split": "train" if i % 3 == 0 else "test", "group_id": f"g{i}"}
        for i in range(12)
    ]
    write(pa.Table.from_pylist(rows, schema=EXAMPLES), EXAMPLES, cleaned / EXAMPLES_FILE)
    wanted = ExportSettings(embeddings=("int8", "binary"), dimensions=(16,), max_loss=1.0)
    out = tmp_path / "out"
    out.mkdir()
    test = load_test_split(cleaned, wanted, 1, scored=True)
    report = export(ExportedModels(base_models[0]), test, wanted, FEW, 1, out, precision="float32")
    assert (report.metric, report.items, report.passages) == ("spearman", 8, None)
    int8 = report.forms[1]
    assert abs(int8.difference) < 0.2
    assert all(form.published for form in report.forms)


def test_a_form_that_cannot_be_made_is_told_and_the_others_stay(
    cleaned: Path, base_models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without train questions there is nothing to calibrate int8 on."""
    for name in ("passages.parquet", "qrels.parquet", "withheld.parquet"):
        (tmp_path / name).write_bytes((cleaned / name).read_bytes())
    rows = [{**row, "split": "test"} for row in pq.read_table(cleaned / QUERIES_FILE).to_pylist()]
    write(pa.Table.from_pylist(rows, schema=QUERIES), QUERIES, tmp_path / QUERIES_FILE)
    wanted = ExportSettings(embeddings=("int8", "binary"), max_loss=1.0)
    out = tmp_path / "out"
    out.mkdir()
    test = load_test_split(tmp_path, wanted, 1, scored=False)
    report = export(ExportedModels(base_models[0]), test, wanted, FEW, 1, out, precision="float32")
    assert [(form.name, form.published) for form in report.forms[1:]] == [("int8", False), ("binary", True)]
    assert "has 0 train passages" in str(report.forms[1].reason)
    assert json.loads((out / "exports.json").read_text())["forms"][1]["value"] is None


def test_what_cannot_be_is_refused_before_any_work(
    cleaned: Path, base_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ExportSettings(dimensions=(64,))
    test = load_test_split(cleaned, wanted, 1, scored=False)
    with pytest.raises(ModelError, match=r"exports\.dimensions: 64 is not below the 32"):
        export(ExportedModels(base_models[0]), test, wanted, FEW, 1, tmp_path, precision="float32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "nncf" else True)
    check_packages(ExportSettings(formats=("openvino",)))
    with pytest.raises(ConfigurationError, match=r"need nncf.*pip install .*\[export\]"):
        check_packages(ExportSettings(formats=("openvino-int8",)))
