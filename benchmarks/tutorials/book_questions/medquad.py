"""Questions on health topics and the sections of the reference works that answer them (MedQuAD), as a BEIR-style set.

`python medquad.py OUTPUT_FOLDER`, with the set as `medquad_mini/*.parquet` in the folder that BENCHMARK_DATA names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

for name in ("corpus", "queries", "qrels"):
    table = pd.read_parquet(Path(os.environ["BENCHMARK_DATA"]) / "medquad_mini" / f"{name}.parquet")
    table.to_parquet(Path(sys.argv[1]) / f"{name}.parquet", index=False)
