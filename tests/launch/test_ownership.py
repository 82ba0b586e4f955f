"""What others could have written is not believed: folders in which a job's processes meet, jobs that are announced."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from embed_pipeline import __version__
from embed_pipeline.errors import TrainingError
from embed_pipeline.launch import nodes
from embed_pipeline.launch.ownership import check_only_ours, check_private, make_private
from embed_pipeline.launch.rendezvous import FileRendezvous
from embed_pipeline.launch.torchrun import RENDEZVOUS_BACKEND, EntryPoint
from embed_pipeline.models.job import InferenceJob
from embed_pipeline.training.job import EmbedderJob, RerankerJob

ID = "0123456789ab"
SOMEBODY = 12_345


def given_to_somebody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root gives it away; anybody else plays the other user."""
    if os.geteuid() == 0:
        os.chown(path, SOMEBODY, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)


# ---------------------------------------------------------------------------------- where a job's processes meet


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    make_private(tmp_path / "parent" / "folder")
    check_private(tmp_path / "parent" / "folder")
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "parent" / "folder")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701, 0o1777])
def test_no_process_meets_others_in_a_folder_that_others_can_enter(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    parameters = RendezvousParameters(RENDEZVOUS_BACKEND, str(tmp_path), "job", 1, 1)
    with pytest.raises(TrainingError, match=rf"with mode {mode:04o}; .* has to belong to user .* with mode 0700"):
        FileRendezvous.create(parameters)
    assert list(tmp_path.iterdir()) == []


def test_no_process_meets_others_in_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    make_private(folder)
    given_to_somebody(folder, monkeypatch)
    with pytest.raises(TrainingError, match="has to belong to user"):
        check_private(folder)


def test_a_link_to_a_private_folder_is_none(tmp_path: Path) -> None:
    make_private(tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(TrainingError, match="link is not a folder"):
        check_private(tmp_path / "link")


# --------------------------------------------------------------------------------------------- what a node joins


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a job and its announcement, good enough to be joined."""
    store = tmp_path / "store"
    job = store / "shop" / ".staging" / "embedder" / "job.json"
    job.parent.mkdir(parents=True)
    job.write_text("{}")
    make_private(store / "shop" / ".nodes" / ID)
    write(store)
    return store


def announcement_of(store: Path) -> Path:
    return store / "shop" / ".nodes" / ID / "job.json"


def job_of(store: Path) -> Path:
    return store / "shop" / ".staging" / "embedder" / "job.json"


def write(store: Path, **changed: Any) -> None:
    told = {
        "version": __version__,
        "id": ID,
        "entry_point": EmbedderJob.entry_point,
        "job_file": str(job_of(store)),
        "nnodes": 2,
        "nproc_per_node": 1,
        "max_restarts": 0,
        "network": "lo",
        "wait_seconds": 60,
        **changed,
    }
    announcement_of(store).write_text(json.dumps(told))


class _LookedEnoughError(Exception):
    pass


def joined(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The job files that a node would do, of what it finds in three looks."""
    done: list[Path] = []
    looks = iter(range(3))

    def folders() -> list[Path]:
        if next(looks, None) is None:
            raise _LookedEnoughError
        return [store / "shop" / ".nodes"]

    monkeypatch.setattr(nodes, "_take_part", lambda announcement, seat: done.append(announcement.job_file))
    monkeypatch.setattr(nodes, "_LOOK_SECONDS", 0.0)
    with pytest.raises(_LookedEnoughError):
        nodes.join(store, folders)
    return done


def test_a_node_joins_what_its_own_user_announced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(store, monkeypatch) == [job_of(store)]
    assert announcement_of(store).with_name("seat-1").exists()


def test_every_job_has_an_entry_point_that_a_node_takes() -> None:
    jobs = (EmbedderJob, RerankerJob, InferenceJob)
    assert {job.entry_point for job in jobs} == set(get_args(EntryPoint))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"entry_point": "http.server"}, "entry_point: found 'http.server'; Input should be 'embed_pipeline.training"),
        ({"entry_point": "embed_pipeline.launch.agent"}, "entry_point: found 'embed_pipeline.launch.agent'"),
        ({"environment": {"LD_PRELOAD": "/tmp/evil.so"}}, "environment: found .*Extra inputs are not permitted"),
        ({"network": "lo --rdzv-backend=c10d"}, "network: found .* is neither a network"),
        ({"id": "../../../etc"}, "id: found"),
        ({"id": "f" * 12}, "expected its folder's name"),
        ({"nproc_per_node": "1; id"}, "nproc_per_node: found '1; id'"),
        ({"version": "0.0.1"}, "is from embed_pipeline 0.0.1"),
        ({"job_file": "/etc/passwd"}, "/etc/passwd lies outside of"),
        ({"job_file": "/etc/pass\0wd"}, "is no path of a file"),
    ],
)
def test_what_no_job_of_this_package_is_is_refused_once(
    changed: dict[str, Any], told: str, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, **changed)
    assert joined(store, monkeypatch) == []
    (record,) = caplog.records
    assert record.message.startswith(f"not joined: {'' if 'job_file' in changed else announcement_of(store)}")
    assert re.search(told, record.message)


