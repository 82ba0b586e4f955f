"""What Dagster's UI asks of its webserver, over the same GraphQL."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

LOCATION = {"repositoryLocationName": "embed_pipeline", "repositoryName": "__repository__"}
FINISHED = ("SUCCESS", "FAILURE", "CANCELED")


@dataclass(frozen=True)
class Webserver:
    address: str

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            told = json.load(answer)
        assert "errors" not in told, told["errors"]
        return dict(told["data"])

    def launch(self, job: str, assets: Sequence[str] = (), config: Mapping[str, Any] | None = None) -> str:
        """Launch a job, or some of its assets ("pipeline/asset"), as the UI's button does; returns the run's id."""
        selector: dict[str, Any] = {**LOCATION, "pipelineName": job}
        if assets:
            selector["assetSelection"] = [{"path": asset.split("/")} for asset in assets]
        told = self.ask(
            """mutation ($parameters: ExecutionParams!) {
                launchPipelineExecution(executionParams: $parameters) {
                    __typename
                    ... on LaunchRunSuccess { run { runId } }
                    ... on RunConfigValidationInvalid { errors { message } }
                    ... on Error { message }
                }
            }""",
            parameters={"selector": selector, "mode": "default", "runConfigData": json.dumps(config or {})},
        )["launchPipelineExecution"]
        assert "run" in told, told
        return str(told["run"]["runId"])

    def reload(self) -> str:
        """Load the code location's definitions again, as the UI's button does; returns what hindered it, or nothing."""
        told = self.ask(
            """mutation {
                reloadRepositoryLocation(repositoryLocationName: "embed_pipeline") {
                    ... on WorkspaceLocationEntry {
                        locationOrLoadError { ... on PythonError { message causes { message } } }
                    }
                    ... on Error { message }
                }
            }"""
        )["reloadRepositoryLocation"]
        problem = told.get("locationOrLoadError", told)
        return "\n".join([problem["message"], *(cause["message"] for cause in problem["causes"])]) if problem else ""

    def terminate(self, run_id: str) -> None:
        told = self.ask(
            "mutation ($id: String!) { terminateRun(runId: $id) { __typename ... on Error { message } } }", id=run_id
        )
        assert told["terminateRun"]["__typename"] == "TerminateRunSuccess", told

    def runs(self) -> list[dict[str, Any]]:
        """Every run, the newest first: `runId`, `status`, `jobName`, and `tags` as a mapping."""
        told = self.ask("{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }")
        return [
            {**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in told["runsOrError"]["results"]
        ]

    def status(self, run_id: str) -> str:
        return str(next(run["status"] for run in self.runs() if run["runId"] == run_id))

    def wait_until_finished(self, run_id: str, seconds: float) -> str:
        """The status with which the run ended."""
        return wait_for(lambda: status if (status := self.status(run_id)) in FINISHED else None, seconds)

    def events(self, run_id: str) -> list[dict[str, Any]]:
        told = self.ask(
            """query ($id: ID!) {
                logsForRun(runId: $id) {
                    ... on EventConnection {
                        events {
                            __typename
                            ... on MessageEvent { message stepKey }
                            ... on LogsCapturedEvent { fileKey }
                        }
                    }
                }
            }""",
            id=run_id,
        )
        return list(told["logsForRun"]["events"])

    def told(self, run_id: str) -> str:
        """The messages of a run, for a failing test."""
        return "\n".join(event.get("message") or "" for event in self.events(run_id))[-6000:]

    def output(self, run_id: str) -> str:
        """What the steps of a run printed, as the UI shows it."""
        keys = [event["fileKey"] for event in self.events(run_id) if event["__typename"] == "LogsCapturedEvent"]
        query = "query ($key: [String!]!) { capturedLogs(logKey: $key) { stdout stderr } }"
        captured = [self.ask(query, key=[run_id, "compute_logs", key])["capturedLogs"] for key in keys]
        return "\n".join(f"{part['stdout'] or ''}\n{part['stderr'] or ''}" for part in captured)


def wait_for(condition: Any, seconds: float) -> Any:
    """The first value of `condition()` that is not None or False."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.5)
    raise TimeoutError(f"not within {seconds} s")
