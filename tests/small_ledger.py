"""A store with models of a few bytes and promotions of them; as a program, promotions in a process of their own.

    python -m tests.small_ledger race STORE EMBEDDER RERANKER TIMES
    python -m tests.small_ledger die STORE EMBEDDER RERANKER

`race` says that it is ready, waits for a line, promotes, and prints the numbers it got. `die` promotes in one child
process after the other, killed at its first change of a file, at its second, and so on until one lives; after each it
prints who is the champion.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from embed_pipeline.artifacts import Artifact, Made, PipelineStore, Recipe, RunIds
from embed_pipeline.champions import (
    Champion,
    Event,
    Promotion,
    RegisteredModel,
    changing,
    pointer,
    read_history,
    record,
)
from embed_pipeline.model_files import MODEL_FOLDER, SERVING_FILE

CHANGES = {"os.mkdir", "os.symlink", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def model(store: PipelineStore, asset: str, name: str, *inputs: Artifact) -> Artifact:
    """A published version whose only weight is its name."""

    def make(out: Path) -> Made:
        (out / MODEL_FOLDER).mkdir()
        (out / MODEL_FOLDER / "weights").write_text(name)
        (out / SERVING_FILE).write_text(json.dumps({"embedder_weight": 0.5, "of": name}))
        return Made({}, RunIds())

    contents = {artifact.manifest.asset: artifact.content for artifact in inputs}
    recipe = Recipe(inputs=contents, settings={"name": name}, seed=1, code_version="1")
    return store.produce(asset, recipe, inputs, make, content=None).artifact


def pair(embedder: str, reranker: str, evaluation: str = "e") -> Champion:
    return Champion(
        embedder_asset="embedder",
        embedder=embedder,
        reranker=reranker,
        cleaned_pairs="c",
        evaluation=evaluation,
        verdict="better",
        registered_embedder=RegisteredModel(name="support-embedder", version="1"),
        registered_reranker=RegisteredModel(name="support-reranker", version="1"),
    )


def promote(store: PipelineStore, champion: Champion | None, event: Event = "promoted") -> Promotion:
    with changing(store) as history:
        return record(store, history, event, champion, by="test", reason="because")


def _promote_until_killed(store: PipelineStore, champion: Champion, at: int) -> None:
    """Ends this process before its change number `at` of a file."""
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            changes += 1
            if changes == at:
                os._exit(1)

    sys.addaudithook(count)
    promote(store, champion)


def main(what: str, folder: str, embedder: str, reranker: str, times: str = "1") -> None:
    store = PipelineStore(Path(folder).parent, Path(folder).name)
    champion = pair(embedder, reranker)
    if what == "race":
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps([promote(store, champion).number for _ in range(int(times))]))
        return
    for at in range(1, 100):
        child = os.fork()
        if child == 0:
            _promote_until_killed(store, champion, at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        in_force = read_history(store)
        weights = (pointer(store) / "embedder" / "weights").read_text()
        serving = json.loads((pointer(store) / SERVING_FILE).read_text())["of"]
        now = in_force.champion.embedder if in_force.champion else None
        print(json.dumps([status, len(in_force.promotions), now, weights, serving]))
        if status == 0:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
