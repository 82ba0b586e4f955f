"""Ties a process to the life of its parent, so that killing the launching process leaves no training behind.

As a program, `python -m embed_pipeline.launch.parent_death COMMAND...` ties itself and becomes COMMAND (exec keeps
the tie), which spares `subprocess` a `preexec_fn`: that one may deadlock when other threads run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def die_with_parent(sign: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `sign` to this process when the thread that started it ends. Linux only, else no effect."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, sign) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


if __name__ == "__main__":
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
