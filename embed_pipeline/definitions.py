"""The front door: every pipeline under `defs/`, and under the folders that EMBED_PIPELINE_DEFS names.

A YAML that is broken does not take the other pipelines down: `orchestration.broken` stands for its pipeline. Only
`dg check defs` and `dagster definitions validate` fail, with every reason.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import dagster as dg

from embed_pipeline.artifacts import local_folder
from embed_pipeline.errors import ConfigurationError
from embed_pipeline.orchestration.broken import Broken, placeholder
from embed_pipeline.orchestration.executor import step_executor
from embed_pipeline.pipeline_file import (
    Document,
    children_of,
    file_in,
    files_below,
    links_back,
    read_documents,
    same_names,
)

# Dagster warns of its own use of a beta parameter, in every process, whenever an asset check is defined.
warnings.filterwarnings("ignore", message="Parameter `execution_type`", category=dg.BetaWarning)

SHIPPED = Path(__file__).parent / "defs"
_VALIDATING = "DAGSTER_IS_DEFS_VALIDATION_CLI"  # Dagster sets it where definitions are only checked
logger = logging.getLogger(__name__)
_kept: dg.Definitions | None = None


@dg.definitions
def defs() -> dg.Definitions:
    """One Definitions object for all pipelines; raises ConfigurationError for broken ones where they are checked."""
    return _kept if _kept is not None else _all_pipelines()


def keep() -> None:
    """Load now: `defs` gives the same in this process, and in those that are forked from it, from here on."""
    global _kept
    _kept = _all_pipelines()


def _all_pipelines() -> dg.Definitions:
    folders = extra_folders()
    loaded = _load([SHIPPED, *(folder for folder in folders if folder.is_dir())])
    missing = [
        Broken(
            folder,
            f"EMBED_PIPELINE_DEFS names {folder}, which is not a folder. Expected folders that hold "
            "<pipeline>/defs.yaml",
        )
        for folder in folders
        if not folder.is_dir()
    ]
    broken = [*missing, *loaded.broken]
    if broken and os.environ.get(_VALIDATING):
        raise ConfigurationError("\n".join(one.reason for one in broken))
    taken = list(loaded.pipelines)
    parts = list(loaded.parts)
    for one in broken:
        logger.error("a pipeline cannot be loaded; the others can. %s", one.reason)
        taken.append(one.name(taken))
        parts.append(placeholder(one, taken[-1]))
    executors = [] if any(part.executor for part in parts) else [dg.Definitions(executor=step_executor)]
    return dg.Definitions.merge(*parts, *executors)


def extra_folders() -> list[Path]:
    """The folders in EMBED_PIPELINE_DEFS, separated as in PATH; each holds `<pipeline>/defs.yaml` folders."""
    given = [part for part in os.environ.get("EMBED_PIPELINE_DEFS", "").split(os.pathsep) if part.strip()]
    folders = [local_folder(part.strip(), "EMBED_PIPELINE_DEFS") for part in given]
    return list({folder.resolve(): folder for folder in folders}.values())  # one that is named twice is one


def load_folder(folder: Path, module_name: str) -> dg.Definitions:
    """The pipelines of a folder outside this package, which Dagster is to know as the module `module_name`.

    Raises ConfigurationError with the reason of each one that is broken.
    """
    loaded = _load([folder], names={folder: module_name})
    if loaded.broken:
        raise ConfigurationError("\n".join(one.reason for one in loaded.broken))
    return dg.Definitions.merge(*loaded.parts)


@dataclass(frozen=True)
class _Loaded:
    parts: list[dg.Definitions]
    broken: list[Broken]
    pipelines: list[str]  # the names of those that were loaded


def _load(folders: list[Path], names: Mapping[Path, str] | None = None) -> _Loaded:
    files = [file for folder in folders for file in files_below(folder)]
    read: dict[Path, list[Document]] = {}
    problems: dict[Path, str] = {}
    for file in files:
        try:
            read[file] = read_documents(file)
        except Exception as error:  # also one that nobody foresaw: it is this file's alone
            problems[file] = Broken.by(file, error).reason
    problems |= same_names(read)
    problems |= {
        link: f"{link} is a link to {link.resolve()}, which it lies in, so the search for pipelines would never end. "
        "Remove the link"
        for folder in folders
        for link in links_back(folder)
    }
    loaded = _Loaded([], [Broken(file, reason) for file, reason in sorted(problems.items())], [])
    for number, folder in enumerate(folders):
        if not _holds_definitions(folder):
            logger.warning("no pipeline in %s: it holds no <pipeline>/defs.yaml", folder)
        name = (names or {}).get(folder, f"embed_pipeline_defs_{number}")
        _load_around(folder, name, problems, loaded, _project if folder == SHIPPED else None)
    broken = {one.file for one in loaded.broken}
    for file, documents in read.items():
        if file not in broken:
            loaded.pipelines.extend(document.name for document in documents if document.name)
    return loaded


def _load_around(
    folder: Path,
    module_name: str,
    problems: Mapping[Path, str],
    loaded: _Loaded,
    whole: Callable[[], dg.Definitions] | None = None,
) -> None:
    """Load `folder` as Dagster does; where something below is broken, load what lies beside it, one by one."""
    own = file_in(folder)
    if own in problems or not _holds_definitions(folder):
        return
    if not any(file.is_relative_to(folder) for file in problems):
        try:
            loaded.parts.append(whole() if whole else _tree(folder, module_name))
            return
        except (Exception, SystemExit) as error:  # Python beside a pipeline may call sys.exit
            if own is not None or not any(_holds_definitions(child) for child in children_of(folder)):
                loaded.broken.append(Broken.by(own or folder, error))
                return
    for child in children_of(folder):
        name = f"{module_name}.{child.stem.replace('.', '_')}"
        if child.is_dir():
            _load_around(child, name, problems, loaded)
        elif child.suffix == ".py":
            _load_python(child, name, loaded)


def _load_python(file: Path, module_name: str, loaded: _Loaded) -> None:
    """The definitions of a Python file that lies beside a broken pipeline."""
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        loaded.parts.append(dg.load_definitions_from_module(module))
    except (Exception, SystemExit) as error:
        loaded.broken.append(Broken.by(file, error))


def _holds_definitions(place: Path) -> bool:
    """Whether Dagster finds anything to load there: a component's YAML or a Python file."""
    if not place.is_dir():
        return place.suffix == ".py"
    return file_in(place) is not None or any(_holds_definitions(child) for child in children_of(place))


def _project() -> dg.Definitions:
    """The shipped pipelines, as those of a project that `dg` knows."""
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)


def _tree(folder: Path, module_name: str) -> dg.Definitions:
    module = ModuleType(module_name)
    module.__path__, module.__file__ = [str(folder)], str(folder / "__init__.py")
    sys.modules[module.__name__] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # as `load_from_defs_folder` does
        # From the folder down: the description of every component type, for the UI, comes with the shipped pipelines.
        tree = dg.ComponentTree.from_module(defs_module=module, project_root=folder).build_defs_at_path(folder)
    # A second component tree cannot be merged with that of the project: keep what it defined.
    return dg.Definitions(
        assets=tree.assets,
        asset_checks=tree.asset_checks,
        jobs=tree.jobs,
        schedules=tree.schedules,
        sensors=tree.sensors,
    )
