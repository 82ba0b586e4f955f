"""The tracking server: where it is, and how long its client may wait for it."""

from __future__ import annotations

import os

from embed_pipeline.artifacts import home
from embed_pipeline.masking import without_password


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the home folder that needs no server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def ui_address() -> str:
    """Where a person opens MLflow: the server itself, or what `make mlflow` serves."""
    uri = tracking_uri()
    served = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    return without_password(os.environ.get("MLFLOW_UI_URL") or served)


def fail_in_seconds() -> None:
    """Have MLflow's client give up on a dead server in seconds, not after its default of minutes of retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # The jitter comes from Python's global random numbers: a slow server would change what a stage draws from them.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
