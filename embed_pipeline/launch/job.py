"""What whoever launches a job needs to know of it; the rest is for its entry point."""

from __future__ import annotations

from typing import Protocol


class Job(Protocol):
    @property
    def entry_point(self) -> str:
        """The module that torchrun runs, with the job's file as its only argument."""

    @property
    def world_size(self) -> int:
        """Processes that must take part."""
