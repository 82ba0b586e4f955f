"""Each engine and model kind under real torchrun with two gloo processes."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from small_problem import Trained

from embed_pipeline.models.embedder import Embedder
from embed_pipeline.training.dev_set import EmbedderDevSet
from embed_pipeline.training.job import EmbedderJob

INSTRUCTION = "find the passage: "
ENCODING = {"query_prompt": INSTRUCTION, "pooling": "cls", "query_max_length": 12, "passage_max_length": 20}
LONG = "where is the old river and the new engine and the blue garden and the deep violin and the loud harbor"
QUERIES = ["where is the river that is old", LONG]
PASSAGES = ["the old river stands number 1", f"{LONG} {LONG}", "nothing much about item 3"]


@pytest.fixture(scope="module", params=["sentence-transformers", "flag-embedding"])
def embedder(request: pytest.FixtureRequest, train: Callable[..., Trained]) -> Trained:
    return train("embedder", world_size=2, engine=request.param, encoding=ENCODING, sub_batch_size=2)


@pytest.fixture(
    scope="module",
    params=[{"engine": "sentence-transformers", "loss": "LambdaLoss"}, {"engine": "flag-embedding"}],
    ids=["sentence-transformers", "flag-embedding"],
)
def reranker(request: pytest.FixtureRequest, train: Callable[..., Trained]) -> Trained:
    return train("reranker", world_size=2, **request.param, query_max_length=12, passage_max_length=20)


def test_an_embedder_is_trained_by_both_ranks_together(embedder: Trained) -> None:
    # The trainer itself fails unless both ranks end with the same weights (check_same_weights).
    assert embedder.summary["world_size"] == 2
    rows = 49 if embedder.summary["engine"] == "sentence-transformers" else 48  # pairs, or queries
    assert (embedder.summary["rows"], embedder.summary["steps"]) == ({"shop": rows}, 12)
    assert embedder.summary["threads"] == 1
    assert [len(list((embedder.output.parent / "logs").rglob(f"{rank}/stderr.log"))) for rank in (0, 1)] == [1, 1]


def test_two_ranks_are_one_run_in_mlflow(embedder: Trained) -> None:
    told = [(entry["step"], {**entry["metrics"]}) for entry in embedder.told_mlflow]
    log = [{name: value for name, value in row.items() if name != "seconds"} for row in embedder.log]
    assert told == [(row.pop("step"), row) for row in log]  # each figure once, by one rank


def test_an_embedder_loads_in_both_libraries_with_the_same_embeddings(embedder: Trained) -> None:
    from FlagEmbedding import FlagModel
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedder.model), device="cpu")
    flag = FlagModel(
        str(embedder.model), query_instruction_for_retrieval=INSTRUCTION, pooling_method="cls", use_fp16=False,
        query_max_length=12, passage_max_length=20, devices="cpu",
    )  # fmt: skip
    assert np.abs(model.encode_query(QUERIES) - flag.encode_queries(QUERIES)).max() < 1e-4
    assert np.abs(model.encode_document(PASSAGES) - flag.encode_corpus(PASSAGES)).max() < 1e-4


def test_an_embedder_is_saved_with_what_it_was_trained_with(embedder: Trained) -> None:
    encoding = Embedder(embedder.model).encoding
    assert encoding.model_dump() == {**ENCODING, "passage_prompt": "", "normalize": True}
    card = (embedder.model / "README.md").read_text()
    assert "SentenceTransformer(" in card
    assert "FlagModel(" in card
    assert INSTRUCTION in card


def test_the_log_holds_losses_and_the_dev_metric_from_before_the_first_step(embedder: Trained) -> None:
    dev = {row["step"]: row["dev_ndcg_at_10"] for row in embedder.log if "dev_ndcg_at_10" in row}
    assert list(dev) == [0, 6, 12]
    assert dev[0] == embedder.summary["dev_before"]
    assert embedder.summary["dev_kept"] == dev[embedder.summary["kept_step"]]
    steps = [row for row in embedder.log if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 4, 6, 8, 10, 12]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "seconds"} <= steps[0].keys()
    assert not any("@" in name for row in embedder.log for name in row)


def test_both_ranks_measure_on_dev_what_one_would(embedder: Trained) -> None:
    assert isinstance(embedder.job, EmbedderJob)
    dev = EmbedderDevSet.read(embedder.job)
    assert dev is not None
    assert dev.ndcg_at_10(Embedder(embedder.model, precision="float32")).value == pytest.approx(
        embedder.summary["dev_kept"]
    )


def test_a_reranker_loads_in_both_libraries_with_the_same_scores(reranker: Trained) -> None:
    from FlagEmbedding import FlagReranker
    from sentence_transformers import CrossEncoder

    pairs = [(QUERIES[0], passage) for passage in PASSAGES]
    model = CrossEncoder(str(reranker.model), device="cpu")
    assert model.max_seq_length == 32
    flag = FlagReranker(str(reranker.model), use_fp16=False, max_length=32, devices="cpu")
    assert np.abs(model.predict(pairs) - np.asarray(flag.compute_score(pairs))).max() < 1e-4


def test_a_reranker_leaves_its_share_in_the_final_score(reranker: Trained) -> None:
    serving = json.loads((reranker.output / "serving.json").read_text())
    by_weight = {float(weight): value for weight, value in serving["dev_ndcg_at_10_by_weight"].items()}
    assert list(by_weight) == [round(0.1 * i, 1) for i in range(11)]
    best = max(by_weight.values())
    assert serving["embedder_weight"] == min(weight for weight, value in by_weight.items() if value == best)
    # The first was scored by rank 0 alone, the second by both.
    assert by_weight[0.0] == pytest.approx(reranker.summary["dev_kept"])


def test_only_what_is_needed_is_left_of_an_embedder(embedder: Trained) -> None:
    assert {path.name for path in embedder.output.iterdir()} == {"model", "training_log.jsonl", "summary.json"}


def test_only_what_is_needed_is_left_of_a_reranker(reranker: Trained) -> None:
    expected = {"model", "training_log.jsonl", "summary.json", "serving.json"}
    assert {path.name for path in reranker.output.iterdir()} == expected
