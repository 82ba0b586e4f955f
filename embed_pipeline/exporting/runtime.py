"""An exported model as a user runs it, without torch: `tokenizers`, numpy and one runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Encoding, Tokenizer

from embed_pipeline.errors import ModelError

FORM_FILE = "form.json"
TOKENIZER_FILE = "tokenizer.json"
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class FormFile(BaseModel):
    """`form.json`: what has to be done to a text before it goes into the graph `file`."""

    model_config = ConfigDict(frozen=True)

    file: str
    query_prompt: str = ""  # put before the text
    passage_prompt: str = ""
    query_max_length: int  # tokens, special ones included; of a reranker both are those of a pair
    passage_max_length: int
    pad_token: str
    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    inputs: list[str] = ["input_ids", "attention_mask"]


class _Graph:
    def __init__(self, folder: Path | str, batch_size: int) -> None:
        self.folder, self.batch_size = Path(folder), batch_size
        try:
            self.form = FormFile.model_validate_json((self.folder / FORM_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelError(f"{self.folder} holds no exported model: {error}") from error
        self._tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER_FILE))
        self._tokenizer.enable_padding(
            direction=self.form.padding_side, pad_id=self.form.pad_token_id, pad_token=self.form.pad_token
        )
        self._run = _runtime(self.folder / self.form.file)

    def _outputs(self, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int) -> np.ndarray:
        """Of the texts in the order given; they are run by length, so that short ones are not padded to long ones."""
        self._tokenizer.enable_truncation(max_length)
        order = np.argsort([-sum(map(len, text)) for text in texts], kind="stable")
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = self._tokenizer.encode_batch([texts[i] for i in order[start : start + self.batch_size]])
            found.append(self._run({name: _INPUTS[name](batch) for name in self.form.inputs}))
        outputs = np.concatenate(found)
        scattered = np.empty_like(outputs)
        scattered[order] = outputs
        return scattered


class ExportedEmbedder(_Graph):
    """An exported embedder's folder: prompts, lengths and normalisation as in training. Raises ModelError."""

    def __init__(self, folder: Path | str, *, batch_size: int = 32) -> None:
        super().__init__(folder, batch_size)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) texts -> (n, dimension) float32, unit rows."""
        return self._outputs([self.form.query_prompt + text for text in texts], self.form.query_max_length)

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) texts -> (n, dimension) float32, unit rows."""
        return self._outputs([self.form.passage_prompt + text for text in texts], self.form.passage_max_length)


class ExportedReranker(_Graph):
    """An exported reranker's folder. Raises ModelError."""

    def __init__(self, folder: Path | str, *, batch_size: int = 32) -> None:
        super().__init__(folder, batch_size)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(n,) pairs of (query, passage) -> (n,) float32 logits."""
        return self._outputs(pairs, self.form.query_max_length)


def _ids(batch: Sequence[Encoding]) -> np.ndarray:
    return np.array([one.ids for one in batch], dtype=np.int64)


def _mask(batch: Sequence[Encoding]) -> np.ndarray:
    return np.array([one.attention_mask for one in batch], dtype=np.int64)


def _types(batch: Sequence[Encoding]) -> np.ndarray:
    return np.array([one.type_ids for one in batch], dtype=np.int64)


_INPUTS = {"input_ids": _ids, "attention_mask": _mask, "token_type_ids": _types}


def _runtime(graph: Path) -> Run:
    """ONNX Runtime or OpenVINO, by the file's name, on the CPU."""
    if graph.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        return lambda inputs: np.asarray(session.run(None, inputs)[0], dtype=np.float32)
    import openvino

    compiled = openvino.Core().compile_model(str(graph), "CPU")
    return lambda inputs: np.asarray(compiled(inputs)[0], dtype=np.float32)
