"""Several machines with the store in common: one launches a job, the others have been waiting to join it.

The machine where Dagster runs the step puts an announcement into `.nodes` of the pipeline's folder; `embed-pipeline
join` on each of the others takes a seat in it and runs torchrun's agent there. Who sits where, and whether the other
side is still alive, stands in files, and torchrun's agents meet in them: no port is announced, and nothing that comes
over the network is believed. Whoever can write to these files decides what runs, so a node looks at their owner first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embed_pipeline import __version__
from embed_pipeline.errors import TrainingError
from embed_pipeline.launch.heartbeat import Heart, Listener
from embed_pipeline.launch.local import run_local, training_error
from embed_pipeline.launch.network import interface_in
from embed_pipeline.launch.ownership import check_only_ours, check_private, make_private
from embed_pipeline.launch.torchrun import EntryPoint, Rendezvous, torchrun_command
from embed_pipeline.settings import LaunchSettings, Network

logger = logging.getLogger(__name__)

NODES_FOLDER = ".nodes"  # in a pipeline's folder of the store; one folder a job, with the files below
_ANNOUNCEMENT = "job.json"
_LEADER = "leader"
_SEAT = "seat-"
_FAILED = ".failed"  # added to the name of a seat whose node gave up
_LOOK_SECONDS = 1.0
# A node that failed takes the others with it, which tell more than that it did; a collective may wait much longer.
_GRACE_SECONDS = 10.0


class Announcement(BaseModel):
    """What another node needs to know of a job: which of this package's entry points, on which file.

    It holds no environment: a node has its own, and rank 0, which speaks for a job, is on the leading one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    entry_point: EntryPoint
    job_file: Path
    nnodes: int = Field(ge=2)
    nproc_per_node: int = Field(ge=1)
    max_restarts: int = Field(ge=0)
    network: Network
    wait_seconds: int = Field(ge=0)

    def command(self, seats: Path, rank: int) -> list[str]:
        rendezvous = Rendezvous(self.id, seats, self.nnodes, self.network, self.wait_seconds)
        return torchrun_command(
            self.entry_point,
            self.job_file,
            self.nproc_per_node,
            max_restarts=self.max_restarts,
            rendezvous=rendezvous.options(rank),
        )

    def write(self, path: Path) -> None:
        """Whole or not at all, and for its owner alone."""
        partial = path.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps({"version": __version__, **self.model_dump(mode="json")}))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path, store: Path) -> Announcement:
        """Raises OSError when it is gone, TrainingError when this user should not do what it says."""
        check_private(path.parent)
        check_only_ours(path, store)
        try:
            told = json.loads(path.read_bytes())
            version = told.pop("version")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise TrainingError(f"{path} is not an announcement of a job: {error!r}") from error
        if version != __version__:
            raise TrainingError(f"{path} is from embed_pipeline {version}; this is {__version__}. Install the same")
        try:
            announcement = cls.model_validate(told)
        except ValidationError as error:
            raise TrainingError(f"{path} announces what no job is: {_sentence(error)}") from error
        if path.parent.name != announcement.id:
            raise TrainingError(f"{path} has the id {announcement.id}; expected its folder's name")
        check_only_ours(announcement.job_file, store)
        return announcement


def _sentence(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, one['loc']))}: found {str(one['input'])[:200]!r}; {one['msg']}" for one in error.errors()
    )


# ------------------------------------------------------------------------------------------------- leading


def lead(
    folder: Path,
    entry_point: str,
    job_file: Path,
    processes: int,
    launch: LaunchSettings,
    *,
    env: Mapping[str, str],
    on_poll: Callable[[], None],
) -> None:
    """Announce a job in `folder`, be its first node, and return when all nodes are done with it.

    `processes` is their number over all nodes. Raises TrainingError with the first failing rank's cause, whatever node
    it was on; also when too few nodes join, or when one that has joined is not heard of any more.
    """
    assert launch.network is not None
    # The other nodes will look at it in the same way, and this one can say why they would not come.
    check_only_ours(job_file, folder.parent)
    interface_in(launch.network)
    wait_seconds = round(launch.wait_minutes * 60)
    announcement = Announcement(
        id=secrets.token_hex(6),
        entry_point=cast("EntryPoint", entry_point),
        job_file=job_file.absolute(),
        nnodes=launch.nnodes,
        nproc_per_node=processes // launch.nnodes,
        max_restarts=launch.max_restarts,
        network=launch.network,
        wait_seconds=wait_seconds,
    )
    seats = folder.absolute() / announcement.id
    make_private(seats)
    try:
        others = _Others(seats, launch.nnodes - 1, wait_seconds, job_file.with_name("error.json"))
        announcement.write(seats / _ANNOUNCEMENT)
        logger.info(
            "waiting for %d more node(s): `embed-pipeline join` on each, with the same store", launch.nnodes - 1
        )

        def poll() -> None:
            others.look()
            on_poll()

        run_local(announcement.command(seats, 0), env=env, error_file=job_file.with_name("error.json"), on_poll=poll)
    finally:
        # Tells the others that it is over, whether it went well or not.
        shutil.rmtree(seats, ignore_errors=True)


