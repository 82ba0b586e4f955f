"""The lines that load each exported form, for its README and the card."""

from __future__ import annotations

from embed_pipeline.exporting.runtime import FormFile
from embed_pipeline.exporting.vectors import RESCORED


def graph_snippet(name: str, form: FormFile) -> str:
    """Python that needs numpy, `tokenizers` and one runtime; run it in the form's folder."""
    if form.file.endswith(".onnx"):
        package = "onnxruntime"
        load = f'session = onnxruntime.InferenceSession("{form.file}")\n'
        run = "session.run(None, inputs)[0]"
    else:
        package = "openvino"
        load = f'graph = openvino.Core().compile_model("{form.file}", "CPU")\n'
        run = "graph(inputs)[0]"
    side = "" if form.padding_side == "right" else f', direction="{form.padding_side}"'
    return f"""\
```python
import numpy as np
import {package}
from tokenizers import Tokenizer

{load}tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(pad_id={form.pad_token_id}, pad_token={form.pad_token!r}{side})

def encode(texts, prompt, max_length):
    tokenizer.enable_truncation(max_length)
    batch = tokenizer.encode_batch([prompt + text for text in texts])
    inputs = {{
        "input_ids": np.array([one.ids for one in batch], dtype=np.int64),
        "attention_mask": np.array([one.attention_mask for one in batch], dtype=np.int64),
    }}
    return {run}  # unit rows

query_embeddings = encode(queries, {form.query_prompt!r}, {form.query_max_length})
passage_embeddings = encode(passages, {form.passage_prompt!r}, {form.passage_max_length})
scores = query_embeddings @ passage_embeddings.T
```
"""


def reranker_snippet(form: FormFile) -> str:
    """The same of a reranker."""
    lines = {
        "input_ids": "one.ids for one in batch",
        "attention_mask": "one.attention_mask for one in batch",
        "token_type_ids": "one.type_ids for one in batch",
    }
    inputs = "\n".join(f'    "{name}": np.array([{lines[name]}], dtype=np.int64),' for name in form.inputs)
    return f"""\
```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("{form.file}")
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(pad_id={form.pad_token_id}, pad_token={form.pad_token!r})
tokenizer.enable_truncation({form.query_max_length})

batch = tokenizer.encode_batch([(query, passage) for passage in passages])
inputs = {{
{inputs}
}}
scores = session.run(None, inputs)[0]  # logits: compare them within a query
```
"""


INT8 = """\
```python
import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

ranges = np.load("ranges.npy")  # of train passages: never take them from the texts that you store
stored = quantize_embeddings(passage_embeddings, precision="int8", ranges=ranges)  # 1 byte a number
steps = (ranges[1] - ranges[0]) / 255
restored = ranges[0] + (stored.astype(np.float32) + 128.5) * steps  # the middle of each step
scores = query_embeddings @ restored.T
```

`embed_pipeline.exporting.vectors.Int8Vectors.load(folder)` does the same, with an exact search.
"""

BINARY = f"""\
```python
import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

stored = quantize_embeddings(passage_embeddings, precision="ubinary")  # 1 bit a number
asked = quantize_embeddings(query_embeddings, precision="ubinary")
distances = np.bitwise_count(asked[:, None] ^ stored[None]).sum(axis=2, dtype=np.int64)
candidates = np.argsort(distances, axis=1, kind="stable")[:, : {RESCORED} * top_k]
signs = np.unpackbits(stored, axis=1, count=query_embeddings.shape[1]).astype(np.float32) * 2 - 1
scores = np.einsum("nd,nkd->nk", query_embeddings, signs[candidates])  # rescored by the float32 question
best = np.take_along_axis(candidates, np.argsort(-scores, axis=1)[:, :top_k], axis=1)
```

`embed_pipeline.exporting.vectors.BinaryVectors(dimension)` does the same in blocks.
"""


def cut_snippet(dimensions: int) -> str:
    """sentence-transformers cuts by itself; it has to be told to normalise what is left."""
    return f"""\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(model_folder, truncate_dim={dimensions})
query_embeddings = model.encode_query(queries, normalize_embeddings=True)
passage_embeddings = model.encode_document(passages, normalize_embeddings=True)
scores = query_embeddings @ passage_embeddings.T
```
"""
