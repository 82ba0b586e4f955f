"""SICK's sentence pairs as they are: sentence1, sentence2, score (1 to 5), split.

`python sick_pairs.py OUTPUT_FOLDER`, with SICK as `sick/pairs.parquet` in the folder that BENCHMARK_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

pairs = pd.read_parquet(Path(os.environ["BENCHMARK_DATA"]) / "sick" / "pairs.parquet")
pairs[["sentence1", "sentence2", "score", "split"]].to_parquet(Path(sys.argv[1]) / "pairs.parquet", index=False)
