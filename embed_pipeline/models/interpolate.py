"""A model between two others: their weights interpolated tensor by tensor.

WiSE-FT (arXiv 2109.01903) for image models, LM-Cocktail (arXiv 2311.13534) for embedders: between a base and what was
fine-tuned from it there are models that keep most of the gain and most of what the base could do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from embed_pipeline.errors import ModelError
from embed_pipeline.models.embedder import load_sentence_transformer
from embed_pipeline.settings import EncodingSettings

WEIGHTS = "*.safetensors"


def save_as_trained(base: Path, encoding: EncodingSettings, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write a base model as a training saves what it made of it: the same files, tensor names and shards, float32.

    So whatever a base looks like (torch's own format, a prefix before every name, a head that no embedder has, half
    precision, no modules of sentence-transformers), `interpolate` finds its tensors.
    """
    model = load_sentence_transformer(base, encoding, device="cpu", trust_remote_code=trust_remote_code)
    model.float().save_pretrained(str(out), create_model_card=False)


def interpolate(base: Path, fine_tuned: Path, coefficient: float, out: Path) -> None:
    """Write a model folder with the weights (1 - coefficient) * base + coefficient * fine_tuned.

    The sums are float32; every file that holds no weights, and every tensor that is no floating-point number, is the
    fine-tuned model's. 1 gives its very files, 0 the base's weights. Both folders hold safetensors, in one file or in
    shards; one file is in memory at a time. `out` must not be there yet.

    Raises ModelError, before anything is written, naming the first tensor that one of them lacks or that has another
    shape.
    """
    if not 0.0 <= coefficient <= 1.0:
        raise ValueError(f"a coefficient from 0 to 1 is expected, found {coefficient}")
    of_base, of_fine_tuned = _tensors(base), _tensors(fine_tuned)
    _refuse_different(base, of_base, fine_tuned, of_fine_tuned)
    for path in sorted(fine_tuned.rglob("*")):
        target = out / path.relative_to(fine_tuned)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and coefficient < 1.0:
            _interpolate_file(path, fine_tuned, of_base, coefficient, target)
        else:
            shutil.copy2(path, target)


# (folder of the module, name of the tensor) -> file it stands in
_Tensors = dict[tuple[str, str], Path]


def _tensors(folder: Path) -> _Tensors:
    found: _Tensors = {}
    for path in sorted(folder.rglob(WEIGHTS)):
        module = path.parent.relative_to(folder).as_posix()
        with safe_open(path, framework="pt") as file:
            found |= {(module, name): path for name in file.keys()}  # noqa: SIM118 (no mapping)
    if not found:
        raise ModelError(
            f"no weights to interpolate in {folder}: expected {WEIGHTS}. Save the model with sentence-transformers, "
            "which writes them"
        )
    return found


def _refuse_different(base: Path, of_base: _Tensors, fine_tuned: Path, of_fine_tuned: _Tensors) -> None:
    advice = "Only a model and what was fine-tuned from it can be merged"
    for (module, name), _ in sorted((of_base | of_fine_tuned).items()):
        for folder, tensors in ((base, of_base), (fine_tuned, of_fine_tuned)):
            if (module, name) not in tensors:
                other = fine_tuned if folder is base else base
                raise ModelError(f"{other} has the tensor {_title(module, name)}, {folder} has not. {advice}")
        shapes = [_shape(tensors[module, name], name) for tensors in (of_base, of_fine_tuned)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"the tensor {_title(module, name)} has the shape {shapes[0]} in {base}, but {shapes[1]} in "
                f"{fine_tuned}. {advice}"
            )


def _shape(path: Path, name: str) -> list[int]:
    with safe_open(path, framework="pt") as file:
        shape: list[int] = file.get_slice(name).get_shape()
    return shape


def _interpolate_file(path: Path, fine_tuned: Path, of_base: _Tensors, coefficient: float, target: Path) -> None:
    module = path.parent.relative_to(fine_tuned).as_posix()
    merged: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 (no mapping)
            merged[name] = _between(_tensor(of_base[module, name], name), file.get_tensor(name), coefficient)
    save_file(merged, target, metadata=metadata)


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _between(base: torch.Tensor, fine_tuned: torch.Tensor, coefficient: float) -> torch.Tensor:
    if not fine_tuned.is_floating_point():
        return fine_tuned
    if coefficient == 0.0:
        return base.to(fine_tuned.dtype)
    return ((1.0 - coefficient) * base.float() + coefficient * fine_tuned.float()).to(fine_tuned.dtype)


def _title(module: str, name: str) -> str:
    return f"'{name}'" if module == "." else f"'{name}' of {module}"
