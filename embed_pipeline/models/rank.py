"""Entry point of a rank that encodes, scores or searches: `torchrun -m embed_pipeline.models.rank JOB.json`.

Ranks meet in files alone: none waits for another, and whoever launched them puts the results together when all have
ended. A rank that is started again leaves out the blocks that are there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm.auto import tqdm

from embed_pipeline.launch.ending import run_and_leave
from embed_pipeline.launch.rank import Place, take_place
from embed_pipeline.models.blocks import TEXTS_FILE, Texts, block_file, read_block, write_block
from embed_pipeline.models.job import EncodingJob, ScoringJob, SearchJob, read_job
from embed_pipeline.models.search import search_share

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

_REPORT_SECONDS = 10.0


@record
def main(job_file: Path) -> None:
    """Do this rank's share of the job. Raises what the models and the search raise."""
    job = read_job(job_file)
    place = take_place(job.world_size)
    with _reporting(place) as pipes:
        _take_part(job, place, pipes)


def _take_part(job: EncodingJob | ScoringJob | SearchJob, place: Place, pipes: PipesContext | None) -> None:
    if isinstance(job, SearchJob):
        queries, passages = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (job.queries, job.passages))
        search_share(queries, passages, job.top_k, job.folder, place.rank, place.world_size, device=place.device)
    else:
        _compute_share(job, place, pipes)


def _compute_share(job: EncodingJob | ScoringJob, place: Place, pipes: PipesContext | None) -> None:
    # The blocks are sorted by length, so what lies between two of a rank's is shared out alike.
    share = job.blocks[place.rank :: place.world_size]
    work: Callable[[Texts], np.ndarray] | None = None
    told = time.monotonic()
    for block in tqdm(share, f"{job.kind}, rank 0 of {place.world_size}", unit="block", disable=not place.is_main):
        if not block_file(job.folder, block).is_file():
            work = work or _model(job, place)
            write_block(job.folder, block, work(read_block(job.folder / TEXTS_FILE, block)))
        if pipes is not None and time.monotonic() - told >= _REPORT_SECONDS:
            told = time.monotonic()
            done = sum(block_file(job.folder, number).is_file() for number in job.blocks)
            metrics = {"blocks": done, "of_blocks": len(job.blocks)}
            pipes.report_custom_message({"type": "metrics", "step": done, "metrics": metrics})


def _reporting(place: Place) -> AbstractContextManager[PipesContext | None]:
    """What tells Dagster, where it launched the job, how far all ranks are; in rank 0 alone."""
    if not place.is_main or "DAGSTER_PIPES_CONTEXT" not in os.environ:
        return nullcontext()
    from dagster_pipes import open_dagster_pipes

    return open_dagster_pipes()


def _model(job: EncodingJob | ScoringJob, place: Place) -> Callable[[Texts], np.ndarray]:
    # Imported here: a search loads no model.
    if isinstance(job, EncodingJob):
        from embed_pipeline.models.embedder import Embedder

        embedder = Embedder(
            job.model,
            job.encoding,
            precision=job.precision,
            device=place.device,
            trust_remote_code=job.trust_remote_code,
            batch_size=job.batch_size,
        )
        task = job.task
        return lambda texts: embedder.compute(texts[0], task)
    from embed_pipeline.models.reranker import Reranker

    reranker = Reranker(
        job.model,
        max_length=job.max_length,
        precision=job.precision,
        device=place.device,
        trust_remote_code=job.trust_remote_code,
        batch_size=job.batch_size,
        seed=job.seed,
    )
    return lambda texts: reranker.compute(*texts)


if __name__ == "__main__":
    run_and_leave(lambda: main(Path(sys.argv[1])))
