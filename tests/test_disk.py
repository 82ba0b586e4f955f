"""A full or read-only disk is told in words, whoever notices it; and nothing is published by halves."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from embed_pipeline.artifacts import Made, PipelineStore, Recipe, RunIds
from embed_pipeline.command_line import main
from embed_pipeline.disk import disk_error
from embed_pipeline.errors import CleaningError, DiskError, TrainingError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def recipe() -> Recipe:
    return Recipe(inputs={}, settings={}, seed=1, code_version="1")


def by_hand(out: Path) -> None:
    (out / "rows.txt").write_bytes(os.urandom(2**21))


def by_numpy(out: Path) -> None:
    np.save(out / "rows.npy", np.random.default_rng(0).random(2**18))


def by_arrow(out: Path) -> None:
    pq.write_table(pa.table({"a": np.random.default_rng(0).random(2**18)}), out / "rows.parquet")


def by_duckdb(out: Path) -> None:
    duckdb.sql(f"COPY (SELECT random() a, random() b FROM range(300000)) TO '{out}/rows.parquet'")


def by_duckdbs_own_file(out: Path) -> None:
    with duckdb.connect(str(out / "work.duckdb")) as connection:
        connection.execute("CREATE TABLE t AS SELECT random() a, random() b FROM range(300000)")
        connection.execute("CHECKPOINT")


def by_torch(out: Path) -> None:
    import torch

    torch.save(torch.rand(2**19), out / "weights.pt")


def by_safetensors(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.rand(2**19)}, out / "model.safetensors")


def by_sqlite(out: Path) -> None:
    with sqlite3.connect(out / "mlflow.db") as connection:
        connection.execute("CREATE TABLE t (a BLOB)")
        connection.execute("INSERT INTO t VALUES (?)", (os.urandom(2**21),))


WRITERS = (by_hand, by_numpy, by_arrow, by_duckdb, by_duckdbs_own_file, by_torch, by_safetensors, by_sqlite)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_told_with_its_free_space(small_disk: Path, write: Callable[[Path], None]) -> None:
    store = PipelineStore(small_disk, "support")

    def make(out: Path) -> Made:
        write(out)
        return Made({}, RunIds())

    with pytest.raises(
        DiskError, match=rf"{small_disk}.*disk is full .*Free: .* at {small_disk}.*embed-pipeline prune"
    ):
        store.produce("embedder", recipe(), [], make, content=None)

    assert not store.has_current("embedder")
    assert list((small_disk / "support" / ".staging").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert not store.produce("embedder", recipe(), [], make, content=None).reused


def test_a_disk_that_is_full_when_a_version_is_published_leaves_none(small_disk: Path) -> None:
    store = PipelineStore(small_disk, "support")

    def fill(out: Path) -> Made:
        with (out / "rows.txt").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        return Made({}, RunIds())

    with pytest.raises(DiskError, match="disk is full"):
        store.produce("embedder", recipe(), [], fill, content=None)
    assert not store.has_current("embedder")
    assert store.versions("embedder") == []


def test_a_read_only_store_is_told(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PipelineStore(small_disk, "support")

    def make(out: Path) -> Made:
        (out / "rows.txt").write_text("abc")
        return Made({}, RunIds())

    made = store.produce("embedder", recipe(), [], make, content=None).artifact
    other = Recipe(inputs={}, settings={}, seed=2, code_version="1")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for told in (recipe(), other):
        with pytest.raises(DiskError, match=rf"{small_disk}.* cannot be written: its disk is mounted read-only"):
            store.produce("embedder", told, [], make, content=None)
    monkeypatch.setenv("EMBED_PIPELINE_STORE", str(small_disk))
    assert store.current("embedder") == made
    assert CliRunner().invoke(main, ["verify", "support"]).exit_code == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/store/x"), "/store/x: the disk quota is used up"),
        (PermissionError(errno.EACCES, "Permission denied", "/store/x"), "/store/x: .* may not read or write it"),
        (duckdb.IOException('Cannot open file "/store/y": Permission denied'), "/store/y: .* may not read or write it"),
        (TrainingError("the job failed with OSError: [Errno 28] No space left on device: '/store/z'\n\nTraceback"),
         "/store/z: the disk is full"),
        (TrainingError("RuntimeError: [enforce fail] PytorchStreamWriter failed writing file data/3"),
         "the disk is full"),
    ],
)  # fmt: skip
def test_what_libraries_and_trainings_say_of_a_disk(tmp_path: Path, error: Exception, said: str) -> None:
    wrapped = RuntimeError("something else")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        told = disk_error(one, tmp_path)
        assert told is not None
        assert "\n" not in str(told)
        assert re.search(said, str(told))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        CleaningError("permission denied"),
        RuntimeError("the server says: permission denied"),
        TrainingError("the loss is not a number"),
    ],
)
def test_what_says_nothing_of_a_disk_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    assert disk_error(error, tmp_path) is None
