"""What is read off a model folder, and what becomes of lengths that do not fit it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from embed_pipeline.errors import ModelError
from embed_pipeline.models.folder import pair_length, usable_length
from embed_pipeline.settings import EncodingSettings, RerankerSettings


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, {}, 512),
        # The tokenizer's number only says how its model was saved last.
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 64}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "t5"}, {"model_max_length": 512}, 512),
        ({"model_type": "t5"}, {"model_max_length": 1e30}, None),
        ({"model_type": "t5"}, {}, None),
    ],
)
def test_usable_length(config: dict[str, Any], tokenizer: dict[str, Any], expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert usable_length(tmp_path) == expected


def test_the_usable_length_of_a_roberta_is_what_it_can_really_take(tmp_path: Path) -> None:
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=18,
    )  # fmt: skip
    model = XLMRobertaModel(config).eval()
    model.save_pretrained(tmp_path)
    longest = usable_length(tmp_path)
    assert longest == 16
    assert model(torch.full((1, longest), 5)).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_lengths_that_were_asked_for_are_refused_and_defaults_are_cut(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 128}')
    default = RerankerSettings(base_model="embedder")
    assert pair_length(tmp_path, default) == 128
    fitting = RerankerSettings.model_validate({"base_model": "embedder", "query_max_len": 32, "passage_max_len": 64})
    assert pair_length(tmp_path, fitting) == 96
    with pytest.raises(ModelError, match=r"query_max_length \(128\) \+ .*\(200\) ask for 328 tokens .* can take 128"):
        pair_length(tmp_path, default.model_copy(update={"passage_max_length": 200}))


def test_an_embedder_refuses_longer_texts_than_its_model_can_take(tiny_bert_folder: Path) -> None:
    from embed_pipeline.models.embedder import load_sentence_transformer

    with pytest.raises(ModelError, match=r"encoding\.query_max_length asks for 129 tokens, but the model .* take 128"):
        load_sentence_transformer(tiny_bert_folder, EncodingSettings(query_max_length=129))
    assert load_sentence_transformer(tiny_bert_folder, EncodingSettings(query_max_length=128)).max_seq_length == 128


def test_a_reranker_cuts_pairs_to_what_its_model_can_take(tiny_bert_folder: Path) -> None:
    from embed_pipeline.models.reranker import Reranker

    reranker = Reranker(tiny_bert_folder, max_length=512, device="cpu", precision="float32")
    assert reranker.model.max_seq_length == 128
    assert len(reranker.score([("word " * 300, "word " * 300)], progress=False)) == 1


def test_a_folder_without_normalisation_gets_it(tiny_bert_folder: Path, tmp_path: Path) -> None:
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from embed_pipeline.models.embedder import encoding_of, load_sentence_transformer

    bare = tmp_path / "bare"
    shutil.copytree(tiny_bert_folder, bare)
    modules = json.loads((bare / "modules.json").read_text())
    (bare / "modules.json").write_text(json.dumps([m for m in modules if "Normalize" not in m["type"]]))
    assert not np.isclose(np.linalg.norm(SentenceTransformer(str(bare), device="cpu").encode("a text")), 1.0)

    model = load_sentence_transformer(bare, device="cpu")
    assert encoding_of(model).normalize is True
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.linalg.norm(saved.encode("a text")) == pytest.approx(1.0)
