"""Encoding, scoring and searching in two processes, by real torchrun: the same bits as in one."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer

from embed_pipeline.errors import ModelError, TrainingError
from embed_pipeline.launch.job import Job, launch_job
from embed_pipeline.models import blocks, ranks
from embed_pipeline.models.embedder import Embedder
from embed_pipeline.models.job import BlocksJob, InferenceJob, SearchJob
from embed_pipeline.models.ranks import Ranks
from embed_pipeline.models.reranker import Reranker
from embed_pipeline.models.search import search
from tests.conftest import one_thread

WORDS = [
    "the",
    "old",
    "river",
    "and",
    "a",
    "new",
    "engine",
    "stand",
    "in",
    "the",
    "blue",
    "garden",
    "near",
    "a",
    "deep",
    "harbor",
    "of",
    "winter",
]


def made_up(count: int) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) + f" {i}" for i in range(count)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 texts, and jobs that are started however little there is to do."""
    for module in (blocks, ranks):
        monkeypatch.setattr(module, "BLOCK_SIZE", 16)
    monkeypatch.setattr(ranks, "START_SECONDS", 0.0)
    with one_thread():
        yield


@dataclasses.dataclass
class Launched:
    """Launches as the stages do, and keeps what was launched."""

    jobs: list[InferenceJob] = dataclasses.field(default_factory=list)
    on_poll: Callable[[], None] = lambda: None

    def __call__(self, job: Job, job_file: Path, tracked: None) -> None:
        assert isinstance(job, InferenceJob)
        self.jobs.append(job)
        launch_job(job, job_file, tracked, on_poll=self.on_poll)


