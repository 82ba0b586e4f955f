"""The files of `docker/` are well formed, safe, and agree with each other and with the project."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from embed_pipeline.launch.local import TERMINATE_SECONDS
from tests.deployment.deployment_files import (
    COMPOSE_FILE,
    DOCKER,
    GPU_FILE,
    REPOSITORY,
    VARIABLE,
    Image,
    MissingVariable,
    Service,
    images,
    instructions,
    services,
)
from tests.deployment.started_services import seconds

SECRETS = ("POSTGRES_PASSWORD", "DAGSTER_POSTGRES_PASSWORD", "MLFLOW_POSTGRES_PASSWORD")
GIVEN = {name: f"the {name}" for name in (*SECRETS, "PIPELINES_FOLDER")}
TARGETS = ("code", "dagster", "mlflow")
OURS = ("code", "daemon", "mlflow", "webserver")


@pytest.fixture(scope="module")
def composed() -> dict[str, Service]:
    return services(GIVEN)


@pytest.fixture(scope="module")
def built() -> dict[str, Image]:
    return images()


def read_yaml(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def tool(*command: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(str(command[0]))
    return subprocess.run([program, *command[1:]], cwd=REPOSITORY, capture_output=True, text=True)


def environment_names(value: Any) -> set[str]:
    """Every NAME of an `{env: NAME}` in a Dagster file."""
    if isinstance(value, dict):
        if set(value) == {"env"}:
            return {value["env"]}
        return set().union(*(environment_names(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(environment_names(item) for item in value))
    return set()


# ------------------------------------------------------------------------------------------ well formed


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    done = tool("hadolint", "--failure-threshold", "info", "docker/Dockerfile")

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [COMPOSE_FILE, GPU_FILE], ids=lambda path: path.name)
def test_compose_files_follow_the_compose_specification(path: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)

    assert done.returncode == 0, done.stdout


def test_scripts_are_shell() -> None:
    for interpreter, script in (("bash", "postgres/create_databases.sh"), ("sh", "code_location.sh")):
        done = subprocess.run([interpreter, "-n", DOCKER / script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------ the images


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_an_ordinary_user_under_tini(built: dict[str, Image], target: str) -> None:
    image = built[target]

    made = re.search(r"useradd --uid (\d+)", " ".join(image.all("RUN")))
    assert made is not None
    assert image.user == made[1] != "0"
    assert image.instructions.index(("USER", image.user)) > max(
        number for number, (name, _) in enumerate(image.instructions) if name in ("RUN", "COPY")
    )
    assert image.start[0] == "tini"
    assert "--no-install-recommends tini" in image.all("RUN")[0] or " tini " in image.all("RUN")[0]


def test_a_stop_reaches_the_runs_of_the_code_location(built: dict[str, Image]) -> None:
    assert built["code"].start[:3] == ["tini", "-g", "--"]
    assert "setsid" not in (DOCKER / "code_location.sh").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_starts_from_an_exact_version(built: dict[str, Image], target: str) -> None:
    name, _, tag = built[target].base.partition(":")

    assert name in ("python", "nvidia/cuda")
    assert re.search(r"\d+\.\d+\.\d+", tag), tag


def test_the_python_is_the_one_that_the_versions_are_tested_with(built: dict[str, Image]) -> None:
    tested = re.search(r"Python (\d+\.\d+)", (REPOSITORY / "constraints.txt").read_text())
    assert tested is not None
    assert built["slim"].base.startswith(f"python:{tested[1]}.")
    assert "--from=slim /usr/local /usr/local" in built["code"].all("COPY")


def test_cuda_is_the_version_that_torch_brings(built: dict[str, Image]) -> None:
    pinned = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", (REPOSITORY / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert re.match(rf"nvidia/cuda:{re.escape(pinned[1])}\.\d+-runtime-", built["code"].base)


def test_a_change_of_code_installs_nothing_again(built: dict[str, Image]) -> None:
    steps = [f"{name} {text}" for name, text in built["code"].instructions]
    expected = (
        r"COPY constraints",
        r"pip install .*constraints\.txt torch$",
        r"COPY pyproject",
        r"pip install .*\[",
        r"COPY embed_pipeline",
    )
    order = [next(n for n, step in enumerate(steps) if re.search(pattern, step)) for pattern in expected]

    assert order == sorted(order)
    assert not [step for step in steps[order[-1] :] if "pip install" in step]


@pytest.mark.parametrize("target", TARGETS)
def test_everything_is_installed_in_its_tested_version(built: dict[str, Image], target: str) -> None:
    installs = [text for text in built[target].all("RUN") if "pip install" in text]

    assert installs
    assert all("--constraint" in text for text in installs)


def test_extras_of_the_image_are_those_of_the_package(built: dict[str, Image]) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert ".[${EXTRAS}]" in " ".join(built["code"].all("RUN"))
    asked = re.search(r"^ARG EXTRAS=([\w,]+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert asked is not None
    assert set(asked[1].split(",")) == {"demo", "deploy"} <= set(extras)
    assert f"EXTRAS:-{asked[1]}" in (DOCKER / "compose.yaml").read_text()
    for requirement in (*extras["deploy"], *extras["export"]):
        assert f"\n{re.split('[<>=]', requirement)[0]}==" in (REPOSITORY / "constraints.txt").read_text()


def test_what_the_dockerfile_copies_is_in_the_build_context() -> None:
    allowed = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = {
        source
        for name, text in instructions((DOCKER / "Dockerfile").read_text())
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    }
    mounted = set(re.findall(r"type=bind,source=([\w./]+)", (DOCKER / "Dockerfile").read_text()))

    assert copied | mounted == set(allowed)
    assert all((REPOSITORY / path).exists() for path in allowed)


# ------------------------------------------------------------------------------------------ the services


def test_services_are_the_deployment(composed: dict[str, Service]) -> None:
    assert set(composed) == {"postgres", *OURS}


@pytest.mark.parametrize("missing", [*SECRETS, "PIPELINES_FOLDER"])
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_compose_refuses_to_start_without(missing: str, how: str) -> None:
    given = {name: value for name, value in GIVEN.items() if name != missing} | (
        {missing: ""} if how == "empty" else {}
    )

    with pytest.raises(MissingVariable, match=missing):
        services(given)


def test_no_secret_is_written_down() -> None:
    for path in (COMPOSE_FILE, GPU_FILE, DOCKER / ".env.example", DOCKER / "Dockerfile", DOCKER / "dagster.yaml"):
        for line in path.read_text().splitlines():
            given = re.search(r"(?:PASSWORD|TOKEN)\"?[:=] *([^\s#]+)", line)
            assert given is None or given[1].startswith(("${", '"${')), f"{path.name}: {line}"


def test_every_variable_of_the_compose_files_is_in_the_example_of_env(composed: dict[str, Service]) -> None:
    read = COMPOSE_FILE.read_text() + GPU_FILE.read_text()
    used = set()
    while found := VARIABLE.search(read):
        used.add(found["name"])
        read = read[: found.start()] + (found["text"] or "") + read[found.end() :]
    handed_on = {
        name
        for service in read_yaml(COMPOSE_FILE)["services"].values()
        for name, value in service["environment"].items()
        if value is None
    }
    example = set(re.findall(r"^#?([A-Z_]+)=", (DOCKER / ".env.example").read_text(), re.M))

    assert example - {"COMPOSE_FILE"} == used | handed_on
    assert "HF_TOKEN" in handed_on  # absent, not empty, where there is none


def test_the_example_of_env_leaves_every_secret_to_be_filled_in() -> None:
    lines = (DOCKER / ".env.example").read_text().splitlines()

    assert {f"{name}=" for name in (*SECRETS, "PIPELINES_FOLDER")} <= set(lines)
    (files,) = [line.removeprefix("COMPOSE_FILE=") for line in lines if line.startswith("COMPOSE_FILE=")]
    assert [DOCKER / name for name in files.split(":")] == [COMPOSE_FILE, GPU_FILE]


def test_published_ports_are_on_loopback_and_the_images_own(composed: dict[str, Service]) -> None:
    for service in composed.values():
        for published in service.published:
            address, _, inside = published.split(":")
            assert address == "127.0.0.1"
            assert service.image is not None
            assert service.image.all("EXPOSE") == [inside]
            assert inside in " ".join(service.command)
    assert {name for name, service in composed.items() if service.published} == {"mlflow", "webserver"}


def test_every_service_can_be_asked_for_its_health(composed: dict[str, Service]) -> None:
    for service in composed.values():
        check = service.settings["healthcheck"]
        assert check["test"][0] == "CMD"
        assert seconds(check["timeout"]) <= seconds(check["interval"]) or service.name == "code"
        assert service.settings["restart"] == "unless-stopped"
    for name in ("mlflow", "webserver"):
        (port,) = composed[name].image.all("EXPOSE")  # type: ignore[union-attr]
        assert f"127.0.0.1:{port}/" in composed[name].settings["healthcheck"]["test"][-1]


def test_services_wait_for_what_they_need(composed: dict[str, Service]) -> None:
    needs = {name: service.settings.get("depends_on", {}) for name, service in composed.items()}

    assert {name: set(needed) for name, needed in needs.items()} == {
        "postgres": set(),
        "mlflow": {"postgres"},
        "code": {"postgres", "mlflow"},  # which thereby outlive it, and hear how a run ended
        "webserver": {"postgres", "code"},
        "daemon": {"postgres", "code"},
    }
    assert all(how["condition"] == "service_healthy" for needed in needs.values() for how in needed.values())
    assert needs["daemon"]["code"]["restart"] is True


def test_our_services_hold_no_privileges(composed: dict[str, Service]) -> None:
    for name in OURS:
        settings = composed[name].settings
        assert settings["cap_drop"] == ["ALL"]
        assert settings["security_opt"] == ["no-new-privileges:true"]
        assert not settings.get("privileged")
        assert "docker.sock" not in str(settings)


def test_a_training_has_time_to_end_in_order(composed: dict[str, Service]) -> None:
    assert seconds(composed["code"].settings["stop_grace_period"]) >= 4 * TERMINATE_SECONDS


def test_the_code_location_listens_where_the_others_look(composed: dict[str, Service], built: dict[str, Image]) -> None:
    (grpc,) = read_yaml(DOCKER / "workspace.yaml")["load_from"]
    server = grpc["grpc_server"]
    command = composed["code"].command
    options = dict(zip(command[5::2], command[6::2], strict=True))

    assert command[2:5] == ["dagster", "code-server", "start"]
    assert options["--location-name"] == server["location_name"] == "embed_pipeline"
    assert f"abandoned {server['location_name']} " in (DOCKER / "code_location.sh").read_text()
    assert [options["--port"]] == built["code"].all("EXPOSE")
    assert composed["code"].settings["healthcheck"]["test"][-2:] == ["--port", options["--port"]]
    for name in ("webserver", "daemon"):
        environment = composed[name].environment
        assert environment[server["host"]["env"]] == "code"
        assert environment[server["port"]["env"]] == options["--port"]
        assert composed[name].command[-1] == "workspace.yaml"
    assert composed["code"].environment["CODE_LOCATION_PORT"] == options["--port"]


@pytest.mark.parametrize("service", ["code", "daemon", "webserver"])
def test_every_variable_that_dagster_reads_is_set(composed: dict[str, Service], service: str) -> None:
    read = environment_names(read_yaml(DOCKER / "dagster.yaml"))

    assert "DAGSTER_POSTGRES_PASSWORD" in read
    assert read <= set(composed[service].environment)
    assert composed[service].environment["DAGSTER_POSTGRES_HOST"] == "postgres"


def test_databases_are_made_with_the_names_and_passwords_that_services_use(composed: dict[str, Service]) -> None:
    made = dict(
        re.findall(r'^create_database (\w+) "\$(\w+)"$', (DOCKER / "postgres/create_databases.sh").read_text(), re.M)
    )
    postgres, code, mlflow = (composed[name].environment for name in ("postgres", "code", "mlflow"))

    assert set(made.values()) <= set(postgres)
    assert code["DAGSTER_POSTGRES_USER"] == code["DAGSTER_POSTGRES_DB"] == "dagster"
    assert code["DAGSTER_POSTGRES_PASSWORD"] == postgres[made["dagster"]]
    assert mlflow["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
    assert mlflow["PGPASSWORD"] == postgres[made["mlflow"]]


def test_the_code_location_reaches_mlflow_and_so_does_a_person(composed: dict[str, Service]) -> None:
    code, mlflow = composed["code"].environment, composed["mlflow"]
    (allowed,) = [word.partition("=")[2].split(",") for word in mlflow.command if word.startswith("--allowed-hosts")]
    (published,) = mlflow.published

    assert code["MLFLOW_TRACKING_URI"] == f"http://{allowed[0]}" == "http://mlflow:5000"
    assert code["MLFLOW_UI_URL"] == f"http://{published.rpartition(':')[0]}"
    moved = services({**GIVEN, "MLFLOW_PORT": "5050"})
    assert moved["code"].environment["MLFLOW_UI_URL"] == "http://127.0.0.1:5050"
    assert moved["mlflow"].published == ["127.0.0.1:5050:5000"]


def test_what_must_last_lies_on_volumes_that_the_images_user_may_write(
    composed: dict[str, Service], built: dict[str, Image]
) -> None:
    declared = set(read_yaml(COMPOSE_FILE)["volumes"])
    used = set()
    for name in OURS:
        image = composed[name].image
        assert image is not None
        owned = {
            image.expand(folder)
            for text in image.all("RUN")
            if (found := re.search(r"install --directory --owner=pipeline --group=pipeline (.*)", text))
            for folder in found[1].split()
        }
        for inside, source in composed[name].mounts.items():
            if source != GIVEN["PIPELINES_FOLDER"]:
                assert inside in owned, f"{name}: {inside}"
                used.add(source)
    assert declared == used | {"postgres"}

    environment = composed["code"].environment
    for variable in ("EMBED_PIPELINE_STORE", "RAW_DATA", "HF_HOME", "DAGSTER_COMPUTE_LOGS"):
        assert environment[variable] in composed["code"].mounts
    artifacts = next(word for word in composed["mlflow"].command if word.startswith("--artifacts-destination="))
    assert artifacts.partition("=")[2] in composed["mlflow"].mounts


def test_the_webserver_reads_what_the_runs_print(composed: dict[str, Service]) -> None:
    logs = composed["code"].environment["DAGSTER_COMPUTE_LOGS"]

    assert composed["webserver"].environment["DAGSTER_COMPUTE_LOGS"] == logs
    assert composed["webserver"].mounts[logs] == composed["code"].mounts[logs] == "compute_logs"


def test_pipelines_are_the_hosts_folder_and_read_only(composed: dict[str, Service]) -> None:
    (bind,) = [volume for volume in composed["code"].settings["volumes"] if isinstance(volume, dict)]

    assert bind["source"] == GIVEN["PIPELINES_FOLDER"]
    assert bind["target"] == composed["code"].environment["EMBED_PIPELINE_DEFS"]
    assert bind["read_only"] is True
    assert bind["bind"] == {"create_host_path": False}  # a misspelt folder is an error, not an empty one


def test_the_gpu_file_adds_gpus_to_the_code_location_alone() -> None:
    (name, settings), *others = read_yaml(GPU_FILE)["services"].items()

    assert not others
    assert name == "code"
    (device,) = settings["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


# ------------------------------------------------------------------------------------------ with the project


def test_the_deployed_instance_is_that_of_one_machine_but_for_its_storage() -> None:
    deployed, one_machine = read_yaml(DOCKER / "dagster.yaml"), read_yaml(REPOSITORY / "dagster_home/dagster.yaml")

    assert {key: deployed.get(key) for key in one_machine} == one_machine
    assert set(deployed) - set(one_machine) <= {"storage", "compute_logs", "run_queue", "retention"}


def test_the_demo_and_the_packages_it_needs_are_in_the_image(built: dict[str, Image]) -> None:
    assert "chown pipeline:pipeline embed_pipeline/defs/demo" in built["code"].all("RUN")
    assert json.loads(built["code"].all("CMD")[-1])[-1] == "embed_pipeline.definitions"


def test_commands_of_the_readme_name_what_there_is(composed: dict[str, Service]) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    lines = [line for line in readme.splitlines() if "docker compose" in line]

    assert lines
    for line in lines:
        for service in re.findall(
            r"docker compose (?:exec|logs|run|restart|stop) (?:-\S+ (?:[A-Z_]+=\S+ )?)*(\w+)", line
        ):
            assert service in composed, line
    example = (DOCKER / ".env.example").read_text()
    section = readme[readme.index("## Deploy") :]
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", section[: section.index("\n## ", 1)]):
        assert name in example or name in COMPOSE_FILE.read_text() or name in (DOCKER / "Dockerfile").read_text(), name
