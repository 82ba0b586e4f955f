"""torchrun on one node: `python -m embed_pipeline.launch.agent TORCHRUN_ARGUMENTS`.

More than torchrun itself, it tells of a rank that a signal ended: such a rank (out of memory, most often) leaves no
error file, and torchrun then reports a victim that lost its connection, or nothing. Its processes meet in files
(`launch.rendezvous`), by default of a folder of its own, and talk over the network that is named, by default loopback.
Among several nodes it ends when whoever launched it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from embed_pipeline.errors import TrainingError
from embed_pipeline.launch import rendezvous  # noqa: F401  (torchrun finds it by its name)
from embed_pipeline.launch.ending import run_and_leave
from embed_pipeline.launch.environment import keep_to_job_environment
from embed_pipeline.launch.heartbeat import BEAT_SECONDS, HEARTBEAT_VARIABLE, Listener
from embed_pipeline.launch.local import ERROR_FILE_VARIABLE, leave_error, meaning_of, minutes_waited


def main(arguments: list[str]) -> None:
    """torchrun's main. Raises what it raises, with the killed rank in TORCHELASTIC_ERROR_FILE if there is one."""
    keep_to_job_environment()
    os.environ["PYTHONSAFEPATH"] = "1"  # for the ranks, what `torchrun.PYTHON` is for this process
    if HEARTBEAT_VARIABLE in os.environ:
        _end_in_silence(Path(os.environ[HEARTBEAT_VARIABLE]))
    try:
        with tempfile.TemporaryDirectory(prefix="embed_pipeline-", ignore_cleanup_errors=True) as own:
            # The last of two wins, so what the arguments say stands.
            run.main([f"--rdzv-endpoint={own}", *arguments])
    except TrainingError as error:
        if ERROR_FILE_VARIABLE in os.environ:
            leave_error(f"TrainingError: {error}", 0)
        raise
    except ChildFailedError as error:
        # SIGTERM is what torchrun itself sends to the others.
        killed = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        }
        # One that hung was killed as well, after the others had given up waiting for it.
        gave_up = any(minutes_waited(str(failure.message)) for failure in error.failures.values())
        if killed and not gave_up and ERROR_FILE_VARIABLE in os.environ:
            rank, exit_code = min(killed.items())
            leave_error(f"rank {rank} was ended {meaning_of(exit_code)}", exit_code)
        raise


def _end_in_silence(heart: Path) -> None:
    listener = Listener(heart)

    def listen() -> None:
        while not listener.silent():
            threading.Event().wait(BEAT_SECONDS)
        print(f"nothing was heard of the launching process for {listener.seconds:.0f} s: ending", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, name="end_in_silence", daemon=True).start()


if __name__ == "__main__":
    run_and_leave(lambda: main(sys.argv[1:]))