@pytest.mark.usefixtures("small_blocks")
def test_two_processes_give_the_bits_of_one(tmp_path: Path, tiny_bert_folder: Path) -> None:
    texts, queries = made_up(150), made_up(20)
    in_memory, alone = (Embedder(tiny_bert_folder, ranks=one) for one in (Ranks(), Ranks(tmp_path / "one")))
    launched = Launched()
    two = Ranks(tmp_path / "two", 2, launched)
    shared = Embedder(tiny_bert_folder, ranks=two)

    passages = shared.encode_passages(texts, progress=False)
    [job] = launched.jobs
    assert isinstance(job, BlocksJob)
    assert job.blocks == tuple(range(1, 10))  # the first one told that a job is worth it
    assert isinstance(passages, np.memmap)
    assert not passages.flags.writeable
    assert passages.shape == (150, 32)
    for other in (in_memory, alone):
        np.testing.assert_array_equal(other.encode_passages(texts, progress=False), passages)
    # What is left is what is found again, whatever the number of processes: nothing but the embeddings.
    assert {path.suffix for path in (tmp_path / "two").rglob("*") if path.is_file()} <= {".npy", ".lock"}
    again = Embedder(tiny_bert_folder, ranks=Ranks(tmp_path / "two"))
    again.compute = None  # type: ignore[assignment, method-assign]
    np.testing.assert_array_equal(again.encode_passages(texts, progress=False), passages)

    asked = alone.encode_queries(queries, progress=False)
    found = two.search(asked[3:], passages, 12)
    assert isinstance(launched.jobs[-1], SearchJob)
    assert launched.jobs[-1].passages == Path(passages.filename or "")  # the file itself, not a copy
    for result, expected in zip(found, search(asked[3:], passages, 12), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert not list((tmp_path / "two").glob("search-*"))


def test_arithmetic_that_is_too_coarse_for_a_model_is_refused(
    tmp_path: Path, tiny_bert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = made_up(20)
    fine = Embedder(tiny_bert_folder, precision="bfloat16", ranks=Ranks(tmp_path / "fine"))
    with caplog.at_level(logging.INFO):
        fine.encode_queries(texts, progress=False)
        fine.encode_passages(texts, progress=False)
    assert caplog.text.count("bfloat16 agrees with float32: lowest cosine") == 1
    model = SentenceTransformer(str(tiny_bert_folder), device="cpu")
    with torch.no_grad():
        for layer in model[0].auto_model.encoder.layer:
            # Small differences of large numbers, which bfloat16 rounds to multiples of 8; the rest cancels out.
            layer.intermediate.dense.bias += 1_000
            layer.output.dense.weight -= layer.output.dense.weight.mean(dim=1, keepdim=True)
            layer.output.dense.weight *= 1_000
    model.save_pretrained(str(tmp_path / "coarse"))
    coarse = Embedder(tmp_path / "coarse", precision="bfloat16", ranks=Ranks(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"bfloat16 is too coarse for the model in .*coarse: an embedding has cosine"):
        coarse.encode_queries(texts, progress=False)
    assert not list((tmp_path / "none").rglob("*.npy"))
    Embedder(tmp_path / "coarse", precision="float32").encode_queries(texts, progress=False)


def test_what_was_computed_in_one_arithmetic_is_not_found_in_another(tmp_path: Path, tiny_bert_folder: Path) -> None:
    texts = made_up(20)
    pairs = list(zip(texts, reversed(texts), strict=True))
    for precision in ("float32", "bfloat16"):
        alone = Embedder(tiny_bert_folder, precision=precision).encode_passages(texts, progress=False)
        kept = Embedder(tiny_bert_folder, precision=precision, ranks=Ranks(tmp_path))
        np.testing.assert_array_equal(kept.encode_passages(texts, progress=False), alone)
        np.testing.assert_allclose(np.sum(alone * alone, axis=1), 1.0, atol=1e-5)
        scorer = Reranker(tiny_bert_folder, precision=precision, seed=5, ranks=Ranks(tmp_path))
        scored = Reranker(tiny_bert_folder, precision=precision, seed=5).score(pairs, progress=False)
        np.testing.assert_array_equal(scorer.score(pairs, progress=False), scored)
    assert len(list(tmp_path.rglob("*.npy"))) == 4


@pytest.mark.usefixtures("small_blocks")
def test_a_head_that_a_seed_makes_is_the_same_in_every_process(tmp_path: Path, tiny_bert_folder: Path) -> None:
    pairs = list(zip(made_up(60), reversed(made_up(60)), strict=True))
    plain, launched = tiny_bert_folder.parent / "plain", Launched()
    expected = Reranker(plain, max_length=32, seed=5).score(pairs, progress=False)
    shared = Reranker(plain, max_length=32, seed=5, ranks=Ranks(tmp_path, 2, launched))
    np.testing.assert_array_equal(shared.score(pairs, progress=False), expected)
    assert len(launched.jobs) == 1
    assert not np.array_equal(Reranker(plain, max_length=32, seed=6).score(pairs[:5], progress=False), expected[:5])


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_rank_is_told_and_the_next_encoding_goes_on(
    tmp_path: Path, tiny_bert_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = made_up(16 * 250)
    killed = False

    def kill_a_rank() -> None:
        nonlocal killed
        deadline = time.monotonic() + 120
        while not killed:
            if len(list(tmp_path.rglob("*.npy"))) <= 20:
                assert time.monotonic() < deadline
                time.sleep(0.01)
                continue
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if "embed_pipeline.models.rank" in process.cmdline()
                and "embed_pipeline.launch.agent" not in process.cmdline()
            ]
            workers[-1].kill()
            killed = True

    embedder = Embedder(tiny_bert_folder, ranks=Ranks(tmp_path, 2, Launched(on_poll=kill_a_rank)))
    with pytest.raises(TrainingError, match="SIGKILL"):
        embedder.encode_passages(texts, progress=False)
    there = len(list(tmp_path.rglob("*.npy")))
    assert 20 < there < 250

    resumed = Embedder(tiny_bert_folder, ranks=Ranks(tmp_path))
    with caplog.at_level("INFO"):
        embeddings = resumed.encode_passages(texts, progress=False)
    assert f"{there} of 250 blocks were there already" in caplog.text
    np.testing.assert_array_equal(embeddings, Embedder(tiny_bert_folder).encode_passages(texts, progress=False))


@pytest.mark.usefixtures("small_blocks")
def test_the_first_failing_rank_tells_why(tmp_path: Path, tiny_bert_folder: Path) -> None:
    broken = np.full((40, 8), 0.5, dtype=np.float32)
    broken[33, 2] = np.nan
    with pytest.raises(TrainingError, match=r"1 of 20 embeddings of passages are not finite .*first: row 33"):
        Ranks(tmp_path, 2, launch_job).search(broken[:4], broken, 3)
    with pytest.raises(ModelError, match="row 33"):
        Ranks(tmp_path).search(broken[:4], broken, 3)
    assert not list(tmp_path.iterdir())


def test_small_work_starts_no_process(tmp_path: Path, tiny_bert_folder: Path) -> None:
    launched = Launched()
    two = Ranks(tmp_path, 2, launched)
    embedder = Embedder(tiny_bert_folder, ranks=two)
    passages = embedder.encode_passages(made_up(1_200), progress=False)
    two.search(passages[:5], passages, 3)
    assert launched.jobs == []
    assert embedder.encode_queries([], progress=False).shape == (0, 32)


def test_two_callers_of_the_same_work_do_it_once(tmp_path: Path, tiny_bert_folder: Path) -> None:
    texts, computed, started = made_up(40), [], threading.Event()
    found: list[np.ndarray] = []

    def slow(columns: blocks.Texts) -> np.ndarray:
        computed.append(os.getpid())
        started.set()
        other.join(0.5)  # it does not end before we have: it waits for us
        assert other.is_alive()
        return np.ones((len(columns[0]), 2), dtype=np.float32)

    def compute(work: Callable[[blocks.Texts], np.ndarray]) -> None:
        found.append(Ranks(tmp_path).compute(lambda: Path("x.npy"), (texts,), work, _no_job, what="", progress=False))

    other = threading.Thread(target=lambda: started.wait(60) and compute(slow))
    other.start()
    compute(slow)
    other.join(60)
    assert len(computed) == 1
    np.testing.assert_array_equal(*found)


def test_several_processes_need_a_folder() -> None:
    with pytest.raises(ValueError, match="several processes need a folder"):
        Ranks(None, 2, launch_job)


def _no_job(folder: Path, blocks: tuple[int, ...]) -> BlocksJob:
    raise AssertionError
