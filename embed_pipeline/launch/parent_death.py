"""Ties a process to the life of its parent, so that killing the launching process leaves no training behind.

As a program, `python -m embed_pipeline.launch.parent_death COMMAND...` ties itself and becomes COMMAND (exec keeps
the tie), which spares `subprocess` a `preexec_fn`: that one may deadlock when other threads run.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def die_with_parent(sign: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `sign` to this process when the thread that started it ends. Linux only, else no effect."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, sign) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


@functools.cache
def end_with_parent() -> None:
    """Have this process end by SIGTERM when the process that `multiprocessing` started it from is gone; once is enough.

    Does nothing where there is no such parent.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="end_with_parent", daemon=True).start()


if __name__ == "__main__":
    # A shell makes what it starts in the background ignore SIGINT, Dagster then ignores SIGTERM, and exec keeps that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
