"""What the server imports from which `orchestration.executor` has the steps of a run forked.

All steps of a run see the YAMLs as they were when it started. What cannot be imported or read here fails in the step
that needs it, with a reason, and not in the server.

Nothing here may start a thread or ask for a GPU: a forked process has neither the threads nor the GPU of its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import signal
from collections.abc import Sequence

import dagster as dg

from embed_pipeline import definitions
from embed_pipeline.artifacts import pipelines_in, store_root
from embed_pipeline.launch.environment import compute_as_asked

# What a step needs that finds everything made already: it draws its pictures again.
PICTURES = ("embed_pipeline.mining.plot", "embed_pipeline.training.plot", "embed_pipeline.evaluation.report")
# What computes. Importing it takes longer than the whole of a run with nothing to do, so only the first run of a store,
# in which every stage computes, imports it in advance.
COMPUTING = (
    *("embed_pipeline.cleaning.sources", "embed_pipeline.mining.mine", "embed_pipeline.evaluation.evaluate"),
    *("datasketch", "mlflow", "pandas", "peft"),
)


def prepare() -> None:
    """Import and load what the steps of a run have in common."""
    with contextlib.suppress(Exception):
        definitions.keep()
    with contextlib.suppress(Exception), dg.DagsterInstance.get():
        pass  # the libraries under the storage of runs and events
    # multiprocessing has each step import the program that started the run.
    for command in importlib.metadata.entry_points(group="console_scripts", name="dagster"):
        with contextlib.suppress(Exception):
            command.load()
    _import(PICTURES)
    with contextlib.suppress(Exception):
        if not any(store.has_current("evaluation") for store in pipelines_in(store_root())):
            _import_what_computes()


def _import_what_computes() -> None:
    """Some libraries look at what overrules their arithmetic when they are imported; the step tells what it ignores."""
    given = dict(os.environ)
    logging.disable(logging.WARNING)
    compute_as_asked()
    logging.disable(logging.NOTSET)
    _import(COMPUTING)
    os.environ.update(given)


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


prepare()
# Where a service is stopped, its processes are all told at once: the server stays to tell the run how its steps end,
# and ends with it.
signal.signal(signal.SIGTERM, lambda *_: None)
