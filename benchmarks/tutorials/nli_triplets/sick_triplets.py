"""SICK as triplets: a sentence, one that it entails, one that it contradicts.

`python sick_triplets.py OUTPUT_FOLDER`, with SICK as `sick/pairs.parquet` in the folder that BENCHMARK_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

pairs = pd.read_parquet(Path(os.environ["BENCHMARK_DATA"]) / "sick" / "pairs.parquet")
turned = pairs.rename(columns={"sentence1": "sentence2", "sentence2": "sentence1"})
both = pd.concat([pairs, turned])[["sentence1", "sentence2", "nli_label"]].drop_duplicates()
entailed = both[both["nli_label"] == "ENTAILMENT"].rename(columns={"sentence1": "anchor", "sentence2": "positive"})
ruled_out = both[both["nli_label"] == "CONTRADICTION"].rename(columns={"sentence1": "anchor", "sentence2": "negative"})
triplets = entailed.merge(ruled_out, on="anchor")[["anchor", "positive", "negative"]]
triplets.to_parquet(Path(sys.argv[1]) / "triplets.parquet", index=False)
