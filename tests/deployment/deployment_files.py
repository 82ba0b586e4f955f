"""The files of `docker/` as Docker would read them: compose files merged and with their variables, images by stage."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
COMPOSE_FILE = DOCKER / "compose.yaml"
GPU_FILE = DOCKER / "compose.gpu.yaml"

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?:(?P<rule>:-|:\?)(?P<text>[^{}]*))?\}")


class MissingVariable(Exception):
    """A `${NAME:?message}` whose variable is unset or empty: compose refuses to start."""


@dataclass(frozen=True)
class Image:
    """One stage of the Dockerfile, with what it inherits from the stages that it is built on."""

    base: str
    instructions: tuple[tuple[str, str], ...]  # (RUN, "pip install ..."), in order, without the options of RUN

    @property
    def environment(self) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for text in self.all("ENV"):
            pairs |= dict(part.split("=", 1) for part in shlex.split(text))
        return pairs

    @property
    def user(self) -> str:
        return self.all("USER")[-1] if self.all("USER") else "root"

    @property
    def start(self) -> list[str]:
        """Entry point and default command."""
        commands = self.all("CMD")
        return [*json.loads(self.all("ENTRYPOINT")[-1]), *(json.loads(commands[-1]) if commands else [])]

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.instructions if name == instruction]

    def expand(self, text: str) -> str:
        """`text` with the image's environment in place of ${NAME}."""
        return re.sub(r"\$\{(\w+)\}", lambda match: self.environment[match[1]], text)


@dataclass(frozen=True)
class Service:
    name: str
    settings: Mapping[str, Any]
    image: Image | None  # None: an image that others built

    @property
    def command(self) -> list[str]:
        """What the container runs, after its image's entry point."""
        given = self.settings.get("command")
        if given is not None:
            return list(given)
        return [] if self.image is None else json.loads(self.image.all("CMD")[-1])

    @property
    def environment(self) -> dict[str, str]:
        """The image's and the service's."""
        return {**(self.image.environment if self.image else {}), **self.settings.get("environment", {})}

    @property
    def published(self) -> list[str]:
        return list(self.settings.get("ports", []))

    @property
    def mounts(self) -> dict[str, str]:
        """Path in the container -> volume or folder of the host."""
        mounts = {}
        for volume in self.settings.get("volumes", []):
            if isinstance(volume, str):
                source, target, *_ = volume.split(":")
                mounts[target] = source
            else:
                mounts[volume["target"]] = volume["source"]
        return mounts


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with compose's ${NAME}, ${NAME:-default} and ${NAME:?message} replaced, innermost first.

    Raises MissingVariable.
    """
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        found = variables.get(match["name"], "")
        if found or match["rule"] is None:
            return found
        if match["rule"] == ":?":
            raise MissingVariable(f"{match['name']}: {match['text']}")
        return match["text"]

    while VARIABLE.search(value):
        value = VARIABLE.sub(replacement, value)
    return value.replace("$$", "$")


def services(variables: Mapping[str, str]) -> dict[str, Service]:
    """The services of compose.yaml with `variables` as .env and shell would give them."""
    settings = interpolate(yaml.safe_load(COMPOSE_FILE.read_text()), variables)
    for service in settings["services"].values():
        # A variable without a value is handed on where it is set, and absent otherwise.
        given = {key: variables.get(key) if value is None else value for key, value in service["environment"].items()}
        service["environment"] = {key: value for key, value in given.items() if value is not None}
    built = images()
    named = {
        service["image"]: built[service["build"]["target"]]
        for service in settings["services"].values()
        if "build" in service
    }
    return {name: Service(name, service, named.get(service["image"])) for name, service in settings["services"].items()}


def images() -> dict[str, Image]:
    """Stage name -> image."""
    stages: dict[str, Image] = {}
    name = ""
    for instruction, text in instructions((DOCKER / "Dockerfile").read_text()):
        if instruction != "FROM":
            stages[name] = Image(stages[name].base, (*stages[name].instructions, (instruction, text)))
            continue
        base, name = re.split(r" +AS +", text)
        inherited = stages.get(base)
        stages[name] = Image(inherited.base, inherited.instructions) if inherited else Image(base, ())
    return stages


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, its text on one line) in order, without comments."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, text.strip()) for name, _, text in (line.partition(" ") for line in joined.splitlines())]