def outside(store: Path) -> None:
    """A link leads from the store to a job that another wrote elsewhere."""
    other = store.parent / "other.json"
    other.write_text("{}")
    job_of(store).unlink()
    job_of(store).symlink_to(other)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (lambda store: job_of(store).chmod(0o666), "has mode 0666, so other users can change"),
        (lambda store: job_of(store).parent.chmod(0o777), "has mode 0777, so other users can change"),
        (lambda store: (store / "shop").chmod(0o777), "has mode 0777, so other users can change"),
        (lambda store: store.chmod(0o1777), "has mode 1777, so other users can change"),
        (lambda store: announcement_of(store).chmod(0o666), "has mode 0666, so other users can change"),
        (lambda store: announcement_of(store).parent.chmod(0o755), "with mode 0755; the processes of a job meet"),
        (outside, "lies outside of"),
        (lambda store: announcement_of(store).write_bytes(pickle.dumps(os.system)), "is not an announcement of a job"),
        (lambda store: announcement_of(store).write_text("[]"), "is not an announcement of a job"),
    ],
)
def test_what_others_could_have_written_is_refused(
    attack: Callable[[Path], object],
    told: str,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attack(store)
    assert joined(store, monkeypatch) == []
    (record,) = caplog.records
    assert told in record.message


@pytest.mark.parametrize("what", [announcement_of, job_of])
def test_what_somebody_else_wrote_is_refused(
    what: Callable[[Path], Path], store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_to_somebody(what(store), monkeypatch)
    assert joined(store, monkeypatch) == []
    (record,) = caplog.records
    assert "belongs to user" in record.message


def test_a_users_own_group_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems give each user a group of its own, and files that it may write."""
    file = tmp_path / "job.json"
    file.write_text("{}")
    gid = 54321 if os.geteuid() == 0 else os.getegid()  # root's own is a group that containers give to anybody
    os.chown(file, -1, gid)
    file.chmod(0o664)
    me = SimpleNamespace(pw_name="me", pw_uid=os.geteuid(), pw_gid=gid)
    eve = SimpleNamespace(pw_name="eve", pw_uid=os.geteuid() + 1, pw_gid=gid)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: me)

    def told(users: list[SimpleNamespace], name: str, members: list[str]) -> None:
        monkeypatch.setattr("pwd.getpwall", lambda: users)
        monkeypatch.setattr("grp.getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
        check_only_ours(file, tmp_path)

    told([me], "me", [])
    for users, name, members in (([me], "staff", []), ([me], "me", ["eve"]), ([me, eve], "me", [])):
        with pytest.raises(TrainingError, match="has mode 0664"):
            told(users, name, members)


def test_an_access_list_may_let_others_write(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text("{}")
    entries = ((1, 6, -1), (2, 6, 12345), (4, 4, -1), (0x10, 6, -1), (0x20, 4, -1))  # user 12345 reads and writes
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", access)
    except OSError as error:
        pytest.skip(f"this file system keeps no access lists: {error}")
    with pytest.raises(TrainingError, match="has an access control list"):
        check_only_ours(file, tmp_path)
