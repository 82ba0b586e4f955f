"""Entry point of a reranker's training: `torchrun -m embed_pipeline.training.reranker JOB.json`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from embed_pipeline.launch.ending import leave, run_and_leave
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.training.batch_size import prepare_with_batch_size
from embed_pipeline.training.dev import RerankerDev
from embed_pipeline.training.engines import module_of
from embed_pipeline.training.job import RerankerJob
from embed_pipeline.training.output import reranker_card, write_model, write_serving
from embed_pipeline.training.process import start_rank, wait_for_all
from embed_pipeline.training.reporting import open_reporter
from embed_pipeline.training.run import remove_work_folder, train, work_folder
from embed_pipeline.training.sources import read_reranker_sources

logger = logging.getLogger(__name__)


@record
def main(job_file: Path) -> None:
    """Train the job's reranker; rank 0 leaves what `training.output` lists. Raises TrainingError."""
    job = RerankerJob.read(job_file)
    rank = start_rank(job)
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(open_reporter(job.output)) if rank.is_main else None
        sources = read_reranker_sources(job)
        dev = RerankerDev.read(job)
        engine = importlib.import_module(module_of(job.settings.engine, "reranker"))
        job, prepared = prepare_with_batch_size(
            job, rank, sources, lambda job: engine.prepare(job, rank, sources, work_folder(job))
        )
        model = prepared.model
        summary = train(
            job,
            rank,
            prepared,
            sources,
            (lambda: dev.measure(model, rank)) if dev else None,
            metric="ndcg_at_10",
            queries=sources[0].size,
            dev_queries=len(dev.own.queries) if dev else 0,
            reporter=reporter,
        )
        if rank.is_main:
            write_model(model, job, summary, reranker_card(job, summary, model.max_seq_length))
            by_weight = dev.own.ndcg_at_10_by_weight(Reranker.around(model, rank.precision)) if dev else {}
            write_serving(job.output, _embedder_weight(job, by_weight), by_weight)
    wait_for_all()
    if rank.is_main:
        remove_work_folder(job)
    if rank.world_size > 1:
        leave()  # before anything of the process group is destroyed


def _embedder_weight(job: RerankerJob, by_weight: dict[float, float]) -> float:
    """The weight that was asked for, or the best on dev; of equals the smaller, and the reranker alone without dev."""
    if job.settings.embedder_weight != "auto":
        return job.settings.embedder_weight
    if not by_weight:
        logger.info("no dev queries: embedder_weight auto becomes 0.0, the reranker alone")
    return max(by_weight, key=lambda weight: (by_weight[weight], -weight), default=0.0)


if __name__ == "__main__":
    run_and_leave(lambda: main(Path(sys.argv[1])))
