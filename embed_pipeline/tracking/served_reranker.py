"""The reranker as MLflow hands it out. This file travels with the model, so it imports nothing of this package.

    model = mlflow.pyfunc.load_model("models:/<pipeline>-reranker@champion")
    scores = model.predict(pandas.DataFrame({"query": [...], "passage": [...]}))

A row is a question with one passage; its score is the raw logit, higher is more relevant.
"""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

MODEL = "model"  # the artifact: a folder that CrossEncoder loads


class ServedReranker(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        from sentence_transformers import CrossEncoder

        trusted = bool(context.model_config["trust_remote_code"])
        self.model = CrossEncoder(context.artifacts[MODEL], trust_remote_code=trusted, local_files_only=True)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Columns `query` and `passage` (title before text) -> (n,) float32."""
        from torch.nn import Identity

        pairs = list(zip(model_input["query"], model_input["passage"], strict=True))
        if not pairs:
            return np.empty(0, dtype=np.float32)
        batch_size = (params or {}).get("batch_size", 32)
        scores = self.model.predict(
            pairs, batch_size=batch_size, activation_fn=Identity(), show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(scores, dtype=np.float32).reshape(-1)


mlflow.models.set_model(ServedReranker())
