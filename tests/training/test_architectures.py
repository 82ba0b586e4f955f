"""Base models of every common architecture, as the Hub has them: they train, are saved, load everywhere and score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from small_architectures import ARCHITECTURES, write_base_model
from small_problem import Trained

from embed_pipeline.errors import ModelError, TrainingError
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.settings import EncodingSettings

ENGINES = ["sentence-transformers", "flag-embedding"]
# The others are slow: decoders without a padding token, and one encoder, show most of what can go wrong.
FAST = {("Mistral", "sentence-transformers"), ("Qwen3", "flag-embedding"), ("RoBERTa", "flag-embedding")}
CASES = [
    pytest.param(name, engine, marks=[] if (name, engine) in FAST else pytest.mark.slow, id=f"{name}-{engine}")
    for name in ARCHITECTURES
    for engine in ENGINES
]
# Of different lengths, so that batches are padded.
QUERIES = ["where is the river that is old", "violin", "where is the garden that is deep and the market that is loud"]
PASSAGES = ["the old river stands number 3", "nothing much about item 7", "the deep garden stands number 1 " * 3]


@pytest.fixture(scope="module")
def base_model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_base_model(tmp_path_factory.mktemp(name), ARCHITECTURES[name])
        return made[name]

    return folder


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_an_embedder_of_every_architecture(
    train_here: Callable[..., Trained], base_model_of: Callable[[str], Path], name: str, engine: str
) -> None:
    folder = base_model_of(name)
    trained = train_here(
        "embedder", lambda job: job.model_copy(update={"base_model": folder}), engine=engine, max_steps=2, evaluations=1
    )
    assert trained.summary["steps"] == 2
    check_padding(trained.model, name)
    model = Embedder(trained.model, precision="float32", device="cpu")
    embeddings = model.encode_passages(PASSAGES)
    assert np.isfinite(embeddings).all()
    alone = np.concatenate([model.encode_passages([text]) for text in PASSAGES])
    np.testing.assert_allclose(embeddings, alone, atol=1e-5)  # padding has no part in it
    anybody = SentenceTransformer(str(trained.model), device="cpu").encode_document(PASSAGES)
    np.testing.assert_allclose(embeddings, anybody, atol=1e-5)
    before = Embedder(folder, EncodingSettings(), precision="float32", device="cpu").encode_passages(PASSAGES)
    assert np.abs(before - embeddings).max() > 1e-4


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_reranker_of_every_architecture(
    train_here: Callable[..., Trained], base_model_of: Callable[[str], Path], name: str, engine: str
) -> None:
    folder = base_model_of(name)
    trained = train_here(
        "reranker",
        lambda job: job.model_copy(update={"base_model": folder}),
        **{"engine": engine, "max_steps": 2, "evaluations": 1},
        **{"query_max_length": 32, "passage_max_length": 64},
    )
    assert trained.summary["steps"] == 2
    check_padding(trained.model, name)
    pairs = list(zip(QUERIES, PASSAGES, strict=True))
    model = Reranker(trained.model, precision="float32", device="cpu")
    scores = model.score(pairs)
    assert len(set(scores.tolist())) == len(pairs)
    alone = np.concatenate([model.score([pair]) for pair in pairs])
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    anybody = CrossEncoder(str(trained.model), device="cpu").predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(scores, anybody, atol=1e-5)


def check_padding(model: Path, name: str) -> None:
    """Tokenizer and config name the same token: the family's own, or else the end-of-sequence token."""
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    ids = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    specials = ARCHITECTURES[name].specials
    assert tokenizer["pad_token"] == specials.get("pad_token", specials.get("eos_token"))
    assert json.loads((model / "config.json").read_text())["pad_token_id"] == ids[tokenizer["pad_token"]]


@pytest.mark.parametrize("name", ["Mistral", pytest.param("Qwen3", marks=pytest.mark.slow)])
def test_flag_embedding_loads_what_was_trained(
    train_here: Callable[..., Trained], base_model_of: Callable[[str], Path], name: str
) -> None:
    from FlagEmbedding import FlagReranker

    folder = base_model_of(name)
    trained = train_here(
        "reranker",
        lambda job: job.model_copy(update={"base_model": folder}),
        **{"engine": "flag-embedding", "max_steps": 1, "query_max_length": 32, "passage_max_length": 64},
    )
    pairs = list(zip(QUERIES, PASSAGES, strict=True))
    flag = FlagReranker(str(trained.model), max_length=96, use_fp16=False, devices="cpu").compute_score(pairs)
    np.testing.assert_allclose(flag, Reranker(trained.model, precision="float32").score(pairs), atol=1e-5)


def test_flag_embedding_refuses_a_decoder_that_scores_by_words(
    train_here: Callable[..., Trained], base_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    words = Transformer(str(base_model_of("Mistral")), transformer_task="text-generation")
    words.tokenizer.pad_token = "</s>"
    CrossEncoder(modules=[words, LogitScore(5, 6)], device="cpu").save_pretrained(str(tmp_path / "model"))
    with pytest.raises(TrainingError, match=r"scores by the logits of words.*Set engine: sentence-transformers"):
        train_here(
            "reranker",
            lambda job: job.model_copy(update={"base_model": tmp_path / "model"}),
            **{"engine": "flag-embedding", "max_steps": 1, "query_max_length": 32, "passage_max_length": 64},
        )


def test_a_padding_token_without_an_embedding_gives_way_to_the_end_of_sequence(
    base_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As many fine-tuned decoders have it: [PAD] was added to the tokenizer, and the model was never resized."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(base_model_of("Mistral"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model = Embedder(folder, precision="float32", device="cpu")
    assert model.model.tokenizer.pad_token == "</s>"
    alone = np.concatenate([model.encode_passages([text]) for text in PASSAGES])
    np.testing.assert_allclose(model.encode_passages(PASSAGES), alone, atol=1e-5)


def test_a_model_without_any_token_to_pad_with_is_refused(base_model_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_model_of("Mistral"), folder)
    for file, keys in {"config.json": ["eos_token_id"], "tokenizer_config.json": ["eos_token"]}.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **dict.fromkeys(keys)}))
    with pytest.raises(ModelError, match=r"neither a padding token nor an end-of-sequence token.*Name one .* `pad_tok"):
        Reranker(folder, device="cpu", seed=1)
