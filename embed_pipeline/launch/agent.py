"""torchrun, which also tells of a rank that a signal ended: `python -m embed_pipeline.launch.agent TORCHRUN_ARGUMENTS`.

Such a rank (out of memory, most often) leaves no error file, and torchrun then reports a victim that lost its
connection, or nothing.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from embed_pipeline.launch.ending import run_and_leave
from embed_pipeline.launch.local import meaning_of, minutes_waited


def main() -> None:
    """torchrun's main. Raises what it raises, with the killed rank in TORCHELASTIC_ERROR_FILE if there is one."""
    try:
        run.main()
    except ChildFailedError as error:
        # SIGTERM is what torchrun itself sends to the others.
        killed = {
            rank: failure.exitcode
            for rank, failure in error.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        }
        # One that hung was killed as well, after the others had given up waiting for it.
        gave_up = any(minutes_waited(str(failure.message)) for failure in error.failures.values())
        if killed and not gave_up and "TORCHELASTIC_ERROR_FILE" in os.environ:
            rank, exit_code = min(killed.items())
            message = {"message": f"rank {rank} was ended {meaning_of(exit_code)}", "exit_code": exit_code}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(message))
        raise


if __name__ == "__main__":
    run_and_leave(main)
