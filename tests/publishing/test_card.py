"""The cards: front matter as the Hub takes it, figures as evaluated, and lines that load the model as it is."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from embed_pipeline.model_files import MODEL_FOLDER
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.publishing.card import Carded, Kind, model_card
from embed_pipeline.stages import Pipeline, write_champion_cards
from embed_pipeline.tables import PASSAGES as PASSAGES_TABLE
from embed_pipeline.tables import PASSAGES_FILE, QUERIES_FILE, write
from embed_pipeline.tables import QUERIES as QUERIES_TABLE

QUERIES = ["where is the river of the castle", "the stone"]
PASSAGES = ["the river lies behind the gate", "the engine lies next to the well, " * 6, "a window"]
PACKAGES = {
    "sentence-transformers": "sentence_transformers",
    "FlagEmbedding": "FlagEmbedding",
    "LangChain": "langchain_huggingface",
    "LlamaIndex": "llama_index.embeddings.huggingface",
}


def folder_of(carded: Carded, kind: Kind) -> Path:
    model = carded.model(kind)
    assert model is not None
    return model.path / MODEL_FOLDER


def run_snippet(card: str, library: str, **given: Any) -> dict[str, Any]:
    """What the variables of a card's snippet are after it ran; skips where its library is not installed."""
    package = PACKAGES[library]
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{library} is not installed: pip install -e '.[integrations]'")
    code = re.search(rf"### {library}\n\n```python\n(.*?)```", card, re.S)
    assert code is not None, f"the card says nothing of {library}"
    found: dict[str, Any] = dict(given)
    exec(code[1], found)
    return found


@pytest.mark.parametrize("library", PACKAGES)
def test_the_embedders_lines_give_its_embeddings(carded: Carded, library: str) -> None:
    folder = folder_of(carded, "embedder")
    found = run_snippet(
        model_card(carded, "embedder", repository=str(folder)), library, queries=QUERIES, passages=PASSAGES
    )
    ours = Embedder(folder, precision="float32", device="cpu")
    expected = {"query": ours.encode_queries(QUERIES), "passage": ours.encode_passages(PASSAGES)}
    for what, embeddings in expected.items():
        cosines = (np.asarray(found[f"{what}_embeddings"]) * embeddings).sum(axis=1)
        assert cosines.min() > 0.9999, f"{library}, {what}"


@pytest.mark.parametrize("library", PACKAGES)
def test_the_rerankers_lines_give_its_order(carded: Carded, library: str) -> None:
    folder = folder_of(carded, "reranker")
    card = model_card(carded, "reranker", repository=str(folder))
    found = run_snippet(card, library, query=QUERIES[0], passages=PASSAGES)
    ours = Reranker(folder, precision="float32", device="cpu").score([(QUERIES[0], text) for text in PASSAGES])
    if "documents" in found:
        scores = {document.page_content: document.metadata["score"] for document in found["documents"]}
    elif "nodes" in found:
        scores = {node.node.get_content(): node.score for node in found["nodes"]}
    else:
        scores = dict(zip(PASSAGES, found["scores"], strict=True))
    np.testing.assert_allclose([scores[text] for text in PASSAGES], ours, atol=1e-4)


def test_the_front_matter_is_what_the_hub_takes(carded: Carded) -> None:
    card = ModelCard(model_card(carded, "embedder"))
    told = card.data.to_dict()
    assert told["license"] == "apache-2.0"
    assert told["pipeline_tag"] == "sentence-similarity"
    assert told["library_name"] == "sentence-transformers"
    assert told["datasets"] == ["your-company/castle"]
    assert told["widget"][0]["source_sentence"].startswith("where is the river")
    assert len(told["widget"][0]["sentences"]) == 2
    result, of_source = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("ndcg_at_10", 0.5, "test")
    assert (of_source.dataset_type, of_source.metric_type, of_source.metric_value) == ("sts", "spearman", 0.375)
    assert ModelCard(model_card(carded, "reranker")).data.pipeline_tag == "text-ranking"


def test_the_card_tells_figures_data_and_training(carded: Carded) -> None:
    card = model_card(carded, "embedder")
    assert "| nDCG@10 | 0.2500 | 0.5000 | +0.2500 | +0.1000 to +0.3000 | 8 |" in card
    assert carded.champion.verdict in card
    assert "| support | pairs | 0 | 0 | 8 | 8 | cc-by-4.0 |" in card
    assert carded.cleaned.content in card
    assert "| prompt, put before the text | `search: ` | `text: ` |" in card
    assert "| longest text in tokens | 12 | 24 |" in card
    training = re.search(r"### Training arguments\n\n```yaml\n(.*?)```", card, re.S)
    assert training is not None
    assert yaml.safe_load(training[1])["learning_rate"] == 2e-5
    assert "loss: MultipleNegativesRankingLoss\n" in card
    reranker = model_card(carded, "reranker")
    assert "`embedder_weight` (0.4) is the share" in reranker
    assert "| sts/spearman | 0.2500 | 0.3750 | +0.1250 | +0.0500 to +0.1500 |" in card
    assert "| sts/spearman | 0.2500 | 0.5000 | +0.1250 |" in reranker


def test_the_blend_of_the_card_is_the_pipelines(carded: Carded) -> None:
    from embed_pipeline.models.blend import blend

    code = re.search(r"```python\n(import numpy as np\n\ndef standardised.*?)```", model_card(carded, "reranker"), re.S)
    assert code is not None
    found: dict[str, Any] = {"embedder_scores": [0.9, 0.2, 0.4], "reranker_scores": [-3.0, 2.0, 1.0]}
    exec(code[1], found)
    expected = blend(np.array([0.9, 0.2, 0.4]), np.array([-3.0, 2.0, 1.0]), 0.4)
    np.testing.assert_allclose(found["final"], expected)


def test_the_cards_lie_beside_the_promotion_and_versions_stay_as_published(in_force: Pipeline, carded: Carded) -> None:
    written = write_champion_cards(in_force)
    assert {path.name for path in (in_force.store.folder / "champion").iterdir()} >= {"embedder.md", "reranker.md"}
    assert written["embedder"].read_text() == model_card(carded, "embedder")
    for kind in carded.kinds:
        model = carded.model(kind)
        assert model is not None
        model.verify()


def test_texts_of_the_data_show_themselves_and_nothing_else(carded: Carded) -> None:
    hostile = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) | `b` *c*\n# d"
    for name, schema, column in ((QUERIES_FILE, QUERIES_TABLE, "query"), (PASSAGES_FILE, PASSAGES_TABLE, "text")):
        table = pq.read_table(carded.cleaned.path / name)
        index = table.column_names.index(column)
        texts = pa.array([f"{hostile} {i}" for i in range(table.num_rows)])
        write(table.set_column(index, column, texts), schema, carded.cleaned.path / name)
    card = model_card(carded, "embedder")
    body = card.partition("\n---\n")[2]
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert not re.search(r"<(script|img|a|em)\b", page)
    (examples,) = re.findall(r"<h2>Examples</h2>.*?<tbody>(.*?)</tbody>", page, re.S)
    cells = re.findall(r"<td>(.*?)</td>", examples)
    assert html.unescape(cells[0]).startswith(" ".join(hostile.split()))
    front = yaml.safe_load(card.partition("---\n")[2].partition("\n---\n")[0])
    assert front["widget"][0]["source_sentence"].startswith("<script>")  # data, as the Hub takes it
