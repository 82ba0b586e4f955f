"""A model's graph for other runtimes: token ids in, the final embedding (or the score) out."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from embed_pipeline.errors import ModelError
from embed_pipeline.exporting.runtime import FORM_FILE, TOKENIZER_FILE, FormFile
from embed_pipeline.models.embedder import encoding_of

ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"
_LARGEST_FILE = 1_800_000_000  # protobuf ends at 2 GB: larger weights lie in a file beside the graph
_PARAMETER_BYTES = 4


class _EmbeddingGraph(torch.nn.Module):
    """Transformer, pooling and normalisation in one: (n, tokens) ids and mask -> (n, dimension) unit rows."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        embedding: torch.Tensor = self.model(features)["sentence_embedding"]
        return embedding


class _ScoreGraph(torch.nn.Module):
    """(n, tokens) ids, mask and, where the tokenizer tells the two texts apart by them, types -> (n,) logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits[:, 0]


def write_onnx(model: SentenceTransformer, folder: Path) -> Path:
    """Write `model.onnx` with its tokenizer and `form.json` into `folder`: everything a runtime needs.

    Raises ModelError when the model needs more than ids and mask, or has no tokenizer that other languages can read.
    """
    if any(isinstance(module, Pooling) and not module.include_prompt for module in model):
        raise ModelError("leaves its prompt out of the pooling, which a graph of ids and mask cannot know")
    encoding = encoding_of(model)
    assert encoding.query_max_length is not None
    assert encoding.passage_max_length is not None
    tokenizer = model.tokenizer
    form = FormFile(
        file=ONNX_FILE,
        query_prompt=encoding.query_prompt or "",
        passage_prompt=encoding.passage_prompt or "",
        query_max_length=encoding.query_max_length,
        passage_max_length=encoding.passage_max_length,
        **_padding(tokenizer),
    )
    _write_tokenizer(tokenizer, folder)
    _export(_EmbeddingGraph(model), tokenizer, ["input_ids", "attention_mask"], "sentence_embedding", folder)
    return _write_form(form, folder)


def write_reranker_onnx(model: CrossEncoder, folder: Path) -> Path:
    """The same of a cross-encoder; its `form.json` says which inputs it takes."""
    tokenizer = model.tokenizer
    transformer = getattr(model[0], "auto_model", None)
    if len(model) != 1 or transformer is None:
        raise ModelError("is not a transformer with a classification head alone")
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    form = FormFile(
        file=ONNX_FILE,
        query_max_length=model.max_length,
        passage_max_length=model.max_length,
        inputs=names,
        **_padding(tokenizer),
    )
    _write_tokenizer(tokenizer, folder)
    _export(_ScoreGraph(transformer), tokenizer, names, "logits", folder)
    return _write_form(form, folder)


def quantise_onnx(onnx: Path, folder: Path) -> Path:
    """The ONNX form in `onnx` with int8 weights, one scale a channel; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It asks for a pre-processing that only static quantisation gains from.
    logging.getLogger().addFilter(_no_preprocessing_hint)
    try:
        large = (onnx / ONNX_FILE).stat().st_size + _beside(onnx) > _LARGEST_FILE
        quantize_dynamic(
            onnx / ONNX_FILE,
            folder / ONNX_FILE,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=large,
        )
    finally:
        logging.getLogger().removeFilter(_no_preprocessing_hint)
    return _like(onnx, folder, ONNX_FILE)


def write_openvino(onnx: Path, folder: Path, *, int8: bool) -> Path:
    """The ONNX form in `onnx` as OpenVINO's `model.xml` and `model.bin`: float16 weights, or int8 ones by NNCF."""
    import openvino

    graph = openvino.convert_model(onnx / ONNX_FILE)
    if int8:
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(graph, folder / OPENVINO_FILE, compress_to_fp16=True)
    return _like(onnx, folder, OPENVINO_FILE)


def _export(graph: torch.nn.Module, tokenizer: Any, names: list[str], output: str, folder: Path) -> None:
    texts = ["one text", "and another one that is a little longer"]
    example = tokenizer(texts, padding=True, return_tensors="pt")
    # With distinct sizes, none of the two axes is taken for a constant.
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    weights = sum(parameter.numel() for parameter in graph.parameters()) * _PARAMETER_BYTES
    with torch.no_grad():
        torch.onnx.export(
            graph.eval(),
            tuple(example.get(name, torch.zeros_like(example["input_ids"])) for name in names),
            folder / ONNX_FILE,
            input_names=names,
            output_names=[output],
            dynamic_shapes=tuple({0: batch, 1: tokens} for _ in names),
            dynamo=True,
            external_data=weights > _LARGEST_FILE,
            verbose=False,
        )


def _padding(tokenizer: Any) -> dict[str, Any]:
    return {
        "pad_token": tokenizer.pad_token,
        "pad_token_id": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
    }


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ModelError("has a tokenizer in Python alone, which no other runtime reads")
    fast.save(str(folder / TOKENIZER_FILE))


def _write_form(form: FormFile, folder: Path) -> Path:
    (folder / FORM_FILE).write_text(form.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


def _like(onnx: Path, folder: Path, file: str) -> Path:
    """Tokenizer and description of the form in `onnx`, whose graph is `file` here."""
    shutil.copy2(onnx / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    told = json.loads((onnx / FORM_FILE).read_text("utf-8"))
    return _write_form(FormFile.model_validate({**told, "file": file}), folder)


def _beside(onnx: Path) -> int:
    beside = onnx / f"{ONNX_FILE}.data"
    return beside.stat().st_size if beside.is_file() else 0


def _no_preprocessing_hint(record: logging.LogRecord) -> bool:
    return "run pre-processing before quantization" not in record.getMessage()