class _Others:
    """The other nodes of a job, as the leading one hears of them."""

    def __init__(self, seats: Path, wanted: int, wait_seconds: float, error_file: Path) -> None:
        self.seats, self.wanted, self.error_file = seats, wanted, error_file
        self.heart = Heart(seats / _LEADER)
        self.listeners: dict[Path, Listener] = {}
        self.deadline = time.monotonic() + wait_seconds
        self.wait_seconds = wait_seconds
        self.failed_at: float | None = None
        self.heart.beat()

    def look(self) -> None:
        """Beat, and hear who is there. Raises TrainingError when a node is lost, or the others did not come."""
        self.heart.beat()
        if self.failed_at is None and any(self.seats.glob(f"*{_FAILED}")):
            self.failed_at = time.monotonic()
        if self.failed_at is not None:
            if time.monotonic() - self.failed_at > _GRACE_SECONDS:
                raise training_error(self.error_file, 1)
            return
        for seat in self.seats.glob(f"{_SEAT}*"):
            if seat not in self.listeners:
                self.listeners[seat] = Listener(seat)
                logger.info("%s of %d is taken", seat.name, self.wanted)
        for seat, listener in self.listeners.items():
            if listener.silent():
                raise TrainingError(
                    f"the node of {seat.name} was not heard of for {listener.seconds:.0f} s: it is down, or does not "
                    "reach the store. Launched again, the job goes on from what was done",
                    passing=True,
                )
        if len(self.listeners) < self.wanted and time.monotonic() > self.deadline:
            raise TrainingError(
                f"{len(self.listeners)} of {self.wanted} other nodes joined within {self.wait_seconds / 60:.0f} "
                "minutes. Run `embed-pipeline join` on each of them, with the same EMBED_PIPELINE_STORE, or raise "
                "launch.wait_minutes"
            )


# ------------------------------------------------------------------------------------------------- joining


def join(store: Path, folders: Callable[[], Iterable[Path]], *, jobs: int | None = None) -> None:
    """Be one more node for what is announced in `folders()` of `store`, job after job; for ever, or for so many `jobs`.

    A job that fails here, or is refused because others could have written it, is told in the log; the next one is
    waited for.
    """
    done = 0
    # What this node has taken part in (whoever leaves a job ends it), and what it refused.
    left: set[Path] = set()
    while jobs is None or done < jobs:
        taken = next(_free_seats(store, folders(), left), None)
        if taken is None:
            time.sleep(_LOOK_SECONDS)
            continue
        announcement, seat = taken
        left.add(seat.parent)
        logger.info("joining %s as %s", announcement.job_file, seat.name)
        try:
            _take_part(announcement, seat)
            logger.info("done with %s", announcement.job_file)
        except TrainingError as error:
            logger.error("%s: %s", announcement.job_file, error)
        except _OverError:
            logger.info("%s has ended", announcement.job_file)
        done += 1


class _OverError(Exception):
    """The job has ended, or its launching process is gone."""


def _free_seats(store: Path, folders: Iterable[Path], left: set[Path]) -> Iterator[tuple[Announcement, Path]]:
    for folder in folders:
        for path in sorted(folder.glob(f"*/{_ANNOUNCEMENT}")):
            if path.parent in left:
                continue
            try:
                announcement = Announcement.read(path, store)
            except OSError:  # it is over
                continue
            except TrainingError as error:
                logger.warning("not joined: %s", error)
                left.add(path.parent)
                continue
            for number in range(1, announcement.nnodes):
                seat = path.with_name(f"{_SEAT}{number}")
                with contextlib.suppress(OSError):  # another has it, or the job is over
                    seat.touch(exist_ok=False)
                    yield announcement, seat
                    return


def _take_part(announcement: Announcement, seat: Path) -> None:
    heart, leader = Heart(seat), Listener(seat.with_name(_LEADER))

    def poll() -> None:
        if leader.silent():
            logger.warning("the launching process was not heard of for %.0f s", leader.seconds)
            shutil.rmtree(seat.parent, ignore_errors=True)
        if not seat.with_name(_ANNOUNCEMENT).exists():
            raise _OverError
        heart.beat()

    try:
        run_local(
            announcement.command(seat.parent, int(seat.name.removeprefix(_SEAT))),
            env={},
            error_file=announcement.job_file.with_name(f"error-{seat.name}.json"),
            on_poll=poll,
        )
    except TrainingError:
        with contextlib.suppress(OSError):
            seat.rename(seat.with_name(seat.name + _FAILED))
        raise
