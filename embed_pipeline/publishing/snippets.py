"""Python that loads a published model in the libraries that people use, with the model's own prompts and lengths.

Every snippet goes from `queries` and `passages` (lists of texts) to `query_embeddings` and `passage_embeddings`, or
from `query` and `passages` to `scores`, so that a test can run them all and compare.
"""

from __future__ import annotations

from embed_pipeline.settings import EncodingSettings


def embedder_snippets(model: str, encoding: EncodingSettings, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Library -> code; `model` is a repository or a folder, `encoding` what the folder says (`encoding_of`).

    FlagEmbedding is left out where it has no such pooling.
    """
    query_prompt, passage_prompt = encoding.query_prompt or "", encoding.passage_prompt or ""
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    trusted_kwargs = ', model_kwargs={"trust_remote_code": True}' if trust_remote_code else ""
    snippets = {
        "sentence-transformers": f"""\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({model!r}{trusted})
query_embeddings = model.encode_query(queries)
passage_embeddings = model.encode_document(passages)
scores = model.similarity(query_embeddings, passage_embeddings)
"""
    }
    if encoding.pooling in ("cls", "mean"):
        instruction = f"    query_instruction_for_retrieval={query_prompt!r},\n" if query_prompt else ""
        corpus = f"[{passage_prompt!r} + passage for passage in passages]" if passage_prompt else "passages"
        snippets["FlagEmbedding"] = f"""\
from FlagEmbedding import FlagModel

model = FlagModel(
    {model!r},
    pooling_method={encoding.pooling!r},
{instruction}    query_max_length={encoding.query_max_length},
    passage_max_length={encoding.passage_max_length},
    use_fp16=False{trusted},
)
query_embeddings = model.encode_queries(queries)
passage_embeddings = model.encode_corpus({corpus})
scores = query_embeddings @ passage_embeddings.T
"""
    snippets["LangChain"] = f"""\
from langchain_huggingface import HuggingFaceEmbeddings

model = HuggingFaceEmbeddings(
    model_name={model!r},
    query_encode_kwargs={{"prompt": {query_prompt!r}, "task": "query", "normalize_embeddings": True}},
    encode_kwargs={{"prompt": {passage_prompt!r}, "task": "document", "normalize_embeddings": True}}{trusted_kwargs},
)
query_embeddings = [model.embed_query(query) for query in queries]
passage_embeddings = model.embed_documents(passages)
"""
    longest = max(encoding.query_max_length or 0, encoding.passage_max_length or 0)
    snippets["LlamaIndex"] = f"""\
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

model = HuggingFaceEmbedding(
    model_name={model!r},
    query_instruction={query_prompt!r},
    text_instruction={passage_prompt!r},
    max_length={longest},{trusted.removeprefix(",")}
)
query_embeddings = [model.get_query_embedding(query) for query in queries]
passage_embeddings = model.get_text_embedding_batch(passages)
"""
    return snippets


def embedder_notes(encoding: EncodingSettings) -> list[str]:
    """Where a library cannot do all that the model asks for."""
    notes = []
    if encoding.pooling not in ("cls", "mean"):
        notes.append(f"FlagEmbedding's FlagModel has no {encoding.pooling} pooling for encoders.")
    if encoding.query_max_length != encoding.passage_max_length:
        notes.append(
            "LlamaIndex has one maximum length for questions and passages: a question of more than "
            f"{encoding.query_max_length} tokens is cut later there than in training."
        )
    notes.append("LangChain replaces line breaks by spaces before it encodes.")
    return notes


def reranker_snippets(model: str, max_length: int, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Library -> code; `max_length` is that of a pair in tokens."""
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    return {
        "sentence-transformers": f"""\
from sentence_transformers import CrossEncoder

model = CrossEncoder({model!r}{trusted})
scores = model.predict([(query, passage) for passage in passages])
""",
        "FlagEmbedding": f"""\
from FlagEmbedding import FlagReranker

model = FlagReranker({model!r}, max_length={max_length}, use_fp16=False{trusted})
scores = model.compute_score([(query, passage) for passage in passages])
""",
        "LangChain": f"""\
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from sentence_transformers import CrossEncoder

model = CrossEncoder({model!r}{trusted})

def rerank(given):
    scores = model.predict([(given["query"], document.page_content) for document in given["documents"]])
    ranked = sorted(zip(scores.tolist(), given["documents"]), key=lambda found: -found[0])
    return [Document(document.page_content, metadata={{"score": score}}) for score, document in ranked]

reranker = RunnableLambda(rerank)  # after a retriever
documents = reranker.invoke({{"query": query, "documents": [Document(passage) for passage in passages]}})
""",
        "LlamaIndex": f"""\
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import NodeWithScore, TextNode

reranker = SentenceTransformerRerank(model={model!r}, top_n=len(passages), trust_remote_code={trust_remote_code})
reranker._model.max_length = {max_length}  # it sets 512, whatever the model says
nodes = reranker.postprocess_nodes([NodeWithScore(node=TextNode(text=text)) for text in passages], query_str=query)
""",
    }


def blend_snippet(weight: float) -> str:
    """The final ranking of one question's candidates, from both models' scores."""
    return f"""\
import numpy as np

def standardised(scores):
    centred = np.asarray(scores, dtype=np.float64) - np.mean(scores)
    return centred / (centred.std() or 1.0)

weight = {weight:g}  # embedder_weight of serving.json
final = weight * standardised(embedder_scores) + (1 - weight) * standardised(reranker_scores)
"""
