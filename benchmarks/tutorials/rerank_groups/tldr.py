"""What one wants to do on a command line, and the command that does it (tldr-pages): a sample of 4,000 questions.

`python tldr.py OUTPUT_FOLDER`, with the set as `tldr_en/*.parquet` in the folder that BENCHMARK_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

SETS = Path(os.environ["BENCHMARK_DATA"]) / "tldr_en"
out = Path(sys.argv[1])
qrels = pd.read_parquet(SETS / "qrels.parquet")
chosen = qrels["query_id"].drop_duplicates().sample(4_000, random_state=0)
qrels = qrels[qrels["query_id"].isin(chosen)].drop(columns="split")
queries, corpus = (pd.read_parquet(SETS / f"{name}.parquet") for name in ("queries", "corpus"))
asked = corpus["passage_id"].isin(qrels["passage_id"])
others = corpus[~asked].sample(4_000, random_state=0)
queries[queries["query_id"].isin(chosen)].to_parquet(out / "queries.parquet", index=False)
pd.concat([corpus[asked], others]).sort_values("passage_id").to_parquet(out / "corpus.parquet", index=False)
qrels.to_parquet(out / "qrels.parquet", index=False)
