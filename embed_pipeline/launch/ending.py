"""Ending a process of a training without its destructors.

Two of torch's threads can keep a finished process alive for ever: gloo's process group joins a worker thread that waits
for a peer which is gone already, and an interrupted torchrun joins the threads that follow its workers' logs. Both
were seen once in some hundred runs; a training that hangs after its work is done holds its GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """End this process now, with what it printed, as far as that can be written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that is gone, a closed stream
            stream.flush()
    os._exit(code)


def run_and_leave(main: Callable[[], object]) -> NoReturn:
    """Run a program's `main` and end with its exit code; an exception shows its traceback and gives 1."""
    try:
        main()
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
        leave(1)
    leave()
