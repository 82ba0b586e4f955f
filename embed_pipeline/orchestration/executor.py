"""How the steps of a run get their processes: forked from a server that has imported what every step needs.

Dagster starts an interpreter for each step and each check, which imports Dagster and this package and reads every YAML
before it does anything. A server that did so once is forked in a fraction of that time. A step still has a process of
its own: its memory and its GPU are free when it ends, and it can be ended without the run.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

_SERVER = {"forkserver": {"preload_modules": ["embed_pipeline.orchestration.step_server"]}}


@dg.configured(
    dg.multi_or_in_process_executor,
    name="multi_or_in_process_executor",
    config_schema=dg.multi_or_in_process_executor.config_schema.as_field(),
)
def step_executor(config: dict[str, Any]) -> dict[str, Any]:
    """Dagster's default executor with its settings, where `start_method` is a fork server unless a run names one."""
    if "multiprocess" not in config:
        return config
    return {"multiprocess": {"start_method": _SERVER, **config["multiprocess"]}}
