"""The front door: every pipeline under `defs/`, and under the folders that EMBED_PIPELINE_DEFS names."""

import os
import sys
from pathlib import Path
from types import ModuleType

import dagster as dg

from embed_pipeline.errors import ConfigurationError


@dg.definitions
def defs() -> dg.Definitions:
    """One Definitions object for all pipelines; an error in any YAML fails here, before any work."""
    shipped = dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
    return dg.Definitions.merge(shipped, *(load_folder(folder, f"embed_pipeline_defs_{i}") for i, folder in enumerate(extra_folders())))


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
    module.__path__ = [str(folder)]
    sys.modules[module.__name__] = module
    return dg.ComponentTree.from_module(defs_module=module, project_root=folder).build_defs()
