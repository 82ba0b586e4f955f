"""Entry point of an embedder's training: `torchrun -m embed_pipeline.training.embedder JOB.json`."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from embed_pipeline.launch.ending import leave, run_and_leave
from embed_pipeline.models.embedder import encoding_of
from embed_pipeline.training.dev import EmbedderDev, dev_metric
from embed_pipeline.training.engines import module_of
from embed_pipeline.training.job import EmbedderJob
from embed_pipeline.training.output import embedder_card, write_model
from embed_pipeline.training.process import start_rank, wait_for_all
from embed_pipeline.training.reporting import open_reporter
from embed_pipeline.training.run import remove_work_folder, train, work_folder
from embed_pipeline.training.sources import read_embedder_sources
from embed_pipeline.training.sub_batch import prepare_within_memory


@record
def main(job_file: Path) -> None:
    """Train the job's embedder; rank 0 leaves what `training.output` lists. Raises TrainingError."""
    job = EmbedderJob.read(job_file)
    rank = start_rank(job)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(open_reporter(job.output)) if rank.is_main else None
        sources = read_embedder_sources(job)
        dev = EmbedderDev.read(job)
        engine = importlib.import_module(module_of(job.settings.engine, "embedder"))
        job, sources, prepared = prepare_within_memory(
            job, rank, sources, lambda job, sources: engine.prepare(job, rank, sources, work_folder(job))
        )
        model = prepared.model
        summary = train(
            job,
            rank,
            prepared,
            sources,
            (lambda: dev.measure(model, rank)) if dev else None,
            metric=dev_metric(job),
            queries=sources[0].size,
            dev_queries=dev.size if dev else 0,
            reporter=reporter,
        )
        if rank.is_main:
            write_model(model, job, summary, embedder_card(job, summary, encoding_of(model)))
    wait_for_all()
    if rank.is_main:
        remove_work_folder(job)
    if rank.world_size > 1:
        leave()  # before anything of the process group is destroyed


if __name__ == "__main__":
    run_and_leave(lambda: main(Path(sys.argv[1])))
