"""The front door: every pipeline under `defs/`, and under the folders that EMBED_PIPELINE_DEFS names."""

import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import dagster as dg

from embed_pipeline.errors import ConfigurationError

# Dagster warns of its own use of a beta parameter, in every process, whenever an asset check is defined.
warnings.filterwarnings("ignore", message="Parameter `execution_type`", category=dg.BetaWarning)


@dg.definitions
def defs() -> dg.Definitions:
    """One Definitions object for all pipelines; an error in any YAML fails here, before any work."""
    shipped = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    outside = [load_folder(folder, f"embed_pipeline_defs_{i}") for i, folder in enumerate(extra_folders())]
    return dg.Definitions.merge(shipped, *outside)


def extra_folders() -> list[Path]:
    """The folders in EMBED_PIPELINE_DEFS, separated as in PATH; each holds `<pipeline>/defs.yaml` folders."""
    folders = [Path(part).absolute() for part in os.environ.get("EMBED_PIPELINE_DEFS", "").split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(
                f"EMBED_PIPELINE_DEFS names {folder}, which is not a folder. "
                "Expected folders that hold <pipeline>/defs.yaml"
            )
    return folders


def load_folder(folder: Path, module_name: str) -> dg.Definitions:
    """The pipelines of a folder outside this package, which Dagster is to know as the module `module_name`."""
    module = ModuleType(module_name)
    module.__path__, module.__file__ = [str(folder)], str(folder / "__init__.py")
    sys.modules[module.__name__] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # as `load_from_defs_folder` does
        tree = dg.ComponentTree.from_module(defs_module=module, project_root=folder).build_defs()
    # A second component tree cannot be merged with that of the project: keep what it defined.
    return dg.Definitions(
        assets=tree.assets,
        asset_checks=tree.asset_checks,
        jobs=tree.jobs,
        schedules=tree.schedules,
        sensors=tree.sensors,
    )
